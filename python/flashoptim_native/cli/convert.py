"""``flashoptim-native convert``: checkpoints and weights from and to others' formats."""

from __future__ import annotations

import json as json_module
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from .. import convert as converter
from .. import parse_optimizer_arguments
from ..convert import Expected
from ..convert.safetensors import SUFFIX
from . import _output

#: What --to names: an optimizer's checkpoint in a format, or a model's weights.
CHECKPOINTS = ("flashoptim", "torch", "safetensors", "archive")
WEIGHTS: dict[str, torch.dtype | None] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
DTYPES = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16}
#: Arguments of the package's functions that messages name, and the options that they are here.
_ARGUMENT = re.compile(r"\b(optimizer|key|dtype|weights|names|optimizer_file|keep_fp32)=(?:\.\.\.)?")


@_output.guarded()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="Of torch.save(), .safetensors, a C++ archive; for weights also an index or a folder."
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A file that does not exist yet.")],
    to: Annotated[
        str,
        typer.Option(
            help="An optimizer's checkpoint as flashoptim (for load_state_dict()), torch (fp32, for torch.optim), "
            "safetensors or archive (for C++); or a model's weights as bf16, fp16 or fp32."
        ),
    ],
    key: Annotated[
        str | None, typer.Option(help="Where the optimizer's state dict lies in the file, as in train.optimizer.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw, adam, ...: whose states they are, where the file does not say.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="How states are stored: quantize=false, state_codec=paper, ..."
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="fp32 weights, of which corrections are made.")
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Parameters' names in the optimizer's order, one a line or a JSON list."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16 or fp16: of parameters with corrections, where the file does not say.")
    ] = None,
    optimizer_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --to fp32: the checkpoint that holds the corrections.")
    ] = None,
    keep_fp32: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="With --to bf16 or fp16: names that stay.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare our own files with their checksums.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing; print how far values would be from those in IN.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """A checkpoint or weights in another format. OUT must not exist; it appears when it is whole, or not at all.

    [bold]flashoptim-native convert adamw.pt ours.pt --to flashoptim --dry-run[/bold]
    [bold]flashoptim-native convert training.pt new.pt --to flashoptim --key optimizer[/bold]
    [bold]flashoptim-native convert ours.pt torch.pt --to torch[/bold]
    [bold]flashoptim-native convert torchao.pt ours.pt --to flashoptim --optimizer adamw --set state_codec=paper[/bold]
    [bold]flashoptim-native convert model.safetensors small.safetensors --to bf16 --keep-fp32 '*.inv_freq'[/bold]
    [bold]flashoptim-native convert small.safetensors full.safetensors --to fp32 --optimizer-file ours.pt[/bold]

    Exit code 2: IN cannot be converted, or OUT exists; nothing was written then.
    """
    if to not in (*CHECKPOINTS, *WEIGHTS):
        raise _output.UserError(f"--to {to} is not allowed; allowed: {', '.join((*CHECKPOINTS, *WEIGHTS))}")
    if dtype is not None and dtype not in DTYPES:
        raise _output.UserError(f"--dtype {dtype} is not allowed; allowed: {', '.join(DTYPES)}")
    given = {
        "--key": key, "--optimizer": optimizer, "--set": set_, "--weights": weights, "--names": names,
        "--dtype": dtype, "--optimizer-file": optimizer_file, "--keep-fp32": keep_fp32,
    }  # fmt: skip
    _check_options(to, {name for name, value in given.items() if value is not None})
    if target.exists():
        raise _output.UserError(f"{target} exists, and is not overwritten: move it away, or give another name")
    is_named = target.suffix == SUFFIX
    if to in CHECKPOINTS and is_named != (to == "safetensors"):
        other = f"is no name of {SUFFIX}" if to == "safetensors" else f"is a name for --to safetensors, not --to {to}"
        raise _output.UserError(f"{target} {other}: files are read by their names; give another")
    if not source.exists():
        raise _output.UserError(f"{source} does not exist")
    listed = None if names is None else _names(names)
    try:
        if to in WEIGHTS:
            more: dict[str, Any] = {"dtype": WEIGHTS[to], "keep_fp32": keep_fp32 or ()}
            more |= {"optimizer_file": optimizer_file, "key": key, "names": listed}
            done = _weights(source, target, dry_run, more)
        else:
            fp32 = None if weights is None else converter.load_weights(weights)
            more = {"key": key, "optimizer": optimizer, "weights": fp32, "names": listed, "verify": verify}
            more |= {"dtype": None if dtype is None else DTYPES[dtype], **parse_optimizer_arguments(set_ or [])}
            done = _checkpoint(source, target, to, dry_run, more)
    except (TypeError, ValueError) as error:
        raise _output.UserError(_as_options(str(error))) from error
    if json:
        size = None if dry_run else target.stat().st_size
        said = {"source": str(source), "target": str(target), "to": to, "dry_run": dry_run, "file_bytes": size}
        more = {} if done is None else done._asdict() | {"errors": [one._asdict() for one in done.errors]}
        _output.print_json(said | {"expected": more or None})
    else:
        _print(source, target, to, done)


def _check_options(to: str, given: set[str]) -> None:
    """Refuses options that would be ignored."""
    allowed = {"--key", "--optimizer", "--set", "--weights", "--names", "--dtype"}
    if to == "fp32":
        allowed = {"--optimizer-file", "--key", "--names"}
    elif to in WEIGHTS:
        allowed = {"--keep-fp32"}
    for name in sorted(given - allowed):
        raise _output.UserError(f"{name} means nothing with --to {to}; allowed with it: {', '.join(sorted(allowed))}")
    if to == "fp32" and "--optimizer-file" not in given:
        raise _output.UserError("--to fp32 needs --optimizer-file FILE: the checkpoint that holds the corrections")


def _names(path: Path) -> list[str]:
    text = path.read_text()
    if not text.lstrip().startswith("["):
        return text.split("\n")[:-1] if text.endswith("\n") else text.split("\n")
    try:
        listed = json_module.loads(text)
    except ValueError as error:
        raise _output.UserError(f"--names {path} is no JSON list: {error}") from error
    if not all(isinstance(one, str) for one in listed):
        raise _output.UserError(f"--names {path} holds other things than names; allowed is a JSON list of strings")
    return list(listed)


def _as_options(message: str) -> str:
    """A message that names Python's arguments, with the options that they are here."""
    return _ARGUMENT.sub(lambda found: f"--{found[1].replace('_', '-')} ", message)


