"""Checkpoints from others' formats to ours, and back, without a model or an optimizer (docs/convert.md).

    convert.state_dict(saved, optimizer="adamw")                   # in memory
    convert.file("theirs.pt", "ours.pt", optimizer="adamw")        # from file to file, larger than memory
    convert.file("ours.pt", "torch.pt", to="torch")
    convert.expected("theirs.pt", optimizer="adamw")               # how far values would be off; writes nothing
    convert.weights_file("pytorch_model.bin", "model.safetensors", dtype=torch.bfloat16)
    convert.weights_file("model.safetensors", "fp32.safetensors", optimizer_file="ours.pt", names=names)

Everything is checked before a file appears; files are never overwritten, and are there whole or not at all. Values go
through fp32 and through the operators that a step uses: what is decoded from a format of others is exact, and what is
encoded in ours is rounded to nearest, within the bounds in docs/convert.md.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _load_checks, _states
from . import _expected, _files, archive, bitsandbytes, ours, reference, safetensors, torch_optim, torchao, weights
from ._checkpoint import Checkpoint, State, check_narrow
from ._expected import Expected, SlotError

#: Who may have written a state dict, the first that says yes.
_READERS: tuple[ModuleType, ...] = (ours, reference, bitsandbytes, torchao, torch_optim)
_TARGETS = ("flashoptim", "torch")
_FILE_TARGETS = (*_TARGETS, "safetensors", "archive")


def detect(state_dict: Mapping[str, Any]) -> str:
    """Whose a state dict is: ``"flashoptim"``, ``"reference"``, ``"bitsandbytes"``, ``"torchao"`` or ``"torch"``.

    Raises:
        TypeError, ValueError: it is no optimizer's state dict, or of no known kind.
    """
    return str(_reader_of(state_dict).NAME)


def _reader_of(state_dict: Any) -> ModuleType:
    _load_checks.structure(state_dict)
    for reader in _READERS:
        if reader.matches(state_dict):
            return reader
    keys = sorted({str(key) for held in state_dict["state"].values() for key in held})
    raise ValueError(
        f"states of the checkpoint hold {', '.join(keys[:16]) or 'nothing'}, of no format that is known; allowed are "
        f"those of {', '.join(str(reader.NAME) for reader in _READERS)}"
    )


def _read(state_dict: Any, optimizer: str | None, verify: bool) -> Checkpoint:
    reader = _reader_of(state_dict)
    if reader is ours:
        return ours.read(state_dict, optimizer, verify)
    checkpoint: Checkpoint = reader.read(state_dict, optimizer)
    return checkpoint


@torch.no_grad()
def state_dict(
    source: Mapping[str, Any],
    to: str = "flashoptim",
    *,
    optimizer: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
    names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """An optimizer's state dict in another format.

    Args:
        source: what ``state_dict()`` gave, of an optimizer of torch.optim, the reference implementation, bitsandbytes,
            torchao or ours (of any format version); its tensors on any device, whole (no DTensors).
        to: ``"flashoptim"``, which our ``load_state_dict()`` takes; ``"torch"``, fp32 states for torch.optim's AdamW,
            Adam and SGD (and others that load theirs).
        optimizer: ``"adamw"``, ``"adam"``, ``"sgd"``, ``"sgdw"``, ``"lion"``, ...: whose states they are, where
            ``source`` does not tell (the reference's, torchao's, torch's before 2.7, bitsandbytes' of one state).
        weights: fp32 weights by name, of which corrections are made for parameters of ``dtype``; the model then holds
            these weights rounded to ``dtype`` (:func:`narrow_weights`). None: corrections stay as they are.
        names: names of the parameters in the optimizer's order, for ``weights``, where the groups do not name them.
        dtype: torch.bfloat16 or torch.float16, of parameters with corrections, where ``source`` does not tell.
        verify: compare our own dicts with their checksums.
        options: how states are stored (``quantize``, ``state_codec``, ``master_weight_bits``, ``min_quantized_numel``,
            ``stochastic_rounding``, ``seed``) and hyperparameters, as the optimizer's constructor has them, for all
            groups; where nothing is said, our own dict's stay, and others get the constructor's defaults.

    Returns:
        A state dict that shares no tensor with ``source`` where a value was converted.

    Raises:
        TypeError: something is of another type.
        ValueError: something is missing, damaged, of no known format, or not possible in the target.
    """
    if to not in _TARGETS:
        raise ValueError(f"to = {to!r} is not allowed; allowed are {', '.join(map(repr, _TARGETS))}")
    checkpoint = _read(source, optimizer, verify)
    how = _how(checkpoint, weights, names, dtype, options, to)
    return _converted(checkpoint, checkpoint.kind_as(optimizer), to, how, lambda one: one.clone())


def _how(
    checkpoint: Checkpoint,
    fp32: Mapping[str, Tensor] | None,
    names: Sequence[str] | None,
    dtype: torch.dtype | None,
    options: Mapping[str, Any],
    to: str,
) -> ours.Options:
    if dtype is not None:
        check_narrow("dtype", dtype)
    if to == "torch" and (options or fp32 is not None):
        given = ", ".join([*options, *(["weights"] if fp32 is not None else [])])
        raise ValueError(f"to = 'torch' holds fp32 states and takes no {given}; allowed with it are none")
    by_number = None if fp32 is None else weights.by_number(checkpoint, weights.check(fp32, "weights"), names)
    return ours.Options(options, by_number, dtype)


def _converted(
    checkpoint: Checkpoint,
    kind: str,
    to: str,
    how: ours.Options,
    keep: Callable[[Tensor], Tensor],
) -> dict[str, Any]:
    if to != "torch":
        return ours.write(checkpoint, kind, how, keep)

    def values(number: Any) -> State | None:
        state = checkpoint.read(number)
        if state is None:
            return None
        slots = _states.slots_in(kind, state.held)
        decoded = dict(zip(slots, _states.decode(kind, state.held, slots)))
        others = {key: one for key, one in state.held.items() if key in (_states.STEP, _states.CORRECTION)}
        return State({**others, **{slot: keep(one) for slot, one in decoded.items()}}, state.shape)

    return torch_optim.write(checkpoint, kind, values)


@torch.no_grad()
def file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str | None = None,
    *,
    key: str | None = None,
    optimizer: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
    names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    progress: bool | None = None,
    **options: Any,
) -> None:
    """An optimizer's checkpoint from a file to a new one, parameter by parameter: neither needs to fit in memory.

    Files of ``torch.save()`` are mapped and read with ``weights_only=True``, which runs nothing that they name; other
    files of torch (those of before 1.6, and C++ archives) are read whole. What was converted lies in an unnamed file
    beside the target until it is written, so the disk needs room for it twice.

    Args:
        source: of ``torch.save()``; a ``.safetensors`` file of ours; or an archive of the C++ front end.
        target: a file that does not exist yet. It appears under its name when it is whole and on the disk.
        to: ``"flashoptim"`` or ``"torch"``, for ``torch.load()``; ``"safetensors"``, our state dict, which Python and
            C++ read; ``"archive"``, for C++ (``load_archive()``, ``torch::load()``). None: by the target's name,
            ``"safetensors"`` where it ends so, else ``"flashoptim"``.
        key: where the optimizer's state dict lies in the file, ``"optimizer"`` or with points for dicts in each other.
            The rest of such a file stays as it is, where the target is one of ``torch.save()``.
        optimizer, weights, names, dtype, verify, options: as :func:`state_dict` has them.
        progress: say on stderr how far it is (by tqdm where that is installed). None: on a terminal, from 1 GiB on.

    Raises:
        FileExistsError: ``target`` exists.
        OSError: a file cannot be read or written; there is no target then, as with every error.
        TypeError, ValueError: as :func:`state_dict`.
    """
    source, target = Path(source), Path(target)
    if to is None:
        to = "safetensors" if target.suffix == safetensors.SUFFIX else "flashoptim"
    _check_target(to)
    _files.check_absent(target)
    loaded, checkpoint, sizes = _open(source, key, optimizer, verify)
    how = _how(checkpoint, weights, names, dtype, options, to)
    kind = checkpoint.kind_as(optimizer)
    scratch = _files.Scratch(target.parent)
    shown = _files.Progress(f"{source.name} -> {target.name}", sum(sizes.values()), progress)
    try:
        counted = checkpoint.counted(sizes, shown.add)
        made = _converted(counted, kind, "torch" if to == "torch" else "flashoptim", how, scratch.keep)
        shown.writes()
        with _files.new_file(target) as partial:
            if to == "safetensors":
                safetensors.write_state_dict(partial, made, kind, lambda count: None)
            elif to == "archive":
                dtypes = {} if dtype is None else dict.fromkeys(checkpoint.numbers, dtype)
                archive.write_file(partial, ours.read(made, kind), kind, dtypes, lambda count: None)
            else:
                torch.save(made if loaded is None or key is None else _replaced(loaded, key, made), partial)
    finally:
        shown.close()
        scratch.close()


def _check_target(to: str) -> None:
    if to not in _FILE_TARGETS:
        raise ValueError(f"to = {to!r} is not allowed; allowed are {', '.join(map(repr, _FILE_TARGETS))}")


@torch.no_grad()
def expected(
    source: str | os.PathLike[str],
    to: str = "flashoptim",
    *,
    key: str | None = None,
    optimizer: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
    names: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    progress: bool | None = None,
    **options: Any,
) -> Expected:
    """What :func:`file` would give for a file: its size, and how far states would be from those that are there.

    Everything is read, converted and compared, parameter by parameter; nothing is written. Arguments and errors are
    those of :func:`file`.
    """
    source = Path(source)
    _check_target(to)
    _, checkpoint, sizes = _open(source, key, optimizer, verify)
    how = _how(checkpoint, weights, names, dtype, options, to)
    kind = checkpoint.kind_as(optimizer)
    size = sum(sizes.values())
    shown = _files.Progress(f"{source.name}, dry run", size, progress)
    try:
        return _expected.of_states(checkpoint.counted(sizes, shown.add), kind, to, how, size)
    finally:
        shown.close()


def _open(source: Path, key: str | None, optimizer: str | None, verify: bool) -> tuple[Any, Checkpoint, dict[Any, int]]:
    """What a file holds (None: nothing but a checkpoint), the checkpoint in it, and its bytes by parameter."""
    if archive.is_archive(source):
        checkpoint = archive.read_file(source, key)
        each = source.stat().st_size // max(1, len(checkpoint.numbers))
        return None, checkpoint, dict.fromkeys(checkpoint.numbers, each)
    loaded = None
    if source.suffix == safetensors.SUFFIX:
        content = safetensors.read_file(source)
        if not safetensors.is_state_dict(content):
            raise ValueError(f"{source} holds no optimizer's state; allowed is what convert.file() or C++ wrote")
        saved = safetensors.state_dict_of(content, source)
        checkpoint = ours.read(saved, optimizer, verify and ours.has_checksums(saved))
    else:
        loaded = load(source)
        saved = _at(loaded, key, source)
        checkpoint = _read(saved, optimizer, verify)
    return loaded, checkpoint, {number: _files.bytes_in(held) for number, held in saved["state"].items()}


def _at(loaded: Any, key: str | None, source: Path) -> Any:
    found = loaded
    for name in [] if key is None else key.split("."):
        if not isinstance(found, Mapping) or name not in found:
            held = ", ".join(map(repr, found)) if isinstance(found, Mapping) else f"a {type(found).__name__}"
            raise ValueError(f"key = {key!r}: {source} has no {name!r} there; it holds {held[:200]}")
        found = found[name]
    if key is None and isinstance(found, Mapping) and not {"state", "param_groups"} <= found.keys():
        nested = [name for name, one in found.items() if isinstance(one, Mapping) and "param_groups" in one]
        raise ValueError(
            f"{source} is no optimizer's state dict; it holds {', '.join(map(repr, found))[:200]}. "
            + (f"Say where it lies: key={nested[0]!r}" if nested else "Allowed is one, or a key= that says where it is")
        )
    return found


def _replaced(loaded: Mapping[str, Any], key: str, made: Any) -> dict[str, Any]:
    name, _, rest = key.partition(".")
    return {**loaded, name: _replaced(loaded[name], rest, made) if rest else made}


def load(path: str | os.PathLike[str]) -> Any:
    """What a file of ``torch.save()`` holds, mapped where torch can, read with ``weights_only=True``.

    torchao's tensors are read whether or not torchao is there; without it nothing can be computed with them.

    Raises:
        ValueError: the file holds objects that only code could make, or is damaged.
    """
    path = Path(path)
    with torch.serialization.safe_globals(torchao.stand_ins()):  # type: ignore[arg-type]
        try:
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path} holds other things than tensors, numbers and names: {error}") from error
        except (MemoryError, OSError):
            raise
        except Exception as error:  # whatever the unpickler meets in a damaged or foreign file
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise ValueError(f"{path} cannot be read as a file of torch.save(): {reason}") from error
        warnings.warn(f"{path} is of a format of torch before 1.6, which is read whole, not mapped", stacklevel=3)
        return loaded


# Weights


@torch.no_grad()
def fp32_weights(
    weights_16: Mapping[str, Tensor], optimizer_state: Mapping[str, Any], names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """A model's weights in fp32, with the bits that an optimizer's corrections hold.

    Args:
        weights_16: ``model.state_dict()``, of the moment at which ``optimizer_state`` was saved.
        optimizer_state: a state dict of ours, or of the reference.
        names: of the parameters in the optimizer's order, where the groups do not name them.

    Raises:
        TypeError, ValueError: something does not go together.
    """
    checkpoint = _read(optimizer_state, None, True)
    return dict(weights.merged(weights.check(weights_16, "weights_16"), checkpoint, names))


@torch.no_grad()
def narrow_weights(
    weights_32: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16, keep_fp32: Sequence[str] = ()
) -> dict[str, Tensor]:
    """fp32 weights in 16 bits, rounded to nearest; :func:`state_dict` makes the corrections that belong to them.

    Args:
        keep_fp32: patterns (``fnmatch``) of names that stay: norms' running statistics, rotary frequencies.
    """
    return dict(weights.narrowed(weights.check(weights_32, "weights_32"), dtype, _matcher(keep_fp32)))


def _matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    if isinstance(patterns, str):
        raise TypeError(f"keep_fp32 = {patterns!r} is a string; allowed is a list of patterns")
    return lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)


@torch.no_grad()
def weights_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    keep_fp32: Sequence[str] = (),
    optimizer_file: str | os.PathLike[str] | None = None,
    key: str | None = None,
    names: Sequence[str] | None = None,
    progress: bool | None = None,
) -> None:
    """A model's weights from files to a new one: rounded to 16 bits, or merged with corrections to fp32.

    Args:
        source: a ``.safetensors`` file, one of ``torch.save()`` (a state dict of tensors), an index of several
            (``*.index.json``), or a folder with one of these: what DeepSpeed's ``zero_to_fp32.py`` writes, too.
        target: a ``.safetensors`` file, or another name for ``torch.save()``; it must not exist.
        dtype: torch.bfloat16 or torch.float16, to round to.
        keep_fp32: patterns of names that are not rounded.
        optimizer_file: a checkpoint of the optimizer that holds the corrections, of any format that has them; the
            weights become fp32 then.
        key, names: where it lies in its file, and the parameters' names in its order, as :func:`file` has them.

    Raises:
        FileExistsError: ``target`` exists.
        ValueError: not exactly one of ``dtype`` and ``optimizer_file`` is given, or something does not go together.
        OSError: a file cannot be read or written; there is no target then.
    """
    source, target = Path(source), Path(target)
    _files.check_absent(target)
    _check_one_of(dtype, optimizer_file)
    loaded = load_weights(source)
    scratch = _files.Scratch(target.parent)
    shown = _files.Progress(f"{source.name} -> {target.name}", _files.bytes_in(loaded), progress)
    try:
        if dtype is not None:
            items = weights.narrowed(loaded, dtype, _matcher(keep_fp32))
        else:
            items = weights.merged(loaded, _open(Path(optimizer_file or ""), key, None, True)[1], names)
        made = {}
        for name, value in items:
            made[name] = scratch.keep(value)
            shown.add(loaded[name].nbytes)
        shown.writes()
        with _files.new_file(target) as partial:
            if target.suffix == safetensors.SUFFIX:
                safetensors.write_file(partial, made, {"format": "pt"}, lambda count: None)
            else:
                torch.save(made, partial)
    finally:
        shown.close()
        scratch.close()


@torch.no_grad()
def expected_weights(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    keep_fp32: Sequence[str] = (),
    optimizer_file: str | os.PathLike[str] | None = None,
    key: str | None = None,
    names: Sequence[str] | None = None,
    progress: bool | None = None,
) -> Expected:
    """What :func:`weights_file` would give: its size, and how far weights would be from those that are there.

    Nothing is written. Arguments and errors are those of :func:`weights_file`.
    """
    source = Path(source)
    _check_one_of(dtype, optimizer_file)
    loaded = load_weights(source)
    shown = _files.Progress(f"{source.name}, dry run", _files.bytes_in(loaded), progress)
    checkpoint = None if optimizer_file is None else _open(Path(optimizer_file), key, None, True)[1]
    try:
        return _expected.of_weights(loaded, checkpoint, names, dtype, _matcher(keep_fp32), shown.add)
    finally:
        shown.close()


def _check_one_of(dtype: torch.dtype | None, optimizer_file: Any) -> None:
    if (dtype is None) == (optimizer_file is None):
        raise ValueError(f"dtype = {dtype!r}, optimizer_file = {optimizer_file!r}: allowed is one of them")


def load_weights(source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Weights by name of a file, of several with an index, or of a folder with one of either; mapped, not read.

    Raises:
        ValueError: a file holds something else, or a name is in two.
        OSError: a file cannot be read.
    """
    result: dict[str, Tensor] = {}
    for path in _files.weight_files(Path(source)):
        found: Any = safetensors.read_file(path).tensors if path.suffix == safetensors.SUFFIX else load(path)
        for name, value in weights.check(found, str(path)).items():
            if name in result:
                raise ValueError(f"{path} holds {name!r}, which another file of {source} holds, too")
            result[name] = value
    return result


__all__ = [
    "Expected",
    "SlotError",
    "detect",
    "expected",
    "expected_weights",
    "file",
    "fp32_weights",
    "load",
    "load_weights",
    "narrow_weights",
    "state_dict",
    "weights_file",
]
