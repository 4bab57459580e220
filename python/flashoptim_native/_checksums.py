"""Checksums of states in a state dict: a file that was damaged, or arrays that changed behind its back, are told."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _parameters

#: Of ``state_dict()``: int64, one for each parameter in the order of their numbers; 0: none.
KEY = "flashoptim_native.checksums"
_ROW_BYTES = 4096
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
    tensors = [(key, value) for key, value in sorted(state.items(), key=_name) if isinstance(value, Tensor)]
    if any(_parameters.is_sharded(value) or value.device.type == "meta" for _, value in tensors):
        return None
    device = next((value.device for _, value in tensors if value.device.type != "cpu"), torch.device("cpu"))
    total = torch.ones((), dtype=torch.int64, device=device)
    for key, value in tensors:
        head = f"{key}:{value.dtype}:{tuple(value.shape)}".encode()
        total = total * 31 + zlib.crc32(head)
        total = total * 31 + _of_bytes(_bytes_of(value)).to(device)
    # Never 0, which says that there is none.
    return total | 1


def _name(item: tuple[Any, Any]) -> str:
    return str(item[0])  # of the key alone: a tensor's text copies it to the host


def _bytes_of(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def _of_bytes(data: Tensor) -> Tensor:
    """Sums over the rows and the columns of the bytes as 64-bit words, 512 a row, each times an odd number of its own.

    Modulo 2^64: one changed bit changes it, whatever the bit, and so does another order. Integer sums are the same on
    every
    device and run as fast as memory is read: zlib's crc32 is slower, and would bring a device's arrays to the host.
    """
    if data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // _ROW_BYTES * _ROW_BYTES
    total = torch.full((), data.numel(), dtype=torch.int64, device=data.device)
    parts = [data[:whole]] if whole else []
    if whole < data.numel():
        parts.append(torch.nn.functional.pad(data[whole:], (0, _ROW_BYTES - (data.numel() - whole))))
    for part in parts:
        words = part.view(torch.int64).view(-1, _ROW_BYTES // 8)
        for sums in (words.sum(1), words.sum(0)):
            total = total * 31 + (sums * _weights(sums.numel(), data.device)).sum()
    return total


def _weights(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.int64, device=device) * _PRIME | 1


def verify(state_dict: Mapping[str, Any], numbers: Sequence[Any]) -> None:
    """Raises ValueError where a state is not the one that was saved."""
    saved = state_dict.get(KEY)
    if saved is None:
        return
    if not isinstance(saved, Tensor) or saved.dtype != torch.int64 or saved.dim() != 1 or saved.numel() != len(numbers):
        raise ValueError(
            f"{KEY} of the state dict is {saved!r}; allowed is a 1-D int64 tensor of {len(numbers)} elements, one a "
            f"parameter"
        )
    found = of_states({i: state_dict["state"].get(number) for i, number in enumerate(numbers)}, len(numbers))
    wrong = [str(numbers[i]) for i in torch.nonzero((found != saved.cpu()) & (saved.cpu() != 0)).flatten().tolist()]
    if wrong:
        raise ValueError(
            f"the state of parameter {', '.join(wrong[:8])}{' ...' if len(wrong) > 8 else ''} is not what its "
            f"checksum says: the file "
            "is damaged, or the dict has changed since state_dict() (its arrays are the optimizer's own, which step() "
            "changes: copy.deepcopy() keeps them). Allowed are states as saved; load_state_dict(state_dict, "
            "verify=False) "
            "takes edited ones"
        )
