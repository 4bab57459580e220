"""Hostile state dicts: refused with the entry's name before any change, or loaded as documented, sharing nothing."""

from __future__ import annotations

import collections
import copy
import warnings

import pytest
import torch

from attacks import DOCUMENTED, IS_LONG, contents, everything, is_finite, plain, small
from helpers import CLASSES, run

NAN, INF = float("nan"), float("inf")


class Odd:
    """Cannot be copied."""

    def __deepcopy__(self, memo):
        raise KeyError("no copies")


class Wrapper(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("nobody asks")


def wrapper(tensor):
    return torch.Tensor._make_wrapper_subclass(Wrapper, tensor.shape, dtype=tensor.dtype)


def without_memory(tensor):
    copied = tensor.clone()
    copied.untyped_storage().resize_(1)
    return copied


def deep(levels=5000):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def circle():
    value = {}
    value["again"] = value
    return value


#: Values that stand in no entry of a state or group.
NOTHINGS = [
    ("a string", lambda old: "nonsense"),
    ("a list", lambda old: [1, 2]),
    ("an object", lambda old: Odd()),
    ("a number", lambda old: 1e300),
    ("a dict", lambda old: {"a": 1}),
    ("a circle", lambda old: circle()),
]
#: What an array can become.
ARRAYS = [
    ("a row less", lambda old: old[:-1]),
    ("a dimension more", lambda old: old.unsqueeze(0)),
    ("no dimension", lambda old: old.flatten()[0]),
    ("empty", lambda old: old.new_empty(0)),
    ("float64", lambda old: old.double()),
    ("int64", lambda old: old.long()),
    ("bool", lambda old: old.bool()),
    ("complex", lambda old: old.to(torch.complex64)),
    ("meta", lambda old: old.to("meta")),
    ("sparse", lambda old: old.to_sparse()),
    ("expanded", lambda old: old.flatten()[:1].expand(old.numel()).view(old.shape) if old.dim() else old),
    ("a wrapper", wrapper),
    ("without memory", without_memory),
    ("none", lambda old: None),
]
FLOATS = [
    ("NaN", lambda old: torch.full_like(old, NAN)),
    ("infinite", lambda old: torch.full_like(old, INF)),
    ("one NaN", lambda old: old.index_put((torch.tensor([0]),), torch.tensor(NAN))),
    ("minus infinity", lambda old: torch.full_like(old, -INF)),
]
STEPS = [-1, -1.0, 1.5, NAN, INF, -INF, 2**53, 2**70, 2.0**60, True, False, "3", b"3", [3], (3,), {}, 3j]
STEP_TENSORS = [
    torch.tensor([1, 2]),
    torch.empty(0),
    torch.tensor(True),
    torch.tensor(3j),
    torch.tensor(NAN),
    torch.tensor(2**60),
    torch.tensor(3, device="meta"),
    torch.tensor([3]).to_sparse(),
    torch.tensor(-2),
    torch.tensor(0.5),
]


#: What load_state_dict(verify=False) takes: values in another floating-point dtype or layout, scales of version 1 (a
#: row for each first dimension), states without correction as torch's are, entries that mean nothing to us.
TAKEN = (
    "exp_avg]: float64",
    "exp_avg_sq]: float64",
    "exp_avg_slow]: float64",
    "momentum_buffer]: float64",
    ": expanded",
    "_scale]: a dimension more",
    "correction]: none",
    "dampening = -1.0",
    "sq_scale]: headers",
)


def set_entry(number, key, change):
    def apply(state_dict):
        held = state_dict["state"][number]
        held[key] = change(held.get(key))

    return apply


def drop_entry(number, key):
    return lambda state_dict: state_dict["state"][number].pop(key)


def hostile(saved):
    """(name, change of a state dict, must it be refused?) for every entry of a sound one."""
    for number, held in saved["state"].items():
        for key, value in held.items():
            where = f"state[{number}][{key}]"
            changes = list(NOTHINGS)
            if key == "step":
                changes += [(f"step {step!r}", lambda old, step=step: step) for step in STEPS]
                changes += [(f"step {step!r}", lambda old, step=step: step) for step in STEP_TENSORS]
            else:
                changes += ARRAYS
                if value.is_floating_point():
                    changes += FLOATS
                if key.endswith("_scale"):
                    is_half = saved["state"][number].get("exp_avg_codes", value).dtype == torch.int8
                    for scale in (NAN, INF, -1.0) if is_half else ():
                        pattern = torch.tensor(scale, dtype=torch.float16)
                        changes.append((f"scale {scale}", lambda old, p=pattern: torch.full_like(
                            old.view(torch.float16), p.item()).view(torch.uint8)))  # fmt: skip
                    if not is_half:
                        changes.append(("headers 0xffff", lambda old: torch.full_like(old, 0xFF)))
                if key == "correction":
                    changes.append(("-128", lambda old: torch.full_like(old, -128)))
                if key == "exp_avg_sq":
                    changes.append(("negative", lambda old: -old - 1.0))
            for name, change in changes:
                yield f"{where}: {name}", set_entry(number, key, change)
            if key != "correction":
                yield f"{where}: missing", drop_entry(number, key)
        for odd in (7, None, ("a", 1), b"step", 1.5):
            yield f"state[{number}]: key {odd!r}", set_entry(number, odd, lambda old: torch.zeros(2))
        for foreign in ("momentum_buffer", "exp_avg_codes::x", "error_bits", "exp_avg_sq", "exp_avg"):
            if foreign not in held:
                yield f"state[{number}]: foreign {foreign}", set_entry(number, foreign, lambda old: torch.zeros(2))
        for value in (None, 5, "state", [1], torch.zeros(3), Odd()):
            yield f"state[{number}] = {type(value).__name__}", lambda d, n=number, v=value: d["state"].update({n: v})
    for odd in ("0", "extra", 99, -1, None, 0.5, (0,), torch.zeros(1), Odd()):
        yield f"state[{odd!r}]", lambda d, odd=odd: d["state"].update({odd: d["state"][0]})
    for key in ("state", "param_groups"):
        yield f"no {key}", lambda d, key=key: d.pop(key)
        for value in (None, 5, "abc", torch.zeros(2), Odd(), iter(())):
            yield f"{key} = {type(value).__name__}", lambda d, key=key, value=value: d.update({key: value})
    yield "no groups", lambda d: d.update(param_groups=[])
    yield "a group more", lambda d: d["param_groups"].append(d["param_groups"][0])
    yield "a parameter more", lambda d: d["param_groups"][0]["params"].append(99)
    yield "a parameter less", lambda d: d["param_groups"][0]["params"].pop()
    yield "a parameter twice", lambda d: d["param_groups"][0]["params"].__setitem__(1, 0)
    yield "no params", lambda d: d["param_groups"][0].pop("params")
    for params in (None, 5, "012", torch.arange(3), [[0], [1], [2]], [0, None, 1], {0: 0, 1: 1, 2: 2}):
        yield f"params {params!r}", lambda d, p=params: d["param_groups"][0].update(params=p)
    for value in (None, 5, "group", [1], Odd()):
        yield f"a group = {value!r}", lambda d, v=value: d["param_groups"].__setitem__(0, v)
    for key in saved["param_groups"][0]:
        if key in ("lr", "betas", "eps", "weight_decay", "momentum", "dampening"):
            yield f"no {key}", lambda d, key=key: d["param_groups"][0].pop(key)
            bad = (None, "x", NAN, INF, -1.0, True, [1], {}, torch.zeros(2), torch.tensor(NAN), Odd(), 2j)
        elif key.startswith("flashoptim_native."):
            bad = (None, 5, torch.zeros(3), torch.zeros(512, dtype=torch.uint8), torch.zeros(2, 2), "json", Odd())
        elif key in ("seed", "maximize", "nesterov", "decouple_lr"):
            bad = (None, "x", NAN, -1, 2**60, [1], Odd())
        else:
            continue
        for value in bad:
            yield f"{key} = {value!r}", lambda d, key=key, value=value: d["param_groups"][0].update({key: value})
    yield "a group's odd extra", lambda d: d["param_groups"][0].update(odd=Odd())
    yield "a group of another optimizer", lambda d: d["param_groups"][0].update({"flashoptim_native.foo.2": 1})
    weights = "flashoptim_native.weights"
    if weights in saved:
        for value in (5, "x", torch.zeros(3), torch.zeros(9, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64)):
            yield f"{weights} = {value!r}", lambda d, value=value: d.update({weights: value})


#: Of the short form: of each case every n-th change, others in the next case.
SHORT_STRIDE = 6
OPTIONS = [{}, {"state_codec": "paper"}, {"quantize": False}]


def sampled(changes, kind, options, verify):
    case = (list(CLASSES).index(kind) * len(OPTIONS) + OPTIONS.index(options)) * 2 + verify
    return (c for n, c in enumerate(changes) if IS_LONG or n % SHORT_STRIDE == case % SHORT_STRIDE)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", CLASSES)
def test_hostile_dicts_are_refused_by_name(kind, options, verify, tally):
    _, source = small(kind, steps=3, **options)
    saved = copy.deepcopy(source.state_dict())
    params, optimizer = small(kind, steps=1, **options)
    before = everything(optimizer)
    for name, change in sampled(hostile(saved), kind, options, verify):
        attacked = {**saved, "param_groups": [{**g, "params": list(g["params"])} for g in saved["param_groups"]]}
        attacked["state"] = {number: dict(held) for number, held in saved["state"].items()}
        change(attacked)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.load_state_dict(attacked, verify=verify)
        except DOCUMENTED as error:
            if everything(optimizer) != before:
                tally.find(f"changed something: {name}")
            elif type(error) not in DOCUMENTED or len(str(error)) < 25:
                tally.find(f"{type(error).__name__}: {error}: {name}")
            else:
                tally.count("refused")
            continue
        except BaseException as error:
            tally.find(f"{type(error).__name__}: {error}: {name}")
            params, optimizer = small(kind, steps=1, **options)
            before = everything(optimizer)
            continue
        run(optimizer, params, 5, 6)
        if not is_finite(optimizer):
            tally.find(f"weights are not finite: {name}")
        elif any(part in name for part in TAKEN):
            tally.count("taken as documented")
        else:
            tally.find(f"accepted: {name}")
        params, optimizer = small(kind, steps=1, **options)
        before = everything(optimizer)


@pytest.mark.parametrize("theirs", ["RMSprop", "Adagrad", "Adamax", "Adadelta", "ASGD", "Rprop", "SGD", "AdamW"])
@pytest.mark.parametrize("kind", CLASSES)
def test_dicts_of_other_optimizers(kind, theirs, tally):
    """Those of the counterpart load; every other is refused, with or without a step behind it."""
    goes = {("adamw", "AdamW"), ("adam", "AdamW"), ("sgd", "SGD"), ("sgdw", "SGD")}
    options = {"momentum": 0.9} if theirs == "SGD" else {}
    for steps in (0, 2):
        params, _ = small(kind, steps=0)
        other = getattr(torch.optim, theirs)(params, lr=0.01, **options)
        run(other, params, 0, steps)
        _, optimizer = small(kind, steps=1)
        before = everything(optimizer)
        try:
            optimizer.load_state_dict(other.state_dict())
        except DOCUMENTED:
            outcome = "refused" if everything(optimizer) == before else "changed"
        else:
            outcome = "taken"
        wanted = "taken" if (kind, theirs) in goes else "refused"
        if outcome == wanted:
            tally.count(outcome)
        elif steps == 2 or outcome == "changed":
            tally.find(f"{theirs} behind {steps} steps is {outcome}")
        else:
            tally.count(outcome)  # without states hyperparameters alone are taken, where their names are the same


@pytest.mark.parametrize("kind", CLASSES)
def test_a_loaded_optimizer_shares_no_memory_with_the_dict(kind, tally):
    _, source = small(kind, steps=2, quantize=False)
    saved = source.state_dict()
    saved["param_groups"][0]["own_list"] = [1, [2, torch.ones(3)]]
    saved["param_groups"][0]["lr"] = torch.tensor(0.25)
    saved["state"][0]["own_tensor"] = torch.ones(4)
    saved["state"][0]["own_list"] = [torch.ones(2), {"a": torch.ones(1)}]
    params, optimizer = small(kind, steps=0, quantize=False)
    with pytest.warns(UserWarning, match="own_list"):
        optimizer.load_state_dict(saved, verify=False)

    def tensors(value, found):
        if isinstance(value, torch.Tensor):
            found.append(value.untyped_storage().data_ptr())
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
            tensors(item, found)
        return found

    loaded = [dict(optimizer.state[p]) for p in params] + [
        {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
    ]
    theirs = set(tensors([saved["state"], saved["param_groups"]], []))
    for address in tensors(loaded, []):
        tally.find("shared") if address in theirs else tally.count("apart")
    assert optimizer.state[params[0]]["own_list"] is not saved["state"][0]["own_list"]
    assert optimizer.param_groups[0]["own_list"][1] is not saved["param_groups"][0]["own_list"][1]


@pytest.mark.parametrize("make", [collections.OrderedDict, lambda d: collections.ChainMap({}, d), dict])
def test_other_mappings_and_parameters_as_arrays_load(make, tally):
    _, source = small(steps=2)
    saved = source.state_dict()
    state = {n: make({k: torch.nn.Parameter(v, requires_grad=False) for k, v in s.items()})
             for n, s in saved["state"].items()}  # fmt: skip
    _, optimizer = small(steps=0)
    _, expected = small(steps=0)
    expected.load_state_dict(saved)
    optimizer.load_state_dict(make({**saved, "state": make(state)}))
    assert contents(optimizer) == contents(expected)
    assert all(type(v) is not torch.nn.Parameter for held in optimizer.state.values() for v in held.values())
    tally.count("the same")


def test_what_a_diverged_run_has_saved_loads_as_it_is():
    params, source = small(steps=2, quantize=False)
    params[0].grad = torch.full_like(params[0], NAN)
    source.step()
    saved = copy.deepcopy(source.state_dict())
    _, optimizer = small(steps=0, quantize=False)
    optimizer.load_state_dict(saved)
    assert plain(optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"]) == plain(
        source.state[params[0]]["exp_avg"]
    )
    del saved["flashoptim_native.checksums"]
    with pytest.raises(ValueError, match=r"state 'exp_avg' of parameter 0 of group 0 holds values from nan"):
        optimizer.load_state_dict(saved)
