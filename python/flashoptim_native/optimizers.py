"""The optimizers. Names and arguments are those of the reference implementation (flashoptim 0.1.3); the keyword-only
ones are this package's own:

    state_codec: "default" (full range, rounded without bias) or "paper" (the FlashOptim paper's, rounded to nearest).
    min_quantized_numel: parameters with fewer elements keep fp32 states; 0 quantizes all.
    seed: seed of the unbiased rounding, 0 <= seed < 2**53.
    maximize: maximize the objective instead of minimizing it.
    capturable: see FlashOptimizer.
    amsgrad, foreach, differentiable, decoupled_weight_decay: torch.optim's, at the values that ask nothing.
    stochastic_rounding: with master_weight_bits=None, round 16-bit weights without bias instead of to nearest.

and common to all:

    quantize: keep states in 8 bits; False: in fp32.
    master_weight_bits: 24 or 32: each 16-bit weight has an 8- or 16-bit correction; None: none. fp32 weights need none.
    compress_state_dict, check_numerics, fused: see FlashOptimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any, Literal

from torch import Tensor
from typing_extensions import Unpack

from .arguments import MoreArguments
from .casting import cast_model
from .numerics import NumericsError
from .optimizer import FlashOptimizer
from .weights import compute_ecc_bits, reconstruct_fp32_param

MasterWeightBits = Literal[24, 32] | None
StateCodecName = Literal["default", "paper"]

_SHARED = tuple(
    name for name, one in signature(FlashOptimizer.__init__).parameters.items() if one.kind is Parameter.KEYWORD_ONLY
)


def _shared(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of a constructor's arguments, its ``locals()``, those that FlashOptimizer takes."""
    more: dict[str, Any] = given["more"]
    return {name: given[name] for name in _SHARED} | more


class FlashAdamW(FlashOptimizer):
    """Adam with decoupled weight decay, as torch.optim.AdamW.

    decouple_lr: decay weights by weight_decay * lr / (first lr of the group) instead of weight_decay * lr, so that the
    decay does not depend on the learning rate's scale.
    """

    kind = "adamw"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        decouple_lr: bool = False,
        quantize: bool = True,
        compress_state_dict: bool = True,
        master_weight_bits: MasterWeightBits = 24,
        check_numerics: bool = False,
        fused: bool | None = True,
        *,
        state_codec: StateCodecName = "default",
        min_quantized_numel: int = 4096,
        seed: int = 0,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        capturable: bool = False,
        **more: Unpack[MoreArguments],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decouple_lr": decouple_lr}
        super().__init__(params, defaults, **_shared(locals()))


class FlashAdam(FlashOptimizer):
    """Adam with L2 regularization, as torch.optim.Adam."""

    kind = "adam"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        quantize: bool = True,
        compress_state_dict: bool = True,
        master_weight_bits: MasterWeightBits = 24,
        check_numerics: bool = False,
        fused: bool | None = True,
        *,
        state_codec: StateCodecName = "default",
        min_quantized_numel: int = 4096,
        seed: int = 0,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        capturable: bool = False,
        **more: Unpack[MoreArguments],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, **_shared(locals()))


class FlashSGD(FlashOptimizer):
    """SGD with momentum, dampening, Nesterov momentum and L2 regularization, as torch.optim.SGD.

    A momentum buffer is kept where momentum != 0. Its first value is the gradient, undampened, as in torch.optim.SGD.
    """

    kind = "sgd"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        quantize: bool = True,
        compress_state_dict: bool = True,
        master_weight_bits: MasterWeightBits = 24,
        check_numerics: bool = False,
        fused: bool | None = True,
        *,
        state_codec: StateCodecName = "default",
        min_quantized_numel: int = 4096,
        seed: int = 0,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        capturable: bool = False,
        **more: Unpack[MoreArguments],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, **_shared(locals()))


