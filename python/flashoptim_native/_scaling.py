"""What GradScaler and clip_grad_norm_() leave for a step: factors of its gradients, and whether to skip it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Scaling(NamedTuple):
    """What a step's gradients are multiplied with, and whether it is skipped; tensors are read on the device."""

    grad_scale: float = 1.0
    divisor: Tensor | None = None
    clip: Tensor | None = None
    found_inf: Tensor | None = None

    @classmethod
    def of(
        cls,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | None,
        clip: Tensor | None,
        is_on_cuda: bool,
    ) -> Scaling | None:
        """What is left for this step; None: skip it, as far as the host knows."""
        if found_inf is None and grad_scale is None:
            return cls(clip=clip)
        if is_on_cuda:
            divisor = grad_scale if isinstance(grad_scale, Tensor) else None
            factor = 1.0 if grad_scale is None or isinstance(grad_scale, Tensor) else 1.0 / grad_scale
            return cls(factor, divisor, clip, found_inf)
        if found_inf is not None and float(found_inf) != 0.0:
            return None
        return cls(1.0 if grad_scale is None else 1.0 / float(grad_scale), clip=clip)

    def has_no_tensors(self) -> bool:
        return self.divisor is None and self.clip is None and self.found_inf is None

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """divisor, clip and found_inf on ``device``, as float32 of one element."""
        moved = []
        for tensor in (self.divisor, self.clip, self.found_inf):
            if tensor is not None and (tensor.device != device or tensor.dtype != torch.float32):
                # To the host it must have arrived before the step reads it.
                tensor = tensor.to(device, torch.float32, non_blocking=device.type == "cuda")
            moved.append(tensor)
        return moved[0], moved[1], moved[2]


def takes_scale(optimizer: Any) -> bool:
    """Whether GradScaler may leave unscaling to step().

    Accelerate takes a step for skipped, so that schedulers wait, where GradScaler has not called step(), and sees it by
    a function in step's place. There GradScaler is to unscale, and to look for overflows, itself; not where it cannot
    (fp16 gradients) or where release has taken the gradients already.
    """
    if getattr(optimizer.step, "__module__", None) != "accelerate.optimizer":
        return True
    if getattr(optimizer, "_gradient_release", None) is not None:
        return True
    grads = (param.grad for group in optimizer.param_groups for param in group["params"])
    return any(grad is not None and grad.dtype == torch.float16 for grad in grads)


__all__ = ["Scaling", "takes_scale"]
