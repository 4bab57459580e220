"""Wrong arguments and tensors: the documented exception, which names the argument and its value; nothing changed."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys

import pytest
import torch

import flashoptim_native
from flashoptim_native import _ops, _validate
from helpers import CLASSES, assert_untouched, make_params, run, set_grads, snapshot

NAN, INF = float("nan"), float("inf")

COMMON = [
    ({"lr": NAN}, ValueError, "lr = nan .* finite number >= 0"),
    ({"lr": INF}, ValueError, "lr = inf"),
    ({"lr": -1e-3}, ValueError, "lr = -0.001"),
    ({"lr": "fast"}, TypeError, "lr = 'fast' is a str"),
    ({"lr": True}, TypeError, "lr = True is a bool"),
    ({"lr": torch.tensor([1.0, 2.0])}, ValueError, r"lr = tensor of shape \(2,\)"),
    ({"lr": torch.tensor(1)}, ValueError, "lr = tensor .* torch.int64"),
    ({"lr": torch.tensor(NAN)}, ValueError, "lr = nan"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay = -0.1"),
    ({"weight_decay": NAN}, ValueError, "weight_decay = nan"),
    ({"master_weight_bits": 16}, ValueError, "master_weight_bits = 16 .* None, 24, 32"),
    ({"master_weight_bits": "24"}, ValueError, "master_weight_bits = '24'"),
    ({"state_codec": "fp8"}, ValueError, "state_codec = 'fp8' .* 'default', 'paper'"),
    ({"state_codec": None}, ValueError, "state_codec = None"),
    ({"quantize": 2}, TypeError, "quantize = 2 is a int; allowed are True and False"),
    ({"compress_state_dict": "yes"}, TypeError, "compress_state_dict = 'yes'"),
    ({"check_numerics": 0}, TypeError, "check_numerics = 0"),
    ({"fused": "no"}, TypeError, "fused = 'no'"),
    ({"min_quantized_numel": -1}, ValueError, "min_quantized_numel = -1"),
    ({"min_quantized_numel": 1.5}, TypeError, "min_quantized_numel = 1.5"),
    ({"seed": -1}, ValueError, "seed = -1 .* 0 to 9007199254740991"),
    ({"seed": 2**53}, ValueError, "seed = 9007199254740992"),
    ({"seed": 0.5}, TypeError, "seed = 0.5"),
    ({"maximize": 1}, TypeError, "maximize = 1"),
    ({"stochastic_rounding": True}, ValueError, "stochastic_rounding = True with master_weight_bits = 24"),
    ({"stochastic_rounding": None}, TypeError, "stochastic_rounding = None"),
]
BETAS = [
    ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] = 1.0 .* < 1"),
    ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] = 1.0"),
    ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\] = -0.1"),
    ({"betas": (NAN, 0.9)}, ValueError, r"betas\[0\] = nan"),
    ({"betas": 0.9}, ValueError, "betas = 0.9"),
    ({"betas": (0.9,)}, ValueError, r"betas = \(0.9,\)"),
]
EPS = [({"eps": -1e-8}, ValueError, "eps = -1e-08"), ({"eps": NAN}, ValueError, "eps = nan")]
MOMENTUM = [
    ({"momentum": -0.1}, ValueError, "momentum = -0.1"),
    ({"momentum": INF}, ValueError, "momentum = inf"),
    ({"dampening": NAN}, ValueError, "dampening = nan"),
    ({"nesterov": True}, ValueError, "nesterov = True with momentum = 0.0"),
    ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, "dampening = 0.1"),
    ({"nesterov": 1}, TypeError, "nesterov = 1"),
]
DECOUPLED = [
    ({"decouple_lr": True, "lr": 0.0}, ValueError, "lr = 0.0 is not allowed with decouple_lr = True"),
    ({"decouple_lr": "yes"}, TypeError, "decouple_lr = 'yes'"),
]
#: By a hyperparameter that an optimizer has; of others whatever their rule's range excludes.
OF_HYPERPARAMETERS = {"beta1": BETAS, "beta2": [], "eps": EPS, "momentum": MOMENTUM, "dampening": [], "nesterov": []}


def is_short(arguments, betas):
    given = arguments.get("betas")
    return betas > 2 and isinstance(given, tuple) and len(given) < betas


def wrong_arguments(kind):
    cases, (_, *betas) = list(COMMON), (0.9, 0.99, 0.999)
    description = _ops.describe(kind)
    for name, number in ((one.name, one.kind) for one in description.hyperparameters[6:]):
        if name in OF_HYPERPARAMETERS:
            cases += OF_HYPERPARAMETERS[name]
        elif name.removeprefix("beta").isdigit():
            cases.append(({"betas": (0.9, *betas[: int(name[4:]) - 2], 1.0)}, ValueError, "= 1.0"))
        elif number == "number":
            cases += [({name: value}, ValueError, f"{name} = {value}") for value in (NAN, INF)]
        else:
            cases += [({name: -1}, ValueError, f"{name} = -1"), ({name: 0.5}, TypeError, f"{name} = 0.5")]
    if "decouple_lr" in inspect.signature(CLASSES[kind]).parameters:
        cases += DECOUPLED
    # Of an optimizer with more betas every wrong pair is refused, too, by their number.
    return [(a, e, "betas = " if is_short(a, description.betas()) else m) for a, e, m in cases]


CASES = [(kind, *case) for kind in CLASSES for case in wrong_arguments(kind)]
GROUP_OPTIONS_ONLY = ("compress_state_dict", "check_numerics", "fused")


@pytest.mark.parametrize(("kind", "arguments", "error", "message"), CASES)
def test_wrong_arguments(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        CLASSES[kind](make_params(), **arguments)


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"), [c for c in CASES if not set(GROUP_OPTIONS_ONLY) & set(c[1])]
)
def test_wrong_options_of_a_group_leave_the_optimizer_as_it_was(kind, arguments, error, message):
    params = make_params()
    optimizer = CLASSES[kind](params[:4])
    run(optimizer, params, 0, 1)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": params[4:], **arguments})
    assert_untouched(optimizer, before)
    set_grads(params, 1)
    good = optimizer.param_groups[0]
    optimizer.param_groups[0] = {**good, **arguments}
    if "decouple_lr" not in arguments:
        with pytest.raises(error, match=message):
            optimizer.step()
    optimizer.param_groups[0] = good
    assert_untouched(optimizer, before)
    run(optimizer, params, 1, 2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.nn.Parameter(torch.ones(4, dtype=torch.float64)), TypeError, "dtype torch.float64; allowed are"),
        (lambda: torch.nn.Parameter(torch.ones(4, dtype=torch.complex64)), TypeError, "torch.complex64"),
        (lambda: torch.nn.Parameter(torch.ones(4, dtype=torch.int32), requires_grad=False), TypeError, "torch.int32"),
        (lambda: torch.nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn)), TypeError, "float8"),
        (lambda: torch.nn.Parameter(torch.ones(1, 4).expand(5, 4)), ValueError, r"shape \(5, 4\) and stride \(0, 1\)"),
        (lambda: torch.ones(4).to_sparse(), TypeError, "torch.sparse_coo; allowed is torch.strided"),
        (lambda: "weights", TypeError, "str"),
        (lambda: torch.ones(3, requires_grad=True) * 2, ValueError, "non-leaf"),
    ],
)
def test_parameters_that_cannot_be_stepped(make, error, message):
    good = make_params()
    with pytest.raises(error, match=message):
        flashoptim_native.FlashAdamW([*good, make()])
    optimizer = flashoptim_native.FlashAdamW(good)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [make()]})
    assert len(optimizer.param_groups) == 1


def test_empty_and_duplicate_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        flashoptim_native.FlashAdamW([])
    p = make_params()[0]
    with pytest.raises(ValueError, match="more than one parameter group"):
        flashoptim_native.FlashAdamW([{"params": [p]}, {"params": [p]}])
    with pytest.warns(UserWarning, match="duplicate"):
        twice = flashoptim_native.FlashAdamW([p, p])
    p.grad = torch.ones_like(p)
    before = snapshot(twice)
    with pytest.raises(RuntimeError, match="share memory"):
        twice.step()
    assert_untouched(twice, before)


def _complex(p):
    p.grad_dtype = None
    p.grad = torch.ones(p.shape, dtype=torch.complex64)


def _half(p):
    p.grad_dtype = None
    p.grad = torch.ones(p.shape, dtype=torch.float16)


def _double(p):
    p.grad_dtype = None
    p.grad = torch.ones(p.shape, dtype=torch.float64)


def _sparse(p):
    p.grad = torch.ones_like(p).to_sparse()


def _reshaped(p):
    p.grad = torch.ones_like(p)
    p.data = p.data[:-1].clone()


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_sparse, "gradient of parameter 2 of group 0 has layout torch.sparse_coo"),
        (_complex, "gradient of parameter 2 .* torch.complex64; allowed"),
        (_half, "gradient of parameter 2 .* torch.float16; allowed"),
        (_double, "gradient of parameter 2 .* torch.float64; allowed"),
        (_reshaped, r"gradient of parameter 2 .* has shape \(31,\)"),
    ],
)
@pytest.mark.parametrize("kind", CLASSES)
def test_wrong_gradients_change_nothing(kind, spoil, message, steps_before):
    params = make_params()
    optimizer = CLASSES[kind](params)
    run(optimizer, params, 0, steps_before)
    set_grads(params, steps_before)
    data, before = params[2].data, snapshot(optimizer)
    spoil(params[2])
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    params[2].data = data
    assert_untouched(optimizer, before)
    params[2].grad = None
    params[2].grad_dtype = torch.bfloat16
    run(optimizer, params, steps_before, steps_before + 1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("exp_avg_codes", lambda t: t.float(), "no known format|dtype"),
        ("exp_avg_codes", lambda t: t[:3], "shape|stride"),
        ("exp_avg_scale", lambda t: t[:3], "shape"),
        ("correction", lambda t: t.float(), "dtype"),
    ],
)
def test_broken_states_change_nothing(key, value, message):
    params = make_params()
    optimizer = flashoptim_native.FlashAdamW(params)
    run(optimizer, params, 0, 2)
    optimizer.state[params[0]][key] = value(optimizer.state[params[0]][key])
    set_grads(params, 2)
    before = snapshot(optimizer)
    with pytest.raises((RuntimeError, ValueError), match=message):
        optimizer.step()
    assert_untouched(optimizer, before)


def test_a_failing_step_makes_no_state():
    params = make_params()
    optimizer = flashoptim_native.FlashAdamW(params)
    set_grads(params, 0)
    _sparse(params[3])
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert optimizer.state_dict()["state"] == {}


def test_low_precision_without_correction_is_warned_of():
    with pytest.warns(UserWarning, match="master_weight_bits=24, or stochastic_rounding=True"):
        flashoptim_native.FlashAdamW(make_params(), master_weight_bits=None)


def _import(tmp_path, environment, code="import flashoptim_native"):
    env = {k: v for k, v in os.environ.items() if k != "FLASHOPTIM_OPS_LIBRARY"} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)


def test_a_missing_or_broken_library_is_said_clearly(tmp_path):
    missing = _import(tmp_path, {"FLASHOPTIM_OPS_LIBRARY": str(tmp_path / "nowhere.so")})
    assert (
        missing.returncode != 0 and "FLASHOPTIM_OPS_LIBRARY names" in missing.stderr and "nowhere.so" in missing.stderr
    )
    broken = tmp_path / "libflashoptim_ops.so"
    broken.write_text("no library")
    failed = _import(tmp_path, {"FLASHOPTIM_OPS_LIBRARY": str(broken)})
    assert failed.returncode != 0 and "could not be loaded into torch" in failed.stderr


def test_a_refusal_of_one_group_of_calls_comes_before_any_change():
    """Groups with and without momentum are two operator calls; the second's refusal must find the first undone."""
    params = make_params()
    optimizer = flashoptim_native.FlashSGD([{"params": params[:4]}, {"params": params[4:], "momentum": 0.9}], lr=0.1)
    run(optimizer, params, 0, 2)
    for broken in (params[0], params[5]):
        good = optimizer.state[broken]["correction"]
        optimizer.state[broken]["correction"] = good.to(torch.int16)[:1]
        set_grads(params, 2)
        before = snapshot(optimizer)
        with pytest.raises((RuntimeError, ValueError)):
            optimizer.step()
        assert_untouched(optimizer, before)
        optimizer.state[broken]["correction"] = good
    run(optimizer, params, 2, 3)
    assert [optimizer.state[p]["step"] for p in params] == [3] * 8


