"""Steps against the float64 oracle and against PyTorch's own optimizers."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashoptim_native
import oracle
from flashoptim_native import _ops
from helpers import CLASSES, HYPERS, make_params, master_weights, relative_error, run, set_grads, to_numpy

EPS32 = 2.0**-24  # unit roundoff of fp32
KINDS = list(CLASSES)
DECOUPLED = [kind for kind in KINDS if "decouple_lr" in inspect.signature(CLASSES[kind]).parameters]
VARIANTS = [
    *((kind, {}) for kind in KINDS),
    *((kind, {"decouple_lr": True, "weight_decay": 1e-2}) for kind in DECOUPLED),
    ("sgd", {"dampening": 0.0, "nesterov": True}),
    ("sgd", {"momentum": 0.0, "dampening": 0.0}),
    ("sgdw", {"momentum": 0.0, "dampening": 0.0}),
    ("adamw", {"maximize": True}),
    ("sgd", {"maximize": True}),
]


def oracle_hypers(kind, extra):
    hypers = {**HYPERS[kind], **extra}
    if hypers.pop("decouple_lr", False):
        hypers["first_lr"] = hypers["lr"]
    return hypers


def spacing(param, bits):
    """Half the distance that a weight's stored value may be from the weight, by the split's bound h / (2 N)."""
    mantissa = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}[param.dtype]
    _, exponent = np.frexp(np.maximum(np.abs(to_numpy(param)), 2.0**-14))
    half_ulp = np.ldexp(1.0, exponent - 1 - mantissa - 1)
    return half_ulp / {None: 1, 24: 127, 32: 32767}[bits]


def rounding_bound(kind, hypers, w, g, state, t):
    """Error of one step computed in fp32 from exact inputs: the oracle's for the update; w is rounded a few times."""
    new, update = oracle.bounded_step(kind, w, g, dict(state), t, **hypers)
    return update + 4 * EPS32 * (np.abs(w) + np.abs(new))


@pytest.mark.parametrize(("kind", "extra"), VARIANTS)
def test_fp32_weights_and_states_follow_the_oracle(kind, extra):
    params = make_params(torch.float32)
    optimizer = CLASSES[kind](params, quantize=False, **{**HYPERS[kind], **extra})
    hypers = oracle_hypers(kind, extra)
    weights = [to_numpy(p) for p in params]
    states = [oracle.new_state(kind, p.shape) for p in params]
    bound = [np.zeros(p.shape) for p in params]
    memory = 1 + 1 / (1 - max(hypers.get("momentum", 0.0), *hypers.get("betas", (0.0, 0.0))))
    for t in range(1, 31):
        set_grads(params, t)
        optimizer.step()
        for i, p in enumerate(params):
            g = to_numpy(p.grad)
            # A state remembers 1 / (1 - decay) steps' worth of its own rounding and passes it on to each update.
            bound[i] = bound[i] + memory * rounding_bound(kind, hypers, weights[i], g, states[i], t)
            weights[i] = oracle.step(kind, weights[i], g, states[i], t, **hypers)
            assert (np.abs(to_numpy(p) - weights[i]) <= bound[i]).all(), (t, p.shape)
    for p, state in zip(params, states):
        for name, value in state.items():
            if name in optimizer.state[p]:
                np.testing.assert_allclose(to_numpy(optimizer.state[p][name]), value, rtol=1e-5, atol=32 * EPS32)


