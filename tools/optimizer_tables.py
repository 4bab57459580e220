"""The tables of optimizers in the documentation, from what the rules say of themselves.

A table stands between `<!-- optimizers: NAME -->` and `<!-- /optimizers -->`. tests/python/test_optimizer_tables.py
compares them; usage after a change of rules, with the package importable: optimizer_tables.py --write
"""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path

from flashoptim_native import _ops, optimizers

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/python_api.md", "docs/state_format.md")
CLASSES = {kind: getattr(optimizers, f"Flash{_ops.describe(kind).title}") for kind in _ops.optimizer_names()}


def parameters(kind):
    return inspect.signature(CLASSES[kind]).parameters


def needs_momentum(kind):
    return len(_ops.state_names(kind, False)) < len(_ops.state_names(kind, True))


def table(*rows):
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join((head, "|" + "---|" * len(rows[0]), *body))


def number(value):
    """1e-8, 0.9999, None: as people write them."""
    if isinstance(value, tuple):
        return f"({', '.join(map(number, value))})"
    if value is None or isinstance(value, bool):
        return str(value)
    digits, _, exponent = f"{value:.10e}".partition("e")
    short = f"{float(digits):g}e{int(exponent)}"
    return short if 0 < value < 1e-2 else f"{value:g}"


def bytes_table():
    """Of weights, gradients and states with scales, by the number of states."""
    by_slots = {}
    for kind in CLASSES:
        title = _ops.describe(kind).title + (" with momentum" if needs_momentum(kind) else "")
        by_slots.setdefault(len(_ops.state_names(kind, True)), []).append(title)
    rows = [("bytes a parameter, gradient included", "fp32", "flashoptim, 24-bit weights", "with gradient release")]
    for slots, titles in by_slots.items():
        small = 2 + 2 + 1 + slots * (1 + 2 / 32)
        rows.append((", ".join(titles), f"{8 + 4 * slots}", f"**{small:.6g}**", f"{small - 2:.6g}"))
    return table(*rows)


def classes_table():
    rows = [("class", "what it is", "decay", "states")]
    for kind, cls in CLASSES.items():
        what = inspect.cleandoc(cls.__doc__).splitlines()[0].rstrip(".")
        states = ", ".join(f"`{name}`" for name in _ops.state_names(kind, True))
        states += " where momentum != 0" if needs_momentum(kind) else ""
        rows.append((f"`{cls.__name__}`", what, "decoupled" if "decouple_lr" in parameters(kind) else "L2", states))
    return table(*rows)


def hyperparameters_table():
    """What rules read, by the argument's name: whose it is, its defaults and what is allowed."""
    rows = [("argument", "of", "default", "allowed")]
    found = {}
    for kind in CLASSES:
        for one in _ops.describe(kind).hyperparameters:
            name = "betas" if one.name.removeprefix("beta").isdigit() else one.name
            if name in parameters(kind) and name not in ("maximize", "seed"):
                found.setdefault(name, {})[kind] = one
    for name, kinds in found.items():
        titles = [_ops.describe(kind).title for kind in kinds]
        of = "all" if len(kinds) == len(CLASSES) else ", ".join(titles)
        by_default = {}
        for kind, title in zip(kinds, titles):
            by_default.setdefault(number(parameters(kind)[name].default), []).append(title)
        most = max(by_default, key=lambda default: len(by_default[default]))
        defaults = [most, *(f"{', '.join(t)}: {d}" for d, t in by_default.items() if d != most)]
        rows.append((f"`{name}`", of, "; ".join(defaults), allowed(name, next(iter(kinds.values())))))
    return table(*rows)


def allowed(name, one):
    if one.kind == "flag":
        return "True, False"
    if name == "betas":
        return "each 0 <= beta < 1"
    if one.kind == "whole":
        return f"None, or a whole number >= {one.lowest:g}"
    return "finite" if one.lowest < 0 else f"finite, >= {one.lowest:g}"


def states_table():
    """Every state by name: whose it is, and how the default codec stores it."""
    rows = [("state", "of", "sign", "in the `default` codec relative to", "K", "G")]
    found = {}
    for kind in CLASSES:
        description = _ops.describe(kind)
        for slot in description.slots:
            base = f"the root of `{description.slots[slot.relative_to].name}`" if slot.relative_to >= 0 else "its group"
            bits = (str(slot.mantissa_bits) if slot.mantissa_bits else "3 to 6") if slot.is_signed else ""
            row = ("signed" if slot.is_signed else "unsigned", base if slot.is_signed else "its group", bits)
            row += (("a power of two" if slot.is_slow else "rounded up") if slot.is_signed else "",)
            found.setdefault((slot.name, *row), []).append(description.title)
    rows += [(f"`{name}`", ", ".join(titles), *row) for (name, *row), titles in found.items()]
    return table(*rows)


TABLES = {
    "bytes": bytes_table,
    "classes": classes_table,
    "hyperparameters": hyperparameters_table,
    "states": states_table,
}


def written(text):
    """The document with its tables as they should be."""
    return re.sub(
        r"(<!-- optimizers: (\w+) -->\n\n).*?(\n\n<!-- /optimizers -->)",
        lambda found: found[1] + TABLES[found[2]]() + found[3],
        text,
        flags=re.DOTALL,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into the documents")
    write = parser.parse_args().write
    for name in DOCUMENTS:
        document = ROOT / name
        text = document.read_text()
        if written(text) != text:
            print(f"{name} is not as its rules say" + (": written" if write else ""))
            if write:
                document.write_text(written(text))


if __name__ == "__main__":
    main()
