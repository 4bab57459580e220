"""Wrong calls of everything public: a documented exception that names the argument, and nothing changed.

The calls are made from signatures, and the wrong values stand in a table by the argument's name: a new function or
argument that the table does not know fails the first test.
"""

from __future__ import annotations

import inspect
import re
import warnings

import pytest
import torch

import flashoptim_native
from attacks import DOCUMENTED, everything, small
from helpers import CLASSES, HYPERS, make_params, set_grads

NAN, INF = float("nan"), float("inf")
NO_TENSORS = [None, 5, "weights", [1], {}, object()]
NO_NUMBERS = [
    None,
    "x",
    [1],
    {},
    2j,
    True,
    object(),
    NAN,
    INF,
    -INF,
    torch.zeros(2),
    torch.tensor(1),
    torch.tensor(NAN),
]
NO_BOOLS = [None, 0, 1, "True", 1.0, [], torch.tensor(True)]
BAD_TENSORS = [
    torch.zeros(3, device="meta"),
    torch.zeros(3).to_sparse(),
    torch.zeros(3, dtype=torch.complex64),
    torch.zeros(3, dtype=torch.float64),
    torch.zeros(3, dtype=torch.int64),
    torch.zeros(7, 7),
]
FLAWED_LAYERS = ["head", torch.nn.ReLU(), 5, [5], [None], [torch.zeros(1)], [["head"]]]
BAD_DICTS = [None, 5, "state", [], [1], torch.zeros(2), object()]

#: By name of an argument or of a group's option: values that are not allowed.
WRONG = {
    "states": [None, 0, True, "cpu", "disk", "", ["host"], b"host", object()],
    "reduce": [None, 0, 1, "yes", [], object()],
    "lr": [*NO_NUMBERS, -1.0],
    "betas": [None, 0.9, "x", (0.9,), (0.9,) * 4, (1.0, 0.5), (0.5, 1.0), (-0.1, 0.5), (NAN, 0.5), ("a", 0.5), {}],
    "alpha": ["x", [1], {}, NAN, INF, -1.0],
    "t_alpha": ["x", [1], {}, NAN, -1.0],
    "t_beta3": ["x", [1], {}, NAN, -1.0],
    "eps": [*NO_NUMBERS, -1e-8],
    "weight_decay": [*NO_NUMBERS, -0.1],
    "momentum": [*NO_NUMBERS, -0.1],
    "dampening": NO_NUMBERS,
    "nesterov": [*NO_BOOLS, True],
    "decouple_lr": NO_BOOLS,
    "maximize": NO_BOOLS,
    "quantize": NO_BOOLS,
    "compress_state_dict": NO_BOOLS,
    "check_numerics": NO_BOOLS,
    "capturable": NO_BOOLS,
    "stochastic_rounding": [*NO_BOOLS, True],
    "fused": ["x", 0, 1.0, []],
    "master_weight_bits": [0, 8, 16, 23, "24", 24.5, True, [], NAN],
    "state_codec": [None, "", "fp8", 1, True, ["paper"]],
    "min_quantized_numel": [None, -1, 1.5, "x", True, NAN, [1]],
    "seed": [None, -1, 2**53, 0.5, "x", True, NAN, [1]],
    "params": [None, 5, "params", [], [5], torch.nn.Parameter(torch.zeros(3)), [torch.zeros(3, dtype=torch.float64)],
               [torch.zeros(3).to_sparse()], [{"params": [5]}], [{"lr": 1.0}]],
    "param_group": [None, 5, "x", [], {}, {"lr": 1.0}, {"params": [5]}, {"params": None}],
    "closure": [5, "x", [], torch.zeros(1)],
    "p": [*NO_TENSORS, torch.nn.Parameter(torch.zeros(3))],
    "max_norm": [*NO_NUMBERS, 0.0, -1.0],
    "state_dict": BAD_DICTS,
    "fp32_state_dict": BAD_DICTS,
    "verify": NO_BOOLS,
    "strict": NO_BOOLS,
    "model": [None, 5, "model", torch.zeros(3), [torch.nn.Linear(2, 2)]],
    "optimizers": [None, 5, "x", torch.nn.Linear(2, 2)],
    "dtype": [None, 16, "bfloat16", torch.float64, torch.int8, torch.complex64],
    "selective": NO_BOOLS,
    "full_precision_layers": FLAWED_LAYERS,
    "full_precision_recast_layers": FLAWED_LAYERS,
    "param": [*NO_TENSORS, *BAD_TENSORS],
    "narrow_param": [*NO_TENSORS, *BAD_TENSORS],
    "fp32_param": [*NO_TENSORS, *BAD_TENSORS],
    "error_bits": [*NO_TENSORS, *BAD_TENSORS],
    "master_bytewidth": [None, 0, 2, 5, "3", 3.5, True, [], NAN],
    "model_or_params": [None, 5, "model", [], [5], {}, torch.zeros(3, requires_grad=True)],
    "optimizer": [None, 5, "x", torch.nn.Linear(2, 2)],
    "grad_scaler": [5, "x", torch.nn.Linear(2, 2), torch.amp.GradScaler("cpu", enabled=True)],
    "pre_step": [5, "x", []],
    "cast_buffers": [5, "inv_freq", [5], [None]],
    "tensor": [*NO_TENSORS, torch.zeros(2, 2), torch.zeros(8)[::2]],
    "whole_shape": [None, 5, "x", ["a"], [-1, 4], [1.5], [2]],
    "first_element": [None, -1, 1.5, "x", 100, True],
    "clip": [5, "global", True, ["two_pass"], NAN],
    "norm_decay": [None, "x", -0.1, 1.5, NAN, True, [1]],
    "full_state_dict": NO_BOOLS,
    "broadcast_from_rank0": NO_BOOLS,
    "ignore_existing_hooks": NO_BOOLS,
    "lost": [*NO_NUMBERS, -1.0],
    "floored": [*NO_NUMBERS, -1.0],
    "ratio": [*NO_NUMBERS, -1.0],
    "arguments": [None, 5, "lr", "lr=(1", "1x=2", "lr=1,lr=2", [5], {5: 1}, object()],
}  # fmt: skip
#: Arguments that take everything: as torch's own, or not looked at.
FREE = {
    "set_to_none": "any truth value, as torch's",
    "group": "not looked at",
    "func": "torch's",
    "defaults": "the subclass's",
}
#: How a message may call an argument.
CALLED = {
    "clip": "clip|max_norm",
    "norm_decay": "norm_decay|clip",
    "whole_shape": "whole_shape|first_element",
    "arguments": "argument|entr|given twice|parenthesis|closed|name",
    "params": "param|optimizer got an empty|iterable|tensor",
    "param_group": "param|group|iterable|tensor|Tensor",
    "optimizers": "optimizer",
    "state_dict": "state",
    "fp32_state_dict": "state_dict",
    "p": "^p is|parameter",
    "narrow_param": "narrow_param|fp32_param",
    "param": "param|error_bits",
    "nesterov": "nesterov",
    "model_or_params": "model_or_params|optimizer",
    "stochastic_rounding": "stochastic_rounding",
}


