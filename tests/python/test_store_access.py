"""Both ways of looking at tensors: in torch's own objects, and by asking torch (libtorch/ops/tensor_layout.h)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashoptim_native
from flashoptim_native import _layout, _ops


@pytest.fixture(params=["direct", "ask"])
def access(request):
    if request.param == "ask":
        _ops.store.find_layout(None)
    elif _layout.find(_ops.store, free_threaded=False):
        pytest.skip("this torch keeps its tensors otherwise")
    yield request.param
    if not _ops.tensor_access().startswith("ask"):
        _layout.find(_ops.store, free_threaded=False)


def test_this_torch_is_looked_at_directly():
    if os.environ.get(_layout.VARIABLE) == _layout.ASK:
        pytest.skip("torch is asked")
    assert _ops.tensor_access() == "direct"


def test_the_package_says_why_torch_is_asked():
    run = subprocess.run(
        [sys.executable, "-c", "import flashoptim_native as f; print(f.tensor_access())"],
        env={**os.environ, _layout.VARIABLE: "ask"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "ask: FLASHOPTIM_TENSOR_ACCESS=ask"


def test_a_fact_that_is_wrong_is_not_found_anywhere():
    tensors = _layout._tensors()
    facts = [_layout._facts(tensor) for tensor in tensors]
    try:
        for place in (1, 2, 3, 4, 5, 6, 7, 8, 10, 11):
            wrong = [tuple(fact + 8 if at == place else fact for at, fact in enumerate(one)) for one in facts[:1]]
            with pytest.raises(RuntimeError, match="is not"):
                _ops.store.find_layout(wrong + facts[1:])
    finally:
        _layout.find(_ops.store, free_threaded=False)


# Meta tensors take the way of CUDA's, on which gradients are read in place.
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gradients_come_and_go(access, device):
    params = [torch.nn.Parameter(torch.ones(64, device=device)) for _ in range(40)]
    optimizer = flashoptim_native.FlashAdamW(params, lr=0.1)
    taken = [0] * len(params)
    for step in range(8):
        for number, param in enumerate(params):
            param.grad = None
            if (number + step) % 3:
                # A gradient that no Python object stands for, as backward makes them.
                (param * 2.0).sum().backward() if step % 2 else setattr(param, "grad", torch.ones_like(param))
                taken[number] += 1
        versions = [p._version for p in params]
        optimizer.step()
        bumped = [p._version - version for p, version in zip(params, versions, strict=True)]
        assert bumped == [int(p.grad is not None) for p in params]
    assert [optimizer.state[p]["step"] for p in params] == taken


class Sub(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_both_ways_take_a_gradient_of_a_subclass(access, device):
    param = torch.nn.Parameter(torch.ones(64, device=device))
    optimizer = flashoptim_native.FlashAdamW([param], lr=0.1)
    for _ in range(3):
        param.grad = torch.ones(64, device=device)
        optimizer.step()
    param.grad = torch.ones(64, device=device).as_subclass(Sub)
    optimizer.step()
    param.grad = torch.ones(64, device=device)
    optimizer.step()
    assert optimizer.state[param]["step"] == 5


def test_the_store_tests_pass_where_torch_is_asked():
    """Those about memory, in a process of their own."""
    if os.environ.get(_layout.VARIABLE) == _layout.ASK:
        pytest.skip("this is that process")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__).with_name("test_store_memory.py"))],
        env={**os.environ, _layout.VARIABLE: "ask"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
