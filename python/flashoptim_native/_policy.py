"""``policy={pattern: options}``: options of a group for the parameters whose names match."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from . import _validate
from .arguments import python_value

#: Keys of a group that a policy cannot set.
_NOT_OPTIONS = ("params", "param_names", "decay_lr", "initial_lr")


class Policy:
    """Patterns (``fnmatch``, for full names) and the options of a group that they stand for.

    Options of all patterns that match a name apply; where two set the same, the later one's does.
    """

    def __init__(self, patterns: Any, kind: str, defaults: Mapping[str, Any]) -> None:
        """
        Raises:
            TypeError: ``patterns`` is no mapping of strings to mappings.
            ValueError: an option is none of a group's, or has a value that is not allowed.
        """
        if not isinstance(patterns, Mapping):
            raise TypeError(f"policy = {patterns!r} is a {type(patterns).__name__}; allowed is {{pattern: options}}")
        allowed = [name for name in defaults if name not in _NOT_OPTIONS]
        self.patterns: dict[str, dict[str, Any]] = {}
        for pattern, options in patterns.items():
            if not isinstance(pattern, str) or not isinstance(options, Mapping):
                raise TypeError(f"policy[{pattern!r}] = {options!r}; allowed are a pattern and a dict of options")
            for name in options:
                if name not in allowed:
                    raise ValueError(
                        f"policy[{pattern!r}] sets {name!r}, which is no option of a group; allowed are "
                        f"{', '.join(sorted(allowed))}"
                    )
            self.patterns[pattern] = {name: python_value(value) for name, value in options.items()}
            try:
                _validate.check_hyperparameters(kind, {**defaults, **self.patterns[pattern]})
                _validate.check_format({**defaults, **self.patterns[pattern]})
            except (TypeError, ValueError) as error:
                raise type(error)(f"policy[{pattern!r}]: {error}") from error
        self.matched: set[str] = set()

    def split(self, group: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A group of named parameters as groups with equal options, in the order in which each first appears.

        Raises:
            ValueError: a parameter has no name.
        """
        params = group["params"]
        items = [params] if isinstance(params, Tensor) or not isinstance(params, Iterable) else list(params)
        parts: dict[str, dict[str, Any]] = {}
        for item in items:
            if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
                raise ValueError(
                    "policy goes by the names of parameters, and one has none; allowed are pairs of name and "
                    "parameter, as model.named_parameters() gives them"
                )
            options: dict[str, Any] = {}
            for pattern, wanted in self.patterns.items():
                if fnmatchcase(item[0], pattern):
                    self.matched.add(pattern)
                    options.update(wanted)
            part = parts.setdefault(repr(sorted(options.items())), {**group, **options, "params": []})
            part["params"].append(item)
        return list(parts.values()) or [dict(group, params=[])]


__all__ = ["Policy"]
