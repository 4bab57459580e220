"""Memory-efficient optimizers: 16-bit weights with 8- or 16-bit corrections, and 8-bit states.

Drop-in replacements for PyTorch's optimizers; the arithmetic is C++. See docs/python_api.md.
"""

from __future__ import annotations

from . import _broken

try:
    from . import _ops  # noqa: F401  (everything else imports it)
except (ImportError, OSError) as _error:
    _broken.end_the_command(_error)
    raise

from . import convert, optimizers
from ._alias import install_as_flashoptim
from ._ops import cpu_isa, tensor_access
from ._parameters import describe_shard
from .arguments import parse_optimizer_arguments
from .description import FormatDescription, OptimizerDescription
from .gradient_release import (
    GradientReleaseHandle,
    enable_gradient_release,
    prepare_for_gradient_release,
    remove_gradient_release,
)
from .numerics import NumericsReport, ParameterNumerics
from .optimizers import *  # noqa: F403  (its __all__ is the list of optimizers)
from .suggestion import PolicySuggestion, SuggestedFormat, suggest_policy
from .weights import get_fp32_model_state_dict, set_fp32_model_state_dict

__version__ = "0.1.0"

__all__ = [
    "FormatDescription",
    "GradientReleaseHandle",
    "NumericsReport",
    "OptimizerDescription",
    "ParameterNumerics",
    "PolicySuggestion",
    "SuggestedFormat",
    "convert",
    "cpu_isa",
    "describe_shard",
    "enable_gradient_release",
    "get_fp32_model_state_dict",
    "install_as_flashoptim",
    "parse_optimizer_arguments",
    "prepare_for_gradient_release",
    "remove_gradient_release",
    "set_fp32_model_state_dict",
    "suggest_policy",
    "tensor_access",
]
__all__ += optimizers.__all__