class FlashSGDW(FlashOptimizer):
    """SGD with decoupled weight decay.

    decouple_lr: decay weights by weight_decay * lr / (first lr of the group) instead of weight_decay * lr, so that the
    decay does not depend on the learning rate's scale.
    """

    kind = "sgdw"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        decouple_lr: bool = False,
        quantize: bool = True,
        compress_state_dict: bool = True,
        master_weight_bits: MasterWeightBits = 24,
        check_numerics: bool = False,
        fused: bool | None = True,
        *,
        state_codec: StateCodecName = "default",
        min_quantized_numel: int = 4096,
        seed: int = 0,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        capturable: bool = False,
        **more: Unpack[MoreArguments],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "decouple_lr": decouple_lr,
        }
        super().__init__(params, defaults, **_shared(locals()))


class FlashLion(FlashOptimizer):
    """Lion (Chen et al. 2023): the sign of an interpolated momentum, with decoupled weight decay.

    decouple_lr: decay weights by weight_decay * lr / (first lr of the group) instead of weight_decay * lr, so that the
    decay does not depend on the learning rate's scale.
    """

    kind = "lion"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        decouple_lr: bool = False,
        quantize: bool = True,
        compress_state_dict: bool = True,
        master_weight_bits: MasterWeightBits = 24,
        check_numerics: bool = False,
        fused: bool | None = True,
        *,
        state_codec: StateCodecName = "default",
        min_quantized_numel: int = 4096,
        seed: int = 0,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        capturable: bool = False,
        **more: Unpack[MoreArguments],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "decouple_lr": decouple_lr}
        super().__init__(params, defaults, **_shared(locals()))


class FlashAdEMAMix(FlashOptimizer):
    """AdEMAMix (Pagliardini et al. 2024): Adam with a second, slow average of the gradient in the update.

    betas: of the fast average, the squares' and the slow average's.
    alpha: share of the slow average, which has no bias correction.
    t_alpha, t_beta3: steps in which alpha grows from 0, and beta3 from beta1 (its half-life linearly); the paper takes
    the whole run. None: no warm-up.
    decouple_lr: decay weights by weight_decay * lr / (first lr of the group) instead of weight_decay * lr, so that the
    decay does not depend on the learning rate's scale.
    """

    kind = "ademamix"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        decouple_lr: bool = False,
        quantize: bool = True,
        compress_state_dict: bool = True,
        master_weight_bits: MasterWeightBits = 24,
        check_numerics: bool = False,
        fused: bool | None = True,
        *,
        state_codec: StateCodecName = "default",
        min_quantized_numel: int = 4096,
        seed: int = 0,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        capturable: bool = False,
        **more: Unpack[MoreArguments],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "t_alpha": t_alpha,
            "t_beta3": t_beta3,
            "eps": eps,
            "weight_decay": weight_decay,
            "decouple_lr": decouple_lr,
        }
        super().__init__(params, defaults, **_shared(locals()))


class FlashADOPT(FlashOptimizer):
    """ADOPT (Taniguchi et al. 2024): a momentum of gradients that the variance before them has normalized, clipped.

    The first step makes the variance and moves no weight. A normalized gradient is clipped at (steps since)^(1/4).
    eps: the least that a gradient is divided by.
    decouple_lr: decay weights by weight_decay * lr / (first lr of the group) instead of weight_decay * lr, so that the
    decay does not depend on the learning rate's scale.
    """

    kind = "adopt"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        decouple_lr: bool = False,
        quantize: bool = True,
        compress_state_dict: bool = True,
        master_weight_bits: MasterWeightBits = 24,
        check_numerics: bool = False,
        fused: bool | None = True,
        *,
        state_codec: StateCodecName = "default",
        min_quantized_numel: int = 4096,
        seed: int = 0,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        capturable: bool = False,
        **more: Unpack[MoreArguments],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "decouple_lr": decouple_lr}
        super().__init__(params, defaults, **_shared(locals()))


__all__ = [
    "FlashADOPT",
    "FlashAdEMAMix",
    "FlashAdam",
    "FlashAdamW",
    "FlashLion",
    "FlashOptimizer",
    "FlashSGD",
    "FlashSGDW",
    "NumericsError",
    "cast_model",
    "compute_ecc_bits",
    "reconstruct_fp32_param",
]
