"""Which buffers 16 bits would spoil: positions, frequencies and schedules, told by name or by range."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import Tensor

#: Of the last part of a buffer's name, in lower case.
EXACT_NAMES = (
    *("*freq*", "*rotary*", "*rope*", "*position*", "pos_ids", "*timestep*", "*schedule*"),
    *("alpha", "alphas*", "beta", "betas*", "sigma", "sigmas*", "*_cumprod*", "*log_snr*", "*alibi*"),
)
_SHORTEST_SEQUENCE = 8
_LARGEST_LOOKED_AT = 1 << 22


def needs_its_precision(name: str, buffer: Tensor, dtype: torch.dtype) -> bool:
    """Whether a buffer is to stay as it is where a model is cast to ``dtype``, of 16 bits.

    It does where its name is one of ``EXACT_NAMES``, or where its values are
    - a sequence (one dimension, 8 numbers or more) that rises or falls all the way: frequencies, positions, schedules;
    - whole numbers, of which ``dtype`` does not have all;
    - finite and not 0, but infinite or 0 in ``dtype``.
    """
    if not buffer.is_floating_point() or dtype.itemsize != 2 or buffer.element_size() <= 2:
        return False
    last = name.rpartition(".")[2].lower()
    if any(fnmatchcase(last, pattern) for pattern in EXACT_NAMES):
        return True
    if buffer.device.type == "meta" or buffer.layout != torch.strided or not 0 < buffer.numel() <= _LARGEST_LOOKED_AT:
        return False
    values = buffer.detach().reshape(-1)
    if max(buffer.shape, default=1) == buffer.numel() >= _SHORTEST_SEQUENCE:
        steps = values.diff()
        if bool((steps > 0).all()) or bool((steps < 0).all()):
            return True
    finite = values[values.isfinite()]
    rounded = finite.to(dtype).to(values.dtype)
    if bool((finite == finite.round()).all()) and bool((rounded != finite).any()):
        return True
    return bool((~rounded.isfinite() | ((rounded == 0) & (finite != 0))).any())


__all__ = ["EXACT_NAMES", "needs_its_precision"]