#: Where None is the default though the table says that it is wrong elsewhere.
ALLOWED_NONE = {("cast_model", "optimizer"), ("enable_gradient_release", "max_norm")}


class Subject:
    """An optimizer and a model of its own, and one good value for every argument."""

    def __init__(self, kind="adamw"):
        torch.manual_seed(1)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)).to(torch.bfloat16)
        self.optimizer = CLASSES[kind](self.model.parameters(), min_quantized_numel=0, **HYPERS[kind])
        for p in self.model.parameters():
            p.grad = torch.full_like(p, 0.1)
        self.optimizer.step()
        self.good = {
            "model": self.model,
            "param": torch.zeros(3, dtype=torch.bfloat16),
            "narrow_param": torch.zeros(3, dtype=torch.bfloat16),
            "fp32_param": torch.zeros(3),
            "error_bits": torch.zeros(3, dtype=torch.int8),
            "model_or_params": self.model,
            "optimizer": self.optimizer,
            "fp32_state_dict": {},
            "state_dict": {},
            "p": self.model[0].weight,
            "max_norm": 1.0,
            "param_group": {},
            "tensor": torch.zeros(4),
            "whole_shape": [2, 4],
            "first_element": 0,
            "arguments": "lr=1",
        }


def signature_of(function):
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD]


FUNCTIONS = {
    name: getattr(flashoptim_native, name)
    for name in flashoptim_native.__all__
    if inspect.isfunction(inspect.unwrap(getattr(flashoptim_native, name)))
}
METHODS = {
    name: function
    for cls in flashoptim_native.FlashOptimizer.__mro__
    if cls.__module__.startswith("flashoptim_native")
    for name, function in vars(cls).items()
    if not name.startswith("_") and inspect.isfunction(function)
}
CONSTRUCTORS = {
    name: value
    for name in flashoptim_native.__all__
    if inspect.isclass(value := getattr(flashoptim_native, name))
    and issubclass(value, flashoptim_native.FlashOptimizer)
    and value is not flashoptim_native.FlashOptimizer
}
CALLS = [
    (where, name, parameter.name)
    for where, functions in (("function", FUNCTIONS), ("method", METHODS), ("constructor", CONSTRUCTORS))
    for name, function in functions.items()
    for parameter in signature_of(function)
    if parameter.name not in FREE
]


def test_every_argument_of_everything_public_is_in_the_table():
    unknown = {f"{name}({argument})" for _, name, argument in CALLS if argument not in WRONG}
    assert not unknown, f"WRONG of {__file__} has no values for {sorted(unknown)}"
    assert len(FUNCTIONS) >= 8 and len(METHODS) >= 14 and len(CONSTRUCTORS) >= 5 and len(CALLS) > 100