@pytest.mark.parametrize(
    ("low", "high", "ends", "good", "bad", "allowed"),
    [
        (0.0, INF, {}, [0, 1e300], [-1e-9, INF, NAN], "a finite number >= 0"),
        (0.0, INF, {"low_allowed": False}, [1e-300], [0.0], "a finite number > 0"),
        (-INF, 2.0, {"high_allowed": True}, [-1e300, 2.0], [2.1, -INF, NAN], "a finite number <= 2"),
        (-INF, INF, {}, [-5.0], [INF, NAN], "a finite number"),
        (0.0, 1.0, {}, [0.0, 0.5], [1.0, -0.1, NAN], "0 <= x < 1"),
        (0.0, 1.0, {"low_allowed": False, "high_allowed": True}, [1.0], [0.0], "0 < x <= 1"),
    ],
)
def test_ends_of_a_range_are_allowed_as_a_rule_says(low, high, ends, good, bad, allowed):
    for value in good:
        assert _validate.check_range("x", value, low, high, **ends) == value
    for value in bad:
        with pytest.raises(ValueError, match=re.escape(f"x = {value!r} is not allowed; allowed is {allowed}") + "$"):
            _validate.check_range("x", value, low, high, **ends)


def test_a_rules_ranges_come_with_their_ends():
    numbers = {one.name: one for one in _ops.describe("adamw").hyperparameters}
    assert (numbers["beta1"].lowest_allowed, numbers["beta1"].highest_allowed) == (True, False)
    assert (numbers["maximize"].lowest_allowed, numbers["maximize"].highest_allowed) == (True, True)


# A step whose states want more than the process may have: files without blocks stand for the memory of the rest.
NO_MEMORY = """
import os, resource, torch, flashoptim_native
numel = 3 * 2**29
with open("weights", "wb") as file:
    file.truncate(2 * numel)
param, grad = (torch.from_file("weights", True, numel, dtype=torch.bfloat16) for _ in range(2))
param = torch.nn.Parameter(param)
param.grad = grad
optimizer = flashoptim_native.FlashAdamW([param])
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, -1))
try:
    optimizer.step()
except RuntimeError as error:
    print(len(optimizer.state), error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc for the process's size")
def test_what_torch_says_of_memory_that_it_does_not_have_comes_through(tmp_path):
    said = _import(tmp_path, {"FLASHOPTIM_OPS_LIBRARY": str(_ops.library_path())}, NO_MEMORY)
    assert said.returncode == 0, said.stderr
    assert re.match(r"0 flashoptim: torch's empty_strided failed: .*allocate", said.stdout)
