"""Checksums of states in a state dict: a file that was damaged, or arrays that changed behind its back, are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _parameters

#: Of ``state_dict()``: int64, one for each parameter in the order of their numbers; 0: none.
KEY = "flashoptim_native.checksums"
_SLICE = 1 << 20  # bytes that are looked at in one go: 12 MB of temporaries
_PRIME = 0x9E3779B97F4A7C15 - (1 << 64)


def of_states(states: Mapping[Any, Any], count: int) -> Tensor:
    """One checksum for each of ``count`` parameters; 0 for those that are sharded, or have no state."""
    sums = [of_state(states.get(number)) for number in range(count)]
    result = torch.zeros(count, dtype=torch.int64)
    for device in {one.device for one in sums if one is not None}:  # one transfer a device
        at = [number for number, one in enumerate(sums) if one is not None and one.device == device]
        result[at] = torch.stack([sums[number] for number in at]).cpu()  # type: ignore[misc]
    return result


def of_state(state: Any) -> Tensor | None:
    """Over names, dtypes, shapes and bytes of everything in a state; None where there is nothing to be read here."""
    if not isinstance(state, Mapping) or not state:
        return None
    tensors = [(key, value) for key, value in sorted(state.items(), key=str) if isinstance(value, Tensor)]
    if any(_parameters.is_sharded(value) or value.device.type == "meta" for _, value in tensors):
        return None
    device = next((value.device for _, value in tensors if value.device.type != "cpu"), torch.device("cpu"))
    total = torch.ones((), dtype=torch.int64, device=device)
    for key, value in tensors:
        head = f"{key}:{value.dtype}:{tuple(value.shape)}".encode()
        total = total * 31 + _of_bytes(torch.frombuffer(bytearray(head), dtype=torch.uint8)).to(device)
        total = total * 31 + _of_bytes(_bytes_of(value)).to(device)
    # Never 0, which says that there is none.
    return total | 1


def _bytes_of(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def _of_bytes(data: Tensor) -> Tensor:
    """Sum of words times odd numbers that differ by place, modulo 2^64: any changed bit changes it, and so does order."""
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for first in range(0, data.numel(), _SLICE):
        part = data[first : first + _SLICE]
        if part.numel() % 4:
            part = torch.nn.functional.pad(part, (0, 4 - part.numel() % 4))
        elif part.storage_offset() % 4:
            part = part.clone()
        words = part.view(torch.int32).to(torch.int64)
        total = total * 31 + (words * _weights(words.numel(), data.device)).sum()
    return total + data.numel()


_known_weights: dict[torch.device, Tensor] = {}


def _weights(count: int, device: torch.device) -> Tensor:
    if device not in _known_weights:
        numbers = torch.arange(_SLICE // 4, dtype=torch.int64, device=device)
        _known_weights[device] = (numbers * _PRIME) | 1
    return _known_weights[device][:count]


def verify(state_dict: Mapping[str, Any], numbers: Sequence[Any]) -> None:
    """Raises ValueError where a state is not the one that was saved."""
    saved = state_dict.get(KEY)
    if saved is None:
        return
    if not isinstance(saved, Tensor) or saved.dtype != torch.int64 or saved.dim() != 1 or saved.numel() != len(numbers):
        raise ValueError(
            f"{KEY} of the state dict is {saved!r}; allowed is a 1-D int64 tensor of {len(numbers)} elements, one a parameter"
        )
    found = of_states({i: state_dict["state"].get(number) for i, number in enumerate(numbers)}, len(numbers))
    wrong = [str(numbers[i]) for i in torch.nonzero((found != saved.cpu()) & (saved.cpu() != 0)).flatten().tolist()]
    if wrong:
        raise ValueError(
            f"the state of parameter {', '.join(wrong[:8])}{' ...' if len(wrong) > 8 else ''} is not what its checksum says: the file "
            "is damaged, or the dict has changed since state_dict() (its arrays are the optimizer's own, which step() "
            "changes: copy.deepcopy() keeps them). Allowed are states as saved; load_state_dict(state_dict, verify=False) "
            "takes edited ones"
        )