def call(where, name, argument, value, subject):
    if where == "constructor":
        first = value if argument == "params" else make_params()
        return CONSTRUCTORS[name](first, **({} if argument == "params" else {argument: value}))
    function = FUNCTIONS[name] if where == "function" else getattr(subject.optimizer, name)
    positional, named = [], {}
    for parameter in signature_of(function):
        given = value if parameter.name == argument else subject.good.get(parameter.name)
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += [value] if parameter.name == argument else []
        elif parameter.name == argument or parameter.default is parameter.empty:
            if parameter.kind is parameter.KEYWORD_ONLY:
                named[parameter.name] = given
            else:
                positional.append(given) if not named and parameter.default is parameter.empty else named.update(
                    {parameter.name: given}
                )
    return function(*positional, **named)


def outcome_of(action, subject, argument, what, tally):
    before = everything(subject.optimizer)
    attributes = sorted(vars(subject.optimizer))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action()
    except DOCUMENTED as error:
        if everything(subject.optimizer) != before or sorted(vars(subject.optimizer)) != attributes:
            return tally.find(f"changed something: {what}")
        if not re.search(CALLED.get(argument, argument), str(error)):
            return tally.find(f"does not name {argument}: {type(error).__name__}: {error}: {what}")
        return tally.count("refused")
    except BaseException as error:
        return tally.find(f"{type(error).__name__}: {error}: {what}")
    return tally.find(f"accepted: {what}")


@pytest.mark.parametrize(("where", "name", "argument"), CALLS)
def test_wrong_arguments(where, name, argument, tally):
    subject = Subject()
    for value in WRONG[argument]:
        if name == "reset_corrections" and (value is None or value == []):
            continue  # all of them, and none
        if value is None and (name, argument) in ALLOWED_NONE:
            continue
        what = f"{name}({argument}={value!r})"[:120]
        outcome_of(lambda value=value: call(where, name, argument, value, subject), subject, argument, what, tally)


OPTIONS = [
    (kind, key)
    for kind in CLASSES
    for key in inspect.signature(CLASSES[kind]).parameters
    if key in WRONG and key not in ("params", "compress_state_dict", "check_numerics", "fused")
]


@pytest.mark.parametrize(("kind", "option"), OPTIONS)
def test_wrong_options_of_groups(kind, option, tally):
    subject = Subject(kind)
    group = subject.optimizer.param_groups[0]
    good = group[option]
    for value in WRONG[option]:
        group[option] = value
        try:
            outcome_of(subject.optimizer.step, subject, option, f"group[{option!r}] = {value!r}", tally)
        finally:
            group[option] = good
        new = {"params": make_params(shapes=[(3,)]), option: value}
        outcome_of(lambda new=new: subject.optimizer.add_param_group(new), subject, option, f"add {value!r}", tally)
    before = subject.optimizer.state[subject.model[0].weight]["step"]
    subject.optimizer.step()
    assert subject.optimizer.state[subject.model[0].weight]["step"] == before + 1


def test_calls_in_a_wrong_order(tally):
    params, optimizer = small()
    handle = flashoptim_native.enable_gradient_release(params, optimizer)
    with pytest.raises(RuntimeError, match="enabled for this optimizer already"):
        flashoptim_native.enable_gradient_release(params, optimizer)
    handle.remove()
    handle.remove()
    with handle.accumulate():
        pass
    assert not handle.active
    set_grads(params, 1)
    optimizer.step()
    optimizer.state[torch.zeros(3)] = {}
    with pytest.raises(ValueError, match="which is in no group"):
        optimizer.state_dict()
    tally.counts["tried"] += 5


def test_fp32_weights_are_checked_for_all_before_any_is_set(tally):
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)).to(torch.bfloat16)
    a = flashoptim_native.FlashAdamW(model[0].parameters(), min_quantized_numel=0)
    b = flashoptim_native.FlashLion(model[1].parameters(), min_quantized_numel=0)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.1)
    a.step()
    good = {key: value.detach().float() + 1.0 for key, value in model.state_dict().items()}
    for key in good:
        bad = [good[key].to("meta"), good[key].to_sparse(), good[key][:1], good[key].double(), None, "x",
               good[key].to(torch.complex64)]  # fmt: skip
        for value in bad:
            before = everything(a), everything(b)
            with pytest.raises((ValueError, TypeError), match=key):
                flashoptim_native.set_fp32_model_state_dict(model, {**good, key: value}, a, b)
            same = (everything(a), everything(b)) == before
            tally.count("refused") if same else tally.find(f"{key} = {value!r} changed something")
    for wrong in (torch.optim.SGD(model.parameters(), lr=0.1), None, "x"):
        before = everything(a), everything(b)
        with pytest.raises(TypeError, match="an optimizer is a"):
            flashoptim_native.set_fp32_model_state_dict(model, good, a, wrong, b)
        same = (everything(a), everything(b)) == before
        tally.count("refused") if same else tally.find("a wrong optimizer changed something")
    # A state that cannot be converted comes to light after others have been made.
    b.state[model[1].bias] = {"exp_avg": torch.zeros(9), "step": 1}
    before = everything(a), everything(b)
    with pytest.raises(ValueError, match="exp_avg"):
        flashoptim_native.set_fp32_model_state_dict(model, good, a, b)
    assert (everything(a), everything(b)) == before
    tally.count("refused")
