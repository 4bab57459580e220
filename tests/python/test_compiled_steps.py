"""Training steps that torch.compile takes as a whole, with every call of an optimizer in them: the same bits."""

import pytest
import torch
from torch import nn

from flashoptim_native import FlashAdamW
from helpers import assert_same_bits


def make(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).bfloat16()
    return model, FlashAdamW(model.parameters(), **{"lr": 1e-2, **options})


def loss_of(model, x):
    return model(x).float().square().mean()


def plain(model, optimizer, x):
    optimizer.zero_grad()
    loss_of(model, x).backward()
    optimizer.step()


def clipped(model, optimizer, x):
    optimizer.zero_grad()
    loss_of(model, x).backward()
    optimizer.clip_grad_norm_(1e-3)
    optimizer.step()


def one_by_one(model, optimizer, x):
    optimizer.zero_grad()
    loss_of(model, x).backward()
    for p in model.parameters():
        optimizer.step_param(p)


def by_closure(model, optimizer, x):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    return optimizer.step(closure)


@pytest.mark.parametrize("options", [{}, {"lr": torch.tensor(1e-2)}, {"check_numerics": True}])
@pytest.mark.parametrize("step", [plain, clipped, one_by_one, by_closure])
def test_a_step_compiled_whole(step, options):
    torch._dynamo.reset()
    runs = []
    for backend in (None, "eager"):
        model, optimizer = make(**options)
        call = step if backend is None else torch.compile(step, backend=backend)
        for number in range(4):
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(number)).bfloat16()
            call(model, optimizer, x)
        assert all(optimizer.state[p]["step"] == 4 for p in model.parameters())
        runs.append((list(model.parameters()), optimizer))
    assert_same_bits(*runs)
