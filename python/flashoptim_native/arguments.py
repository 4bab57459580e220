"""What callers of torch.optim hand over: its own arguments at their neutral values, NumPy's numbers, strings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict


class MoreArguments(TypedDict, total=False):
    """What every constructor takes beside its own arguments: ``policy`` (docs/python_api.md, "Sensitive layers"), and
    ``offload``, ``offload_pin`` and ``offload_buffer`` (docs/offload.md).

    The others are torch.optim's, mean nothing here, and are taken at the values that ask nothing.
    """

    policy: Mapping[str, Mapping[str, Any]] | None
    offload: str | None
    offload_pin: bool
    offload_buffer: int
    amsgrad: bool
    foreach: bool | None
    differentiable: bool
    decoupled_weight_decay: bool


#: Values that ask nothing; the rest of the message where another is given.
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "amsgrad": ((False,), "the maximum of all variances is not kept"),
    "foreach": ((None, False), "there is one implementation, and it is fused"),
    "differentiable": ((False,), "a step is not recorded by autograd"),
}
#: Arguments of the whole optimizer, which a group cannot have of its own.
_OF_THE_OPTIMIZER = ("compress_state_dict", "check_numerics", "offload_pin", "offload_buffer")
TORCH_ARGUMENTS = (*_NEUTRAL, "decoupled_weight_decay", "fused")


def check_torch_argument(kind: str, name: str, value: Any) -> None:
    """Raises where an argument of torch.optim asks for something that is not there.

    Raises:
        ValueError: the value is not a neutral one.
        TypeError: ``fused`` is neither None nor a bool.
    """
    value = python_value(value)
    if name == "fused":
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"fused = {value!r} is a {type(value).__name__}; allowed are None, True and False")
        return
    if name == "decoupled_weight_decay":
        allowed: tuple[Any, ...] = (kind not in ("adam", "sgd"),)
        why = "whether the decay is decoupled is the class's: FlashAdamW's is, FlashAdam's is not"
    else:
        allowed, why = _NEUTRAL[name]
    if not any(value is one for one in allowed):
        raise ValueError(f"{name} = {value!r} is not allowed; allowed: {' or '.join(map(repr, allowed))} ({why})")


def check_torch_arguments(class_name: str, kind: str, arguments: Mapping[str, Any]) -> None:
    """Checks what a constructor was given beyond its own arguments.

    Raises:
        TypeError: an argument is not one of torch.optim's either.
        ValueError: one asks for something that is not there.
    """
    for name, value in arguments.items():
        if name not in TORCH_ARGUMENTS:
            raise TypeError(f"{class_name}() got an unexpected keyword argument {name!r}")
        check_torch_argument(kind, name, value)


def check_not_the_optimizers(name: str) -> None:
    """Raises ValueError where a group is given an argument of the whole optimizer."""
    if name in _OF_THE_OPTIMIZER:
        raise ValueError(
            f"{name} is the whole optimizer's and cannot be a group's; allowed is the constructor's {name}="
        )


def python_value(value: Any) -> Any:
    """A NumPy number as Python's, which ``torch.load(weights_only=True)`` reads; anything else as it is."""
    if type(value) in (float, int, bool, str) or value is None:
        return value
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        converted = [python_value(one) for one in value]
        return value if all(a is b for a, b in zip(value, converted)) else type(value)(converted)
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value


def parse_optimizer_arguments(arguments: str | Mapping[str, Any] | Iterable[str]) -> dict[str, Any]:
    """Arguments that a framework gives as strings, as the values that an optimizer's constructor takes.

    Args:
        arguments: ``"lr=1e-3,betas=(0.9, 0.95)"``; or such entries one by one, ``["lr=1e-3", "quantize=false"]``; or a
            mapping of names to values, of which strings are parsed and others stay (NumPy's numbers become Python's).

    Numbers, ``true`` and ``false``, ``none`` and ``null`` in any case, and tuples or lists of these in parentheses or
    brackets are parsed, quoted or not; any other word stays a string.

    Returns:
        Keyword arguments: ``FlashAdamW(params, **parse_optimizer_arguments(...))``. The constructor checks them.

    Raises:
        TypeError: ``arguments`` is none of these, or a name is not a string.
        ValueError: an entry is no ``name=value``, a name comes twice, or a parenthesis is not closed.
    """
    result: dict[str, Any] = {}
    for name, value in _pairs(arguments):
        if not name.isidentifier():
            raise ValueError(f"{name!r} is no name of an argument; allowed are entries name=value")
        if name in result:
            raise ValueError(f"{name} is given twice: {result[name]!r} and {value!r}; allowed is once")
        result[name] = _parsed(value) if isinstance(value, str) else python_value(value)
    return result


def _pairs(arguments: Any) -> list[tuple[str, Any]]:
    if isinstance(arguments, Mapping):
        for name in arguments:
            if not isinstance(name, str):
                raise TypeError(f"the name {name!r} is a {type(name).__name__}; allowed are strings")
        return [(name.strip(), value) for name, value in arguments.items()]
    entries = _split(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(entries, Iterable) or isinstance(entries, bytes):
        raise TypeError(
            f"arguments = {arguments!r} is a {type(arguments).__name__}; allowed are a string of name=value entries, "
            "an iterable of them, and a mapping"
        )
    pairs = []
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(f"the entry {entry!r} is a {type(entry).__name__}; allowed is a string name=value")
        name, equals, value = entry.partition("=")
        if not equals:
            raise ValueError(f"the entry {entry!r} is no name=value; values of several numbers are written (0.9, 0.95)")
        pairs.append((name.strip(), value))
    return pairs


def _split(text: str) -> list[str]:
    """The parts of ``text`` between commas that no parenthesis or bracket encloses; nothing of blank text."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if depth < 0:
            break
        if character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    if depth != 0:
        raise ValueError(f"{text!r} has a parenthesis without its other half")
    parts.append(text[start:])
    if not parts[-1].strip():  # (0.9,) and a comma at the end
        parts.pop()
    return parts


def _parsed(text: str) -> Any:
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1].strip()
    if text[:1] + text[-1:] in ("()", "[]"):
        return tuple(_parsed(part) for part in _split(text[1:-1]))
    word = text.lower()
    if word in ("none", "null"):
        return None
    if word in ("true", "false"):
        return word == "true"
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return text
    # "1_000" and "infinity" are numbers to float() alone.
    return number if math.isfinite(number) and "_" not in text else text


__all__ = ["parse_optimizer_arguments"]