def _is_shown() -> bool | None:
    """A bar for files of any size where a person looks."""
    return True if sys.stderr.isatty() else None


def _weights(source: Path, target: Path, dry_run: bool, more: dict[str, Any]) -> Expected | None:
    if dry_run:
        return converter.expected_weights(source, progress=_is_shown(), **more)
    converter.weights_file(source, target, progress=_is_shown(), **more)
    return None


def _checkpoint(source: Path, target: Path, to: str, dry_run: bool, more: dict[str, Any]) -> Expected | None:
    if dry_run:
        return converter.expected(source, to, progress=_is_shown(), **more)
    converter.file(source, target, to, progress=_is_shown(), **more)
    return None


def _print(source: Path, target: Path, to: str, done: Expected | None) -> None:
    console = _output.console()
    if done is None:
        console.print(f"{source} -> {target}: {to}, {target.stat().st_size:,} bytes", highlight=False, markup=False)
        return
    whose = f"{done.source} {done.optimizer}".strip()
    console.print(
        f"{source}: {whose}, {done.parameters} parameters, {done.source_bytes:,} bytes of tensors; as {to} "
        f"{done.target_bytes:,} bytes. Nothing was written.",
        highlight=False,
        markup=False,
    )
    if not done.errors:
        console.print("Every value stays as it is.")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "elements", "RMS error over RMS", "largest relative error", "become 0", "become infinite"):
        table.add_column(title, justify="right" if title else "left")
    for one in done.errors:
        found = [f"{one.zeroed:,}", f"{one.overflowed:,}"]
        table.add_row(one.slot, f"{one.elements:,}", f"{one.rms:.2g}", f"{one.largest:.2g}", *found)
    console.print(table)


__all__ = ["CHECKPOINTS", "WEIGHTS", "convert"]
