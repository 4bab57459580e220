"""Files that are there whole or not at all, memory that lies in a file, and a line that says how far something is."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Elements' bytes from which a progress line is shown where nobody says whether to.
_LARGE = 1 << 30
_SEGMENT = 1 << 26
_BAR = 30


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Where to write what becomes ``path`` at the end: flushed, and renamed. Where anything fails, there is no file.

    Raises:
        FileExistsError: there is a file of this name, now or when it is finished.
        OSError: it cannot be written.
    """
    check_absent(path)
    handle, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        partial.chmod(0o666 & ~_umask())
        yield partial
        flush(partial)
        check_absent(path)
        partial.rename(path)
        flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_absent(path: Path) -> None:
    """Raises FileExistsError where there is a file, and FileNotFoundError where there is no folder for one."""
    if path.exists():
        raise FileExistsError(f"{path} exists, and is not overwritten: move it away, or give another name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: {path.parent} is no folder; make it, or give another name")


def flush(path: Path) -> None:
    """Brings a file, or a folder's list of files, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Scratch:
    """Memory in a file without a name, beside the target: what a conversion made and is not written yet.

    Its pages are the disk's to keep, so that a checkpoint larger than memory goes through.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (lives as long as the tensors' maps)
        self._map: mmap.mmap | None = None
        self._used = self._end = self._size = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy in the file. Its memory is its own: torch.save() writes it once, without the rest."""
        tensor = tensor.detach()
        count = tensor.numel() * tensor.element_size()
        if count == 0 or tensor.dim() == 0:
            return tensor.clone()
        begin = -(-self._used // 64) * 64
        if self._map is None or begin + count > self._size:
            self._size = max(_SEGMENT, count)
            os.ftruncate(self._file.fileno(), self._end + self._size)
            self._map = mmap.mmap(self._file.fileno(), self._size, offset=self._end)
            self._end += -(-self._size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            begin = 0
        self._used = begin + count
        memory = memoryview(self._map)[begin : begin + count]
        copy: Tensor = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)

    def close(self) -> None:
        self._file.close()
        self._map = None


class Progress:
    """How many bytes of a whole are done, on stderr: tqdm's bar where tqdm is installed, else a line of our own.

    Args:
        what: is being done.
        total: bytes.
        is_shown: None: where stderr is a terminal and ``total`` at least 1 GiB.
    """

    def __init__(self, what: str, total: int, is_shown: bool | None) -> None:
        self._what, self._total, self._done, self._percent = what, total, 0, -1
        self._is_shown = (total >= _LARGE and sys.stderr.isatty()) if is_shown is None else is_shown
        self._bar: Any = None
        if self._is_shown:
            try:
                tqdm = importlib.import_module("tqdm").tqdm
            except ImportError:
                return
            self._bar = tqdm(desc=what, total=total, unit="B", unit_scale=True, file=sys.stderr)

    def add(self, count: int) -> None:
        self._done += count
        if not self._is_shown:
            return
        if self._bar is not None:
            self._bar.update(count)
            return
        percent = 100 if self._total == 0 else min(100, 100 * self._done // self._total)
        if percent != self._percent:
            self._percent = percent
            self._print(f"{percent} %")

    def writes(self) -> None:
        """What is left is writing the file, which takes as long as the disk does."""
        if self._bar is not None:
            self._bar.set_postfix_str("writing")
        elif self._is_shown:
            self._print("writing")

    def _print(self, state: str) -> None:
        full = max(0, self._percent) * _BAR // 100
        print(f"\r{self._what}: [{'#' * full:<{_BAR}}] {state:<7}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._is_shown:
            print(file=sys.stderr, flush=True)


def bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in the order of its dimensions, as one part, or none where it is empty.

    (Tensor.numpy() would want NumPy, which torch does not.)
    """
    flat = tensor.detach().cpu().contiguous()
    if flat.numel() > 0:
        yield memoryview((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr())).cast("B")


def bytes_in(value: Any) -> int:
    """Of all tensors in dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(bytes_in, value.values()))
    return sum(map(bytes_in, value)) if isinstance(value, (list, tuple)) else 0


def weight_files(path: Path) -> list[Path]:
    """The files of a model: ``path`` itself, or those that an index (``*.index.json``) or a folder lists.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the index is none.
    """
    if path.is_dir():
        indices = sorted(path.glob("*.index.json"))
        if len(indices) == 1:
            return weight_files(indices[0])
        found = sorted(one for suffix in ("*.safetensors", "*.bin") for one in path.glob(suffix))
        if len(found) != 1:
            raise FileNotFoundError(
                f"{path} holds {len(indices)} index files (*.index.json) and {len(found)} weight files (*.safetensors, "
                "*.bin); allowed is a folder with one of either"
            )
        return found
    if path.name.endswith(".index.json"):
        try:
            listed = json.loads(path.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no index of weight files; allowed is JSON with a 'weight_map'") from error
        return [path.parent / name for name in dict.fromkeys(listed.values())]
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; allowed is a file of weights, an index of several, or a folder")
    return [path]


__all__ = ["Progress", "Scratch", "bytes_in", "bytes_of", "check_absent", "flush", "new_file", "weight_files"]
