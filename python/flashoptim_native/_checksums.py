"""Checksums in a state dict: a file that was damaged, or arrays that changed behind its back, are told."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _parameters

#: Of ``state_dict()``: int64, ``_MARK``, a sum over everything but the states, one a parameter in the order of their
#: numbers; 0: none.
KEY = "flashoptim_native.checksums"
#: Other entries beside the states that are ours, and so covered.
PREFIX = "flashoptim_native."
#: What the entry begins with: where its name is damaged, it is known all the same.
_MARK = int.from_bytes(b"flashsum", "little")
_ROW_BYTES = 4096
_PRIME = 0x9E3779B97F4A7C15 - (1 << 64)
#: Dicts and lists in each other beyond which nobody looks.
_DEEPEST = 32


class _Array(NamedTuple):
    """Numbers on a device that stand for the bytes of one array, and where their hash goes."""

    owner: int
    sums: list[Tensor]


def of_states(states: Mapping[Any, Any], count: int) -> Tensor:
    """One checksum for each of ``count`` parameters; 0 for those that are sharded, or have no state."""
    hashes: dict[int, Any] = {}
    arrays: list[_Array] = []
    for number in range(count):
        held = states.get(number)
        if not isinstance(held, Mapping) or not held or any(map(_cannot_be_read, held.values())):
            continue
        hashes[number] = hashlib.blake2b(digest_size=8)
        for key, value in sorted(held.items(), key=lambda item: str(item[0])):
            if not isinstance(value, Tensor):
                hashes[number].update(_text((key, value)).encode())
                continue
            hashes[number].update(f"{key!s}:{value.dtype}:{tuple(value.shape)};".encode())
            arrays.append(_Array(number, _sums(_bytes_of(value))))
    for owner, numbers in _on_host(arrays):
        hashes[owner].update(numbers)
    return torch.tensor([_number(hashes.get(number)) for number in range(count)], dtype=torch.int64)


def _cannot_be_read(value: Any) -> bool:
    """Whether a tensor's bytes are not all here, or not its own affair."""
    if not isinstance(value, Tensor):
        return False
    if _parameters.is_sharded(value) or not _parameters.is_plain(value) or value.device.type == "meta":
        return True
    return value.layout != torch.strided or value.is_quantized or not _parameters.has_memory(value)


def _on_host(arrays: Sequence[_Array]) -> list[tuple[int, bytes]]:
    """The same as bytes, in the same order; one transfer a device."""
    result = [(array.owner, b"") for array in arrays]
    for device in dict.fromkeys(array.sums[0].device for array in arrays if array.sums):
        at = [index for index, array in enumerate(arrays) if array.sums and array.sums[0].device == device]
        values = torch.stack([one for index in at for one in arrays[index].sums]).tolist()
        for index in at:
            owner, sums = arrays[index]
            taken, values = values[: len(sums)], values[len(sums) :]
            result[index] = (owner, b"".join(value.to_bytes(8, "little", signed=True) for value in taken))
    return result


def _number(digest: Any) -> int:
    """Never 0 where there is one."""
    return 0 if digest is None else int.from_bytes(digest.digest(), "little", signed=True) or 1


def _bytes_of(value: Tensor) -> Tensor:
    return value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _sums(data: Tensor) -> list[Tensor]:
    """Sums over the rows, and over the columns, of the bytes as 64-bit words, 512 a row, each times an odd number.

    Modulo 2^64: any change of one word changes both, whatever its bits, and so does another order. They are hashed
    apart, because added to each other the top bits would cancel. Integer sums are the same on every device and run as
    fast as memory is read: zlib's crc32 is slower, and would bring a device's arrays to the host.
    """
    if data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // _ROW_BYTES * _ROW_BYTES
    parts = [data[:whole]] if whole else []
    if whole < data.numel():
        parts.append(torch.nn.functional.pad(data[whole:], (0, _ROW_BYTES - (data.numel() - whole))))
    result = []
    for part in parts:
        words = part.view(torch.int64).view(-1, _ROW_BYTES // 8)
        result += [(sums * _weights(sums.numel(), data.device)).sum() for sums in (words.sum(1), words.sum(0))]
    return result


def _weights(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.int64, device=device) * _PRIME | 1


# The rest of a state dict


def _text(value: Any, depth: int = 0) -> str:
    """A value as text that is the same for equal ones; of types that files of ours do not hold, their name."""
    if depth > _DEEPEST:
        raise ValueError(
            f"the state dict holds dicts or lists in each other more than {_DEEPEST} deep; allowed is what "
            "state_dict() gives"
        )
    if isinstance(value, Tensor):
        if _cannot_be_read(value):
            return f"{value.dtype}{tuple(value.shape)}"
        return f"{value.dtype}{tuple(value.shape)}{bytes(_bytes_of(value).tolist()).hex()}"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_text(k, depth + 1)}:{_text(v, depth + 1)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_text(item, depth + 1) for item in value) + "]"
    if isinstance(value, (bool, str, bytes, type(None))):
        return repr(value)
    if isinstance(value, int):
        return f"i{int(value)}"
    if isinstance(value, float):
        return f"f{float(value).hex()}"
    return f"<{type(value).__qualname__}>"


