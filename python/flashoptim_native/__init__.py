"""Memory-efficient optimizers: 16-bit weights with 8- or 16-bit corrections, and 8-bit states.

Drop-in replacements for PyTorch's optimizers; the arithmetic is C++. See docs/python_api.md.
"""

from __future__ import annotations

from ._alias import install_as_flashoptim
from ._ops import cpu_isa
from ._parameters import describe_shard
from .arguments import parse_optimizer_arguments
from .casting import cast_model
from .description import FormatDescription, OptimizerDescription
from .gradient_release import (
    GradientReleaseHandle,
    enable_gradient_release,
    prepare_for_gradient_release,
    remove_gradient_release,
)
from .numerics import NumericsError, NumericsReport, ParameterNumerics
from .optimizer import FlashOptimizer
from .optimizers import FlashAdam, FlashAdamW, FlashLion, FlashSGD, FlashSGDW
from .weights import (
    compute_ecc_bits,
    get_fp32_model_state_dict,
    reconstruct_fp32_param,
    set_fp32_model_state_dict,
)

__version__ = "0.1.0"

__all__ = [
    "FlashAdam",
    "FlashAdamW",
    "FlashLion",
    "FlashOptimizer",
    "FlashSGD",
    "FlashSGDW",
    "FormatDescription",
    "GradientReleaseHandle",
    "NumericsError",
    "NumericsReport",
    "OptimizerDescription",
    "ParameterNumerics",
    "cast_model",
    "compute_ecc_bits",
    "cpu_isa",
    "describe_shard",
    "enable_gradient_release",
    "get_fp32_model_state_dict",
    "install_as_flashoptim",
    "parse_optimizer_arguments",
    "prepare_for_gradient_release",
    "reconstruct_fp32_param",
    "remove_gradient_release",
    "set_fp32_model_state_dict",
]
