"""The commands, one module each."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .bench import bench
from .convert import convert
from .doctor import doctor
from .inspect import inspect
from .plan import plan

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Memory-efficient optimizers: what a model takes, how fast steps are, what a checkpoint holds, converters.",
    epilog="Examples:  [bold]flashoptim-native plan config.json --gpu 24[/bold]   "
    "[bold]flashoptim-native doctor[/bold]   [bold]flashoptim-native inspect checkpoint.pt[/bold]   "
    "[bold]flashoptim-native convert adamw.pt ours.pt --to flashoptim[/bold]   "
    "[bold]flashoptim-native bench --numel 4194304[/bold]",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Exit codes: 0, all is well; 1, something was found (doctor) or does not fit (plan); 2, a mistake in the call."""


for command in (plan, bench, inspect, convert, doctor):
    app.command(no_args_is_help=command in (plan, inspect, convert))(command)

__all__ = ["app"]
