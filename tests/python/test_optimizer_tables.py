"""Tables of optimizers in the documentation, and signatures in Python, are as the rules say."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

import pytest

from flashoptim_native import _ops
from helpers import CLASSES

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("optimizer_tables", ROOT / "tools" / "optimizer_tables.py")
optimizer_tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(optimizer_tables)


@pytest.mark.parametrize("name", optimizer_tables.DOCUMENTS)
def test_tables_of_the_documentation(name):
    text = (ROOT / name).read_text()
    assert "<!-- optimizers: " in text
    assert optimizer_tables.written(text) == text, f"run tools/optimizer_tables.py --write ({name})"


@pytest.mark.parametrize("kind", CLASSES)
def test_defaults_are_the_rules(kind):
    """Every hyperparameter is an argument, at the rule's default; None stands for 0."""
    parameters = inspect.signature(CLASSES[kind]).parameters
    for one in _ops.describe(kind).hyperparameters:
        if one.name in ("step", "decay_lr"):  # the optimizer's own; decouple_lr says whether there is a decay_lr
            continue
        if one.name.removeprefix("beta").isdigit():
            default = parameters["betas"].default[int(one.name[4:]) - 1]
        else:
            default = parameters[one.name].default
        assert (default or 0) == one.default, one.name
        if one.kind == "number":
            assert isinstance(default, float), one.name


def test_every_optimizer_has_a_class():
    import flashoptim_native

    for kind in _ops.optimizer_names():
        cls = getattr(flashoptim_native, f"Flash{_ops.describe(kind).title}")
        assert cls.kind == kind
        assert cls.__name__ in flashoptim_native.__all__