@pytest.mark.parametrize("codec", ["default", "paper"])
@pytest.mark.parametrize("bits", [24, 32, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_each_quantized_step_is_the_oracles_from_the_stored_state(kind, dtype, bits, codec):
    """Whatever was stored before, one step from it is exact up to fp32 arithmetic and the storing of the weight."""
    params = make_params(dtype)
    with (
        pytest.warns(UserWarning, match="master_weight_bits=None")
        if (bits is None and dtype != torch.float32)
        else _nothing()
    ):
        optimizer = CLASSES[kind](
            params, state_codec=codec, master_weight_bits=bits, min_quantized_numel=0, **HYPERS[kind]
        )
    for t in range(1, 9):
        before = [master_weights(optimizer, p) for p in params]
        states = [oracle.new_state(kind, p.shape) for p in params]
        for p, state in zip(params, states):
            state.update({k: to_numpy(v) for k, v in optimizer.decoded_state(p).items()})
        set_grads(params, t)
        optimizer.step()
        for p, w, state in zip(params, before, states):
            g = to_numpy(p.grad)
            bound = rounding_bound(kind, HYPERS[kind], w, g, state, t)
            expected = oracle.step(kind, w, g, state, t, **HYPERS[kind])
            stored = 0 if dtype == torch.float32 else spacing(p, bits)
            # Unbiased rounding of a correction takes either neighbour: a whole spacing where nearest takes half.
            error = np.abs(master_weights(optimizer, p) - expected)
            assert (error <= bound + stored * (1 + 2**-6)).all(), (t, p.shape, error.max())


def mu_law_step(signed, reach, k):
    """A step of the code at ``signed``: 2^-k of |x| + G, where G is the group's largest |x| over what k bits cover."""
    octaves, part = divmod(127, 2**k)
    covered = 2 ** (octaves + 1) * (1 + part / 2**k) - 2
    return 2.0**-k * (np.abs(signed) + 2 * reach / covered) * (1 + 2**-6)


def chosen_step(signed, reach):
    """The same where groups choose k by the octaves that they span; near a threshold, either."""
    bits = np.abs(signed).astype(np.float32).view(np.int32)
    smallest = np.where(bits > 0, bits, bits.max(-1, keepdims=True)).min(-1, keepdims=True)
    octaves = (bits.max(-1, keepdims=True) - smallest) / 2**23
    allowed = np.zeros_like(signed)
    for near in (octaves - 1e-4, octaves + 1e-4):
        for k, low, high in ((6, -1, 6.5), (5, 6.5, 8.5), (4, 8.5, 12.5), (3, 12.5, 999)):
            chosen = (near >= low) & (near < high)
            allowed = np.maximum(allowed, np.where(chosen, mu_law_step(signed, reach, k), 0))
    return allowed


def allowed_of_slot(slot, codec, exact, stored):
    """How far the stored values of one slot may be off the exact ones, by group."""
    value = exact[slot.name]
    largest = np.abs(value).max(-1, keepdims=True)
    if codec == "paper" and slot.is_signed:  # half a step of 1/127, times a slope of at most 2, and the scale
        return largest * (1 / 127 + 2.0**-10)
    if codec == "paper":  # half a step of 1/255 in the root, and fp16's half step in the scale
        root_error = np.sqrt(largest) * (0.5 / 255 + 2.0**-10)
        return 2 * np.sqrt(value) * root_error + root_error**2
    if not slot.is_signed:  # 254 codes share the group's octaves, in steps that are powers of two; one step either way
        smallest = np.where(value > 0, value, np.inf).min(-1, keepdims=True)
        return (2 * (np.log2(largest / smallest) + 1) / 254 + 1e-6) * value
    if slot.mantissa_bits == 0:
        return chosen_step(value, largest)
    scale = 2 if slot.is_slow else 1  # the next power of two
    if slot.relative_to < 0:
        return mu_law_step(value, scale * largest, slot.mantissa_bits)
    base = list(stored.values())[slot.relative_to]  # S is within a factor of 2 of its root
    root = np.maximum(np.sqrt(base), 1e-30)
    return mu_law_step(value, 2 * scale * (np.abs(value) / root).max(-1, keepdims=True) * root, slot.mantissa_bits)


@pytest.mark.parametrize("codec", ["default", "paper"])
@pytest.mark.parametrize("kind", KINDS)
def test_stored_states_are_within_the_codecs_bounds(kind, codec):
    (p,) = params = make_params(torch.bfloat16, [(128, 96)])
    optimizer = CLASSES[kind](params, state_codec=codec, **HYPERS[kind])
    for t in range(1, 6):
        state = {k: to_numpy(v) for k, v in optimizer.decoded_state(p).items()} or oracle.new_state(kind, p.shape)
        w = master_weights(optimizer, p)
        set_grads(params, t)
        optimizer.step()
        oracle.step(kind, w, to_numpy(p.grad), state, t, **HYPERS[kind])
        decoded = optimizer.decoded_state(p)
        exact = {name: state[name].reshape(128, 3, 32) for name in oracle.STATES[kind]}
        stored = {name: to_numpy(decoded[name]).reshape(128, 3, 32) for name in oracle.STATES[kind]}
        for slot in _ops.describe(kind).slots:
            error = np.abs(stored[slot.name] - exact[slot.name])
            allowed = allowed_of_slot(slot, codec, exact, stored) + 1e-16  # of the oracle's own rounding
            assert (error <= allowed).all(), (slot.name, t)


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "sgdw"])
def test_a_quantized_run_stays_with_float64(kind):
    """24-bit weights and 8-bit states over 300 steps of noisy gradients with a mean: total movement within 3 %."""
    n, steps = 4096, 300
    generator = np.random.default_rng(0)
    mean = 0.1 * generator.standard_normal(n)
    hypers = {**HYPERS[kind], "lr": 1e-3, "weight_decay": 0.0}
    (p,) = params = [torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16))]
    optimizer = CLASSES[kind](params, **hypers)
    w, state = np.zeros(n), oracle.new_state(kind, n)
    for t in range(1, steps + 1):
        p.grad = torch.from_numpy(1e-3 * (mean + generator.standard_normal(n))).to(torch.bfloat16)
        optimizer.step()
        w = oracle.step(kind, w, to_numpy(p.grad), state, t, **hypers)
    assert relative_error(master_weights(optimizer, p), w) <= 0.03


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda p: flashoptim_native.FlashAdamW(p, lr=1e-2, quantize=False), lambda p: torch.optim.AdamW(p, lr=1e-2)),
        (
            lambda p: flashoptim_native.FlashAdam(p, lr=1e-2, weight_decay=0.1, quantize=False),
            lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
        ),
        (
            lambda p: flashoptim_native.FlashSGD(
                p, lr=1e-2, momentum=0.9, dampening=0.5, weight_decay=0.1, quantize=False
            ),
            lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.5, weight_decay=0.1),
        ),
        (
            lambda p: flashoptim_native.FlashSGD(p, lr=1e-2, momentum=0.9, nesterov=True, quantize=False),
            lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
        ),
        (lambda p: flashoptim_native.FlashSGD(p, lr=1e-2), lambda p: torch.optim.SGD(p, lr=1e-2)),
    ],
)
def test_fp32_runs_match_torch(ours, theirs):
    a, b = make_params(torch.float32), make_params(torch.float32)
    ours, theirs = ours(a), theirs(b)
    run(ours, a, 0, 50)
    run(theirs, b, 0, 50)
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            if name in ours.state[p]:
                torch.testing.assert_close(ours.state[p][name], theirs.state[q][name], rtol=1e-5, atol=1e-7)


