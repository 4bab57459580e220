"""``flashoptim-native doctor``: what is installed, whether it works, and what to do where it does not."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from . import _output

_MARKS = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "fault": "[red]fault[/red]"}


@_output.guarded()
def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """What is installed here, which library was loaded and why, and whether CPU and GPU give the same bits.

    Exit code 1: there is a fault. A note is no fault.
    """
    from ..diagnosis import diagnose

    findings = diagnose()
    if json:
        _output.print_json([one._asdict() for one in findings])
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for _ in range(3):
            table.add_column()
        for one in findings:
            table.add_row(_MARKS[one.level], one.name, one.text.replace("[", r"\["))
            if one.remedy:
                table.add_row("", "", "[bold]->[/bold] " + one.remedy.replace("[", r"\["))
        _output.console().print(table)
    if any(one.level == "fault" for one in findings):
        raise typer.Exit(_output.FOUND)


__all__ = ["doctor"]
