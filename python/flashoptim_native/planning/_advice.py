"""What a plan means: whether the optimizer's choice matters, and what would help where it does not."""

from __future__ import annotations

from collections.abc import Sequence

from ._models import PlanError
from ._plan import GIB, Planner, Row, Setting

#: Activations and temporaries dominate from this share of the peak on.
_DOMINATES = 0.5
#: Less than this share of the peak is nothing.
_NOTHING = 0.05


def advice(planner: Planner, rows: Sequence[Row], setting: Setting, card: int | None = None) -> list[str]:
    """Sentences for a person, the most important first; none where there is nothing to say.

    Says when choosing another optimizer saves little because activations dominate, and what helps then; traces a step
    with checkpointed blocks for that.
    """
    ours = [row for row in rows if row.choice.kind is not None]
    others = [row for row in rows if row.choice.kind is None and row.choice.title.endswith("bf16")]
    if not ours or not planner.has_step:
        return []
    best = min(ours, key=lambda row: row.total)
    lines = []
    step = _of_the_step(best)
    saved = max((row.total for row in others), default=best.total) - best.total
    if step >= _DOMINATES * best.total or saved < _NOTHING * best.total:
        share = 100 * step / best.total
        what = "saves nothing" if saved < _NOTHING * best.total else f"saves {saved / GIB:.2f} GiB and no more"
        lines.append(
            f"Activations and temporaries are {step / GIB:.2f} of {best.total / GIB:.2f} GiB ({share:.0f} %): beside "
            f"bf16 with another optimizer, the choice of optimizer {what}."
        )
        lines += _what_helps(planner, best, setting)
    released = [row for row in ours if row.choice.releases]
    kept = [row for row in ours if not row.choice.releases]
    if released and kept:
        gain = min(row.total for row in kept) - min(row.total for row in released)
        if gain < 0.01 * best.total:
            lines.append("Gradient release gains nothing here: the peak lies where most gradients are not there yet.")
    if card is not None and not best.fits(card):
        lines.append(f"Nothing of ours fits {card / GIB:g} GiB at batch {setting.batch}; {_smaller(setting)}.")
    return lines


def _of_the_step(row: Row) -> int:
    return sum(row.peak.parts.get(part, 0) for part in ("activations", "temporaries", "inputs"))


def _what_helps(planner: Planner, best: Row, setting: Setting) -> list[str]:
    lines = []
    if not setting.checkpoint:
        try:
            other = planner.row(best.choice, setting._replace(checkpoint=True))
        except PlanError as error:
            lines.append(f"Activation checkpointing could not be tried ({error}).")
        else:
            if other.total < (1 - _NOTHING) * best.total:
                lines.append(
                    f"--checkpoint helps: with blocks recomputed in the backward pass the peak is "
                    f"{other.total / GIB:.2f} GiB instead of {best.total / GIB:.2f}."
                )
    if best.peak.largest:
        one = best.peak.largest[0]
        lines.append(
            f"The most of it: {one.times} x {one.bytes / 2**20:,.0f} MiB by {one.operator}"
            + (_LOGITS if any(word in one.operator for word in ("log_softmax", "cross_entropy", "nll_loss")) else ".")
        )
    if setting.batch > 1:
        lines.append("A smaller batch with gradient accumulation takes less in proportion.")
    return lines


_LOGITS = ": the logits. A loss computed for some tokens at a time (chunked cross entropy) does not hold them all."


def _smaller(setting: Setting) -> str:
    ways = [] if setting.checkpoint else ["--checkpoint"]
    ways += ["a smaller --batch"] if setting.batch > 1 else ["shorter sequences or smaller pictures"]
    ways += ["--ranks N" if setting.ranks == 1 else "more ranks"]
    return "try " + ", ".join(ways)


__all__ = ["advice"]