def _others(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of ours beside states, groups and checksums."""
    return {key: value for key, value in state_dict.items() if str(key).startswith(PREFIX) and key != KEY}


def _of_rest(state_dict: Mapping[str, Any]) -> int:
    """Over groups, in their order, and over entries of ours; those are sorted, and so are a group's."""
    ours = _others(state_dict)
    groups = [sorted(group.items(), key=lambda item: str(item[0])) for group in state_dict["param_groups"]]
    text = _text([groups, sorted(ours.items())])
    return _number(hashlib.blake2b(text.encode(), digest_size=8))


def of_state_dict(state_dict: Mapping[str, Any], count: int) -> Tensor:
    """What a state dict of ``count`` parameters holds under ``KEY``."""
    head = torch.tensor([_MARK, _of_rest(state_dict)], dtype=torch.int64)
    return torch.cat([head, of_states(state_dict["state"], count)])


def renew(state_dict: Any) -> None:
    """Sums up a state dict anew, which a hook may have changed; nothing where it is none of ours any more."""
    if isinstance(state_dict, dict) and all(key in state_dict for key in (KEY, "state", "param_groups")):
        state_dict[KEY] = of_state_dict(state_dict, sum(len(group["params"]) for group in state_dict["param_groups"]))


def verify(state_dict: Mapping[str, Any], numbers: Sequence[Any]) -> frozenset[Any]:
    """The parameters, by number in the dict, whose states are as they were saved.

    Raises:
        ValueError: something is not what was saved.
    """
    saved = state_dict.get(KEY)
    if saved is None:
        for key, value in state_dict.items():
            if key not in ("state", "param_groups") and _is_ours(value):
                raise ValueError(f"the state dict holds checksums as {key!r}; allowed is {KEY!r}: it is damaged")
        return frozenset()
    if not _is_ours(saved) or saved.numel() != len(numbers) + 2:
        raise ValueError(
            f"{KEY} of the state dict is {_described(saved)}; allowed is what state_dict() wrote, a 1-D int64 tensor "
            f"of {len(numbers) + 2} elements for {len(numbers)} parameters: the dict is damaged"
        )
    wanted = saved.tolist()
    found = of_states({i: state_dict["state"].get(number) for i, number in enumerate(numbers)}, len(numbers)).tolist()
    # A state that can be read was summed up when it was saved; 0 stands for shards, which may be whole by now.
    wrong = [str(n) for n, now, then in zip(numbers, found, wanted[2:]) if now != then and then != 0]
    if wrong:
        names = ", ".join(wrong[:8]) + (" ..." if len(wrong) > 8 else "")
        raise ValueError(f"the state of parameter {names} is not what its checksum says: {_REMEDY}")
    if _of_rest(state_dict) != wanted[1]:
        names = ", ".join(["param_groups", *sorted(_others(state_dict))])
        raise ValueError(f"what the state dict holds beside states ({names}) is not what its checksum says: {_REMEDY}")
    return frozenset(n for n, then in zip(numbers, wanted[2:]) if then != 0)


_REMEDY = (
    "the file is damaged, or the dict has changed since state_dict() (its arrays are the optimizer's own, which step() "
    "changes: copy.deepcopy() keeps them). Allowed are states and groups as saved; load_state_dict(state_dict, "
    "verify=False) takes edited ones"
)


def _is_ours(value: Any) -> bool:
    is_list = isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 1 and value.numel() >= 2
    return is_list and not _cannot_be_read(value) and int(value[0]) == _MARK


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of dtype {value.dtype} and shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
