"""The memory planner: storages are followed, formats are counted by the optimizer's own description, CUDA's ways."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import flashoptim_native
from flashoptim_native.planning import PlanError, _choices, _cuda_rules, _replay, _trace, load

N, WIDTH = 64, 1024
BYTES = N * WIDTH * 4


def traced(model, inputs, loss_of):
    with FakeTensorMode(allow_non_fake_inputs=True):
        _trace.fake_copy(model)
        return _trace.trace_step(model, inputs(), loss_of, _cuda_rules.Device())


def squares():
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False))


def trace_of_squares():
    return traced(squares(), lambda: torch.empty(N, WIDTH), lambda model, x: model(x).sum())


def test_activations_and_gradients_are_followed():
    trace = trace_of_squares()
    assert trace.inputs == BYTES
    kept = _replay.kept_activations(trace)
    sizes = sorted(event.size for event in trace.events if event.kind == "allocate" and event.storage in kept)
    assert sizes == [512, BYTES]  # the loss, and the second layer's input
    gradients = [event for event in trace.events if event.kind == "gradient"]
    assert [event.size for event in gradients] == [1, 0]  # the last layer's first
    freed = {event.storage for event in trace.events if event.kind == "free"}
    assert not freed & {event.storage for event in gradients}


def test_release_frees_gradients_when_they_are_complete():
    trace = trace_of_squares()
    with_all = _replay.peak_of(trace, {}, releases=False)
    released = _replay.peak_of(trace, {}, releases=True)
    # The peak is where the second gradient is made: one is complete, the other a temporary yet.
    assert with_all.parts["gradients"] == WIDTH * WIDTH * 4
    assert with_all.parts["temporaries"] >= WIDTH * WIDTH * 4
    assert released.total <= with_all.total - (WIDTH * WIDTH * 4 - BYTES)  # the other layer's peak has its input


def test_arrays_are_the_optimizers_own():
    param = nn.Parameter(torch.randn(300, 70).bfloat16())
    for options in ({}, {"master_weight_bits": 32}, {"state_codec": "paper"}, {"quantize": False}):
        optimizer = flashoptim_native.FlashAdamW([param], **options)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        held = sum(one.nbytes for one in optimizer.state[param].values() if isinstance(one, torch.Tensor))
        assert sum(array.bytes for array in _choices.own("adamw", **options).arrays(param)) == held


def test_dropout_keeps_a_mask_of_bool():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5))
    trace = traced(model, lambda: torch.empty(N, WIDTH), lambda model, x: model(x).sum())
    kept = _replay.kept_activations(trace)
    assert N * WIDTH in {event.size for event in trace.events if event.storage in kept and event.kind == "allocate"}


def test_attention_is_the_fused_kernel_and_the_cpu_gets_its_own_back():
    def loss(model, x):
        q = model(x).view(2, 8, 512, 64)
        return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum()

    with torch.device("meta"):
        model = nn.Linear(64, 64).bfloat16()
    trace = traced(model, lambda: torch.empty(2 * 8 * 512, 64, dtype=torch.bfloat16), loss)
    assert trace.operators["aten._scaled_dot_product_cudnn_attention"] == 1
    assert "aten._softmax" not in trace.operators
    q = torch.randn(1, 1, 4, 8)
    result = nn.functional.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(result, torch.softmax(q @ q.transpose(-1, -2) / 8**0.5, -1) @ q)


def test_autocast_computes_softmax_and_norms_in_fp32_as_on_cuda():
    def loss(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.softmax(model(x), -1)
        assert y.dtype == torch.float32
        return y.sum()

    with torch.device("meta"):
        model = nn.Linear(64, 64)
    traced(model, lambda: torch.empty(4, 64), loss)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.softmax(torch.zeros(2, 2, dtype=torch.bfloat16), -1).dtype == torch.bfloat16


def test_weights_of_a_file_are_counted(tmp_path):
    torch.save({"a": torch.zeros(10, 10), "ids": torch.zeros(3, dtype=torch.int64)}, tmp_path / "w.pt")
    assert load(str(tmp_path / "w.pt")).tensors["a"] == ((10, 10), torch.float32)
    (tmp_path / "bad.pt").write_bytes(b"no archive")
    with pytest.raises(PlanError, match="cannot be read"):
        load(str(tmp_path / "bad.pt"))
