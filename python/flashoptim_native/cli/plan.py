"""``flashoptim-native plan``: what a training step takes, with each optimizer, before there is a card."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import typer
from rich.table import Table
from rich.text import Text

from .. import planning
from ..planning import Choice, PlanError, Planner, Row, Setting
from . import _output

#: Names of --format, and the constructor's arguments that they stand for.
FORMATS: dict[str, dict[str, Any]] = {
    "24": {},
    "32": {"master_weight_bits": 32},
    "none": {"master_weight_bits": None, "stochastic_rounding": True},
    "paper": {"state_codec": "paper"},
    "fp32-states": {"quantize": False},
}
#: Parts of a peak: column, what it sums up, colour of its bar.
PARTS = (
    ("weights", ("weights", "buffers"), "blue"),
    ("gradients", ("gradients",), "magenta"),
    ("states", ("states", "scales"), "green"),
    ("corrections", ("corrections",), "cyan"),
    ("activations", ("activations", "inputs"), "yellow"),
    ("temporaries", ("temporaries",), "red"),
    ("other", ("libraries", "communication"), "white"),
)


class _Outcome(NamedTuple):
    """What was planned, to be shown."""

    planner: Planner
    rows: list[Row]
    setting: Setting
    #: Bytes of the card.
    card: int | None
    #: By a choice's title.
    batches: dict[str, int]
    verified: list[planning.Verification]
    advice: list[str]


@_output.guarded(PlanError)
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face config.json or its folder, a .safetensors or .pt file (weights alone), or "
            "module:function that makes a torch module.",
        ),
    ],
    batch: Annotated[int, typer.Option(min=1, help="Sequences or pictures in a step.")] = 1,
    sequence: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sequence (default: the model's own).")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width of a picture, in pixels.")] = None,
    checkpoint: Annotated[bool, typer.Option("--checkpoint", help="Recompute blocks in the backward pass.")] = False,
    autocast: Annotated[bool, typer.Option(help="Let fp32 models compute in bf16.")] = True,
    optimizer: Annotated[str, typer.Option(help="adamw, adam, lion, ...: one of this library's.")] = "adamw",
    format: Annotated[
        list[str] | None,
        typer.Option(help=f"How ours keeps weights and states: {', '.join(FORMATS)}. May be given several times."),
    ] = None,
    release: Annotated[
        bool | None, typer.Option(help="Only with gradient release, or only without (default: both).")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes, each with a card of its own.")] = 1,
    layout: Annotated[str, typer.Option(help="How they share the model: fsdp2 or ddp.")] = "fsdp2",
    gpu: Annotated[float | None, typer.Option(help="Memory of a card in GiB: what fits.")] = None,
    batches: Annotated[
        bool, typer.Option("--largest-batch", help="Search the largest batch that fits --gpu (several steps a choice).")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Also run steps on the GPU here, and compare.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a training step takes: weights, gradients, states, activations, temporaries. Needs neither GPU nor weights.

    One step is run on tensors without memory, and every allocation is followed.

    [bold]flashoptim-native plan Llama-3.1-8B/config.json --sequence 2048 --checkpoint --gpu 24[/bold]
    [bold]flashoptim-native plan my_models:unet --batch 8 --size 128[/bold]
    [bold]flashoptim-native plan model.safetensors --json[/bold]

    Exit code 1: with --gpu, nothing of ours fits.
    """
    if sequence is not None and size is not None:
        raise _output.UserError("--sequence and --size exclude each other: a batch is of tokens or of pictures")
    if layout not in planning.LAYOUTS:
        raise _output.UserError(f"--layout {layout} is not allowed; allowed: {', '.join(planning.LAYOUTS)}")
    if gpu is not None and gpu <= 0:
        raise _output.UserError(f"--gpu {gpu} is not allowed; allowed is a card's memory in GiB, more than 0")
    if batches and gpu is None:
        raise _output.UserError("--largest-batch needs --gpu GIB: the card that is to be filled")
    choices = _choices(optimizer, format or ["24", "32"], release)
    setting = Setting(batch, sequence or size, checkpoint, autocast, ranks, layout)
    planner = Planner(planning.load(model))
    card = None if gpu is None else int(gpu * 2**30)
    rows = []
    for choice in choices:
        _output.note(f"planning: {choice.title} ...")
        rows.append(planner.row(choice, setting))
    largest = _largest_batches(planner, rows, setting, card) if batches else {}
    verified = [planning.verify(planner, row.choice, setting) for row in rows if _can_run(row.choice)] if verify else []
    done = _Outcome(planner, rows, setting, card, largest, verified, planning.advice(planner, rows, setting, card))
    if json:
        _output.print_json(_as_json(done))
    else:
        _print(done)
    ours = [row for row in rows if row.choice.kind is not None]
    if card is not None and not any(row.fits(card) for row in ours):
        raise typer.Exit(_output.FOUND)


