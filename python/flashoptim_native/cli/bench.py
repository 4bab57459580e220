"""``flashoptim-native bench``: this machine's step beside other optimizers'."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.table import Table

from .. import planning
from ..step_times import StepTime, candidates, copy_bandwidth_of, time_steps
from . import _output


@_output.guarded(planning.PlanError, torch.OutOfMemoryError)
def bench(
    numel: Annotated[int, typer.Option(min=1024, help="Elements of one large parameter.")] = 1 << 24,
    model: Annotated[
        str | None, typer.Option(help="Take this model's parameters instead (as plan's MODEL), with random values.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each; the middle is printed.")] = 11,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on the CPU (default: torch's choice).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """One step here, beside torch's fused and foreach AdamW and, where installed, bitsandbytes' and torchao's.

    [bold]flashoptim-native bench[/bold]
    [bold]flashoptim-native bench --model gpt2/config.json --device cuda[/bold]

    Times on a machine that others share vary: compare lines of one run, and run it again.
    """
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen not in ("cpu", "cuda"):
        raise _output.UserError(f"--device {chosen} is not allowed; allowed: cpu, cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise _output.UserError("--device cuda: torch finds no CUDA device here")
    if threads is not None:
        torch.set_num_threads(threads)
    where = torch.device(chosen)
    shapes = [(numel,)] if model is None else _shapes_of(model)
    bandwidth = copy_bandwidth_of(where)
    rows = []
    for title, make in candidates(where).items():
        _output.note(f"{title} ...")
        rows.append(time_steps(make, title, shapes, where, steps, bandwidth))
    count = sum(torch.Size(shape).numel() for shape in shapes)
    name = torch.cuda.get_device_name() if chosen == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if json:
        _output.print_json(
            {
                "device": name,
                "torch": torch.__version__,
                "elements": count,
                "tensors": len(shapes),
                "copy_bytes_per_s": bandwidth,
                "steps": [row._asdict() for row in rows],
            }
        )
    else:
        _print(rows, name, count, len(shapes), bandwidth)


def _shapes_of(model: str) -> list[tuple[int, ...]]:
    planner = planning.Planner(planning.load(model))
    return [tuple(shape.tensor.shape) for shape in planner.shapes(torch.bfloat16) if shape.trained]


def _print(rows: list[StepTime], name: str, count: int, tensors: int, bandwidth: float) -> None:
    console = _output.console()
    of = f"{count:,} elements in {tensors} tensors"
    console.print(f"{name}, torch {torch.__version__}: {of}; copy {bandwidth / 1e9:.1f} GB/s")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in ("step, ms", "host, ms", "first, ms", "bytes a parameter", "share of copy"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row.title,
            f"{row.step_ms:.3f}",
            f"{row.host_ms:.3f}",
            f"{row.first_ms:.1f}",
            f"{row.bytes_held / count:.3f}",
            f"{100 * row.share_of_copy:.0f} %",
        )
    console.print(table)
    console.print("Bytes: weights, gradients, states. Copy: bytes that a step must move, at a copy's speed, are 100 %.")


__all__ = ["bench"]