def test_sgd_starts_a_new_buffer_when_momentum_is_turned_on():
    a, b = make_params(torch.float32), make_params(torch.float32)
    ours = flashoptim_native.FlashSGD(a, lr=1e-2, dampening=0.5, quantize=False)
    theirs = torch.optim.SGD(b, lr=1e-2, dampening=0.5)
    for step, momentum in enumerate((0.0, 0.0, 0.9, 0.9, 0.8)):
        ours.param_groups[0]["momentum"] = theirs.param_groups[0]["momentum"] = momentum
        run(ours, a, step, step + 1)
        run(theirs, b, step, step + 1)
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@given(
    shape=st.lists(st.integers(0, 9), max_size=4).flatmap(
        lambda s: st.sampled_from([tuple(s), (*s, 33), (*s, 31), (*s, 64)])
    ),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    codec=st.sampled_from(["default", "paper"]),
    bits=st.sampled_from([24, 32]),
    quantize=st.booleans(),
)
def test_any_shape_steps_and_its_state_has_the_documented_form(shape, kind, dtype, codec, bits, quantize):
    (p,) = params = make_params(dtype, [shape])
    optimizer = CLASSES[kind](
        params, quantize=quantize, state_codec=codec, master_weight_bits=bits, min_quantized_numel=0, **HYPERS[kind]
    )
    w, states = to_numpy(p), oracle.new_state(kind, p.shape)
    set_grads(params, 1)
    optimizer.step()
    expected = oracle.step(kind, w, to_numpy(p.grad), states, 1, **HYPERS[kind])
    stored = 0 if dtype == torch.float32 else spacing(p, bits) * (1 + 2**-6)
    bound = rounding_bound(kind, HYPERS[kind], w, to_numpy(p.grad), oracle.new_state(kind, p.shape), 1) + stored
    assert (np.abs(master_weights(optimizer, p) - expected) <= bound).all()

    state = optimizer.state[p]
    assert state["step"] == 1
    leading, groups = documented_scale(p.shape)
    for name in oracle.STATES[kind]:
        if quantize:
            assert state[name + "_codes"].shape == p.shape and state[name + "_codes"].element_size() == 1
            assert state[name + "_scale"].shape == (*leading, groups)
            assert state[name + "_scale"].dtype == (torch.int16 if codec == "default" else torch.float16)
        else:
            assert state[name].shape == p.shape
            assert state[name].dtype == torch.float32 and name + "_scale" not in state
    if dtype == torch.float32:
        assert "correction" not in state
    else:
        assert state["correction"].dtype == (torch.int8 if bits == 24 else torch.int16)


def documented_scale(shape):
    """Dimensions before the row, and its groups: the shortest run of trailing dimensions with at least 32 elements."""
    for dims in range(1, len(shape) + 1):
        row = int(np.prod(shape[len(shape) - dims :]))
        if row >= 32:
            return tuple(shape[: len(shape) - dims]), -(-row // 32)
    return (), -(-int(np.prod(shape)) // 32)


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False