def _choices(optimizer: str, formats: list[str], release: bool | None) -> list[Choice]:
    if optimizer not in planning.kinds():
        raise _output.UserError(f"--optimizer {optimizer} is not allowed; allowed: {', '.join(planning.kinds())}")
    for name in formats:
        if name not in FORMATS:
            raise _output.UserError(f"--format {name} is not allowed; allowed: {', '.join(FORMATS)}")
    ways = (False, True) if release is None else (release,)
    ours = [planning.own(optimizer, releases=releases, **FORMATS[name]) for name in formats for releases in ways]
    return [*planning.baselines(optimizer), *ours]


def _largest_batches(planner: Planner, rows: list[Row], setting: Setting, card: int | None) -> dict[str, int]:
    if card is None or not planner.has_step:
        return {}
    result = {}
    for row in rows:
        _output.note(f"largest batch: {row.choice.title} ...")
        result[row.choice.title] = planning.largest_batch(planner, row.choice, setting, card)
    return result


def _can_run(choice: Choice) -> bool:
    return choice.kind is not None or choice.title.startswith("torch")


def _as_json(done: _Outcome) -> dict[str, Any]:
    planner, rows, setting, card, batches, verified, advice = done
    return {
        "model": planner.model.name,
        "parameters": rows[0].parameters,
        "trained_parameters": rows[0].trained,
        "counts_activations": planner.has_step,
        "setting": {**setting._asdict(), "device": setting.device._asdict()},
        "card_bytes": card,
        "choices": [
            {
                "title": row.choice.title,
                "peak_bytes": row.total,
                "phase": row.peak.phase,
                "parts": row.peak.parts,
                "largest": [one._asdict() for one in row.peak.largest],
                **({} if card is None else {"fits": row.fits(card)}),
                **({"largest_batch": batches[row.choice.title]} if row.choice.title in batches else {}),
            }
            for row in rows
        ],
        "verified": [
            {
                "title": one.choice.title,
                "predicted_bytes": one.predicted,
                "measured_bytes": one.measured,
                "reserved_bytes": one.reserved,
                "error": one.error,
            }
            for one in verified
        ],
        "advice": advice,
    }


def _print(done: _Outcome) -> None:
    planner, rows, setting, card, batches, verified, advice = done
    console = _output.console()
    trained = "" if rows[0].trained == rows[0].parameters else f", {rows[0].trained:,} of them trained"
    length = "" if setting.length is None else f" x {setting.length}"
    way = f", batch {setting.batch}{length}" + (", blocks checkpointed" if setting.checkpoint else "")
    ranks = f", {setting.ranks} ranks ({setting.layout}), each" if setting.ranks > 1 else ""
    console.print(f"[bold]{planner.model.name}[/bold]: {rows[0].parameters:,} parameters{trained}{way}{ranks}; GiB")
    if not planner.has_step:
        console.print("A file of weights: activations and temporaries are not known and not counted.")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for title, _, _ in PARTS:
        table.add_column(title, justify="right")
    table.add_column("peak", justify="right", style="bold")
    if card is not None:
        table.add_column(f"fits {card / 2**30:g}", justify="center")
    if batches:
        table.add_column("largest batch", justify="right")
    for row in rows:
        cells = [_output.gib(_sum(row, parts)) for _, parts, _ in PARTS]
        more = [] if card is None else ["[green]yes[/green]" if row.fits(card) else "[red]no[/red]"]
        more += [str(batches[row.choice.title])] if batches else []
        table.add_row(row.choice.title, *cells, _output.gib(row.total), *more)
    console.print(table)
    console.print()
    _print_bars(console, rows, card)
    for one in verified:
        console.print(
            f"measured: {one.choice.title}: predicted {one.predicted / 2**30:.3f}, measured {one.measured / 2**30:.3f} "
            f"GiB, error {100 * one.error:+.2f} %"
        )
    for line in advice:
        console.print(f"[bold]*[/bold] {line}", highlight=False)


def _sum(row: Row, parts: tuple[str, ...]) -> int:
    return sum(row.peak.parts.get(part, 0) for part in parts)


def _print_bars(console: Any, rows: list[Row], card: int | None) -> None:
    widest = max(max(row.total for row in rows), card or 0)
    left = max(len(row.choice.title) for row in rows) + 1
    space = max(20, min(console.width, 140) - left - 12)
    for row in rows:
        bar, done, drawn = Text(), 0, 0
        for _, parts, colour in PARTS:
            done += _sum(row, parts)
            cells = round(space * done / widest) - drawn
            bar.append("█" * cells, style=colour)
            drawn += cells
        if card is not None:
            at = min(space - 1, round(space * card / widest))
            bar.append(" " * max(0, at - drawn) + ("|" if at >= drawn else ""), style="bold")
        console.print(Text(row.choice.title.ljust(left)) + bar + Text(f" {row.total / 2**30:.2f}"), soft_wrap=True)
    legend = Text(" " * left)
    for title, _, colour in PARTS:
        legend.append("█ ", style=colour)
        legend.append(title + "  ")
    console.print(legend, soft_wrap=True)


__all__ = ["FORMATS", "plan"]
