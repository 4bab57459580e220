"""``flashoptim-native inspect``: what a checkpoint holds, suspicious tensors first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..checkpoint_contents import CheckpointError, Contents, TensorReport, as_dicts, plot, read
from . import _output

_BLOCKS = " ▁▂▃▄▅▆▇█"


@_output.guarded(CheckpointError)
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Written by torch.save, or .safetensors.")],
    most: Annotated[int, typer.Option(min=0, help="Tensors to show, suspicious first (0: all).")] = 20,
    plot_to: Annotated[
        Path | None, typer.Option("--plot", metavar="PICTURE", help="Write the histograms as .png, .svg or .pdf.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, of all tensors.")] = False,
) -> None:
    """What a checkpoint holds: whose it is, formats, bytes a parameter; per tensor codes, their ends and ranges.

    Reads state dicts of this library, torch, the reference implementation, bitsandbytes, torchao; files of weights.

    [bold]flashoptim-native inspect checkpoint.pt[/bold]
    [bold]flashoptim-native inspect checkpoint.pt --plot codes.png[/bold]

    Exit code 1: a tensor is suspicious.
    """
    contents = read(file)
    if plot_to is not None:
        plot(contents, plot_to)
    if json:
        said = contents._asdict() | {"bytes": contents.bytes, "tensors": list(as_dicts(contents.tensors))}
        _output.print_json(said)
    else:
        _print(contents, str(file), most)
    if contents.suspicious:
        raise typer.Exit(_output.FOUND)


def _print(contents: Contents, file: str, most: int) -> None:
    console = _output.console()
    version = "" if contents.version is None else f", state format {contents.version}"
    console.print(
        f"{file}: [bold]{contents.writer}[/bold] {contents.optimizer}{version}: {contents.parameters} parameters, "
        f"{contents.elements:,} elements, {contents.bytes:,} bytes, "
        f"{contents.bytes / max(1, contents.elements):.3f} each",
        highlight=False,
    )
    for index, group in enumerate(contents.groups):
        text = ", ".join(f"{key}={value!r}" for key, value in group.items() if key not in ("library", "format"))
        console.print(f"group {index}: {text}".replace("[", r"\["), highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, right in (("parameter", 0), ("tensor", 0), ("dtype", 0), ("shape", 0), ("saturated", 1), ("zero", 1)):
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    table.add_column("smallest, largest", no_wrap=True)
    table.add_column("codes", no_wrap=True)
    shown = contents.tensors[:most] if most else contents.tensors
    for one in shown:
        table.add_row(*_cells(one), style="red" if one.suspicions else None)
        for suspicion in one.suspicions:
            table.add_row("", f"[red]! {suspicion}[/red]")
    console.print(table)
    left = len(contents.tensors) - len(shown)
    if left:
        console.print(f"{left} more tensors; --most 0 shows all")
    if contents.suspicious:
        console.print(f"[red]{len(contents.suspicious)} tensors are suspicious[/red]")


def _cells(one: TensorReport) -> list[str]:
    def share(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f} %"

    spread = "" if one.range is None else f"{one.range[0]:.2g}, {one.range[1]:.2g}"
    shape = "x".join(map(str, one.shape))
    return [one.parameter, one.name, one.dtype, shape, share(one.saturated), share(one.floored), spread, _sketch(one)]


def _sketch(one: TensorReport) -> str:
    if not one.histogram:
        return ""
    largest = max(one.histogram)
    return "".join(_BLOCKS[-(-count * (len(_BLOCKS) - 1) // largest)] for count in one.histogram)


__all__ = ["inspect"]
