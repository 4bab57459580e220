"""What all commands share: where they print, how they end, and what a user's mistake looks like."""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import typer
from rich.console import Console

Command = TypeVar("Command", bound=Callable[..., Any])

#: Everything is as it should be; something was found; the command was given something that it cannot use.
OK, FOUND, MISTAKE = 0, 1, 2


class UserError(Exception):
    """Something that who calls the command can mend: printed as one line, without a traceback."""


def console() -> Console:
    """Standard output; wide enough for tables where it is no terminal."""
    plain = Console(soft_wrap=False)
    return plain if plain.is_terminal else Console(width=max(140, plain.width))


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=1, default=str)
    sys.stdout.write("\n")


def fail(message: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {_escaped(message)}", highlight=False)
    raise typer.Exit(MISTAKE)


def note(message: str) -> None:
    """What is under way, for a person; on standard error, so that --json's output stays one document."""
    errors = Console(stderr=True)
    if errors.is_terminal:
        errors.print(f"[dim]{_escaped(message)}[/dim]", highlight=False)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as a person reads it, without the line of Python that raised it."""
    Console(stderr=True, soft_wrap=True).print(f"[yellow]warning:[/yellow] {_escaped(str(message))}", highlight=False)


def guarded(*mistakes: type[BaseException]) -> Callable[[Command], Command]:
    """A command whose ``mistakes``, UserError and files that cannot be read end it with a message and exit code 2."""

    expected: tuple[type[BaseException], ...] = (UserError, OSError, *mistakes)

    def wrap(command: Command) -> Command:
        @functools.wraps(command)
        def run(*args: Any, **kwargs: Any) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of other libraries, about how we call them
                warnings.showwarning = _warn
                try:
                    return command(*args, **kwargs)
                except KeyboardInterrupt:
                    fail("interrupted")
                except expected as error:
                    fail(str(error))

        return run  # type: ignore[return-value]

    return wrap


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def gib(size: float) -> str:
    """Bytes as a person reads them in a table."""
    value = size / 2**30
    return "-" if size == 0 else f"{value:.2f}" if value >= 0.005 else "<0.01"


__all__ = ["FOUND", "MISTAKE", "OK", "UserError", "console", "fail", "gib", "guarded", "note", "print_json"]
