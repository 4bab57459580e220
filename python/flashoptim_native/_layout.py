"""Probes by which the store finds where torch keeps what a step looks at (libtorch/ops/tensor_layout.h).

Nothing here is needed for a right step: where a probe is not as expected, a step asks torch, which takes longer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Set to "ask", a step asks torch whatever was found.
VARIABLE = "FLASHOPTIM_TENSOR_ACCESS"
ASK = "ask"


def find(functions: Any, free_threaded: bool) -> str:
    """Tells the store where things are, and proves it; "" or the reason why torch is asked."""
    if os.environ.get(VARIABLE) == ASK:
        return f"{VARIABLE}={ASK}"
    if free_threaded:
        return "this Python has no lock that keeps tensors as they are"
    try:
        with torch.no_grad(), torch.inference_mode(False):
            tensors = _tensors()
            functions.find_layout([_facts(tensor) for tensor in tensors])
            _prove(functions)
    # Something is elsewhere, or a torch to come has another name for what is asked; asking is right in any case.
    except (RuntimeError, AttributeError, TypeError) as error:
        functions.find_layout(None)
        return f"torch {torch.__version__}: {error}"
    return ""


def _tensors() -> list[Tensor]:
    """Tensors that differ in everything that is looked for."""
    cpu = torch.device("cpu")
    made = [
        torch.empty(23, device=cpu),
        torch.empty(40, dtype=torch.bfloat16, device=cpu)[7:22].view(3, 5),
        torch.empty(99, dtype=torch.int8, device=cpu)[30:90].view(3, 4, 5).transpose(0, 2),
        torch.frombuffer(bytearray(512), dtype=torch.int16)[11:131].view(2, 3, 4, 5),
        torch.empty(2, 3, 4, 5, 6, dtype=torch.float16, device=cpu),
        torch.empty((), device=cpu),
    ]
    for times, tensor in enumerate(made):
        for _ in range(3 * times):
            tensor.add_(0)
    for shape, dtype in (((7, 9), torch.bfloat16), ((11,), torch.float32), ((13, 2), torch.float32)):
        param = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=cpu))
        param.grad = torch.empty_like(param)
        made.append(param)
    made.append(torch.nn.Parameter(torch.empty(17, device=cpu)))
    released = torch.nn.Parameter(torch.empty(19, device=cpu))
    released.grad = torch.empty_like(released)
    released.grad = None
    made.append(released)
    with torch.inference_mode():
        made.append(torch.empty(29, device=cpu))
    return made


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()
    grad = tensor.grad
    return (
        tensor,
        storage._cdata,
        storage.data_ptr(),
        storage.nbytes(),
        tensor.storage_offset(),
        tensor.numel(),
        tensor.dim(),
        torch._C._dispatch_keys(tensor).raw_repr(),
        id(tensor),
        -1 if tensor._is_view() else int(tensor.requires_grad),
        0 if grad is None else torch.ops.flashoptim.implementation(grad),
        -1 if tensor.is_inference() else tensor._version,
    )


def _prove(functions: Any) -> None:
    """Every change that a user can make to a tensor shows; none is seen where there is none."""
    changes: list[Callable[[Tensor], Any]] = [
        lambda t: setattr(t, "data", torch.empty(6, 6)),
        lambda t: setattr(t, "data", t.data.t()),
        lambda t: setattr(t, "data", t.data[1:]),
        lambda t: setattr(t, "data", t.data.view(torch.int32)),
        lambda t: t.set_(torch.empty(6, 6)),  # type: ignore[call-overload]
        lambda t: t.set_(t.untyped_storage(), 1, (5, 6), (6, 1)),
        lambda t: t.resize_(12, 6),
        lambda t: t.as_strided_((6, 6), (1, 6)),
        lambda t: t.as_strided_((3, 12), (12, 1)),
        lambda t: t.as_strided_((6, 5), (6, 1)),
        lambda t: t.t_(),
        lambda t: t.unsqueeze_(0),
        lambda t: t.squeeze_() if t.dim() > 2 else t.unsqueeze_(1),
        lambda t: t.untyped_storage().resize_(0),
        lambda t: t.untyped_storage().resize_(4096),
        lambda t: torch.utils.swap_tensors(t, torch.empty(6, 6)),  # type: ignore[no-untyped-call]
    ]
    for number, change in enumerate(changes):
        tensor = torch.empty(6, 6, device="cpu")
        if not functions.looks_same(tensor, lambda: None):
            raise RuntimeError("a tensor is not found to be itself")
        if functions.looks_same(tensor, lambda changed=tensor, by=change: by(changed)):
            raise RuntimeError(f"change {number} of a tensor is not seen")
    param = torch.nn.Parameter(torch.empty(3, device="cpu"))
    before = param._version
    functions.bump_version(param)
    if param._version != before + 1 or param.detach()._version != before + 1:
        raise RuntimeError("a version is not counted")
