"""suggest_policy(): the one layer that needs another format is found by its steps, and mended by what is suggested."""

import pytest
import torch

from flashoptim_native import FlashAdamW, FlashSGD, suggest_policy
from helpers import CLASSES


def make_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 32)).bfloat16()


def train(model, optimizer, scales, steps=30):
    """Gradients of noise; of the first layer's rows, times ``scales``."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for name, param in model.named_parameters():
            grad = 0.01 * torch.randn(param.shape, generator=generator)
            param.grad = (grad * scales if name == "0.weight" else grad).to(param.dtype)
        optimizer.step()


SPREAD = torch.logspace(-8, 0, 64)  # neighbours in a group of 32 are decades apart


def test_a_layer_whose_states_the_papers_codec_floors_gets_the_default_codec():
    model = make_model()
    more = {"lr": 1e-3, "min_quantized_numel": 0, "check_numerics": True, "betas": (0.9, 0.95)}
    optimizer = FlashAdamW(model.named_parameters(), state_codec="paper", master_weight_bits=32, **more)
    train(model, optimizer, SPREAD)
    suggested = suggest_policy(optimizer)
    assert dict(suggested) == {"0.weight": {"state_codec": "default"}}
    row = suggested.rows[0]
    assert row.reasons["floored"] > 0.05 and row.reasons["ratio"] > 2.5
    assert row.bytes_now == row.bytes_then and suggested.bytes == 0
    table = str(suggested)
    assert "0.weight" in table and "floored" in table and "state_codec='default'" in table and "+0" in table

    again = make_model()
    mended = FlashAdamW(again.named_parameters(), state_codec="paper", master_weight_bits=32, policy=suggested, **more)
    train(again, mended, SPREAD)
    assert [row.states for row in mended.describe()] == ["8-bit", "8-bit paper"]
    assert dict(suggest_policy(mended)) == {}
    assert "nothing to change" in str(suggest_policy(mended))
    exact = make_model()
    reference = torch.optim.AdamW(exact.float().parameters(), lr=1e-3, betas=(0.9, 0.95))
    train(exact, reference, SPREAD)
    start = make_model().float()

    def error(optimizer, model):
        moved = exact[0].weight - start[0].weight
        got = optimizer.get_fp32_model_state_dict(model)["0.weight"]
        return float(((got - exact[0].weight).norm() / moved.norm()).detach())

    assert error(mended, again) < 0.1 < error(optimizer, model)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"master_weight_bits": None}, {"stochastic_rounding": True}),
        ({"state_codec": "paper"}, {"state_codec": "default"}),
    ],
)
@pytest.mark.filterwarnings("ignore:master_weight_bits=None")
def test_a_layer_whose_updates_are_lost_gets_unbiased_rounding(given, wanted):
    model = make_model()
    with torch.no_grad():
        model[2].weight.mul_(4096)  # beside which its updates are below half a spacing
    counted = FlashSGD(model.named_parameters(), lr=1e-3, momentum=0.0, check_numerics=True, **given)
    counted._stepper.monitor.check_learning_rate = lambda *arguments: None  # which would refuse the first step
    train(model, counted, torch.ones(64), steps=4)
    suggested = suggest_policy(counted, lost=0.9)
    assert suggested["2.weight"] == wanted
    assert suggested.rows[-1].reasons["lost"] > 0.9
    assert set(suggested) <= {"2.weight", "0.weight", "0.bias", "2.bias"}


def test_the_default_formats_need_nothing():
    model = make_model()
    optimizer = FlashAdamW(model.named_parameters(), lr=1e-3, min_quantized_numel=0, check_numerics=True)
    train(model, optimizer, SPREAD)
    assert not suggest_policy(optimizer)


def test_what_is_asked_of_an_optimizer():
    model = make_model()
    with pytest.raises(TypeError, match="AdamW; allowed is an optimizer of this package"):
        suggest_policy(torch.optim.AdamW(model.parameters()))
    optimizer = CLASSES["adamw"](model.named_parameters())
    train(model, optimizer, SPREAD, steps=1)
    with pytest.raises(ValueError, match="check_numerics=True"):
        suggest_policy(optimizer)
    unnamed = CLASSES["adamw"](model.parameters(), check_numerics=True)
    train(model, unnamed, SPREAD, steps=1)
    with pytest.raises(ValueError, match="named_parameters"):
        suggest_policy(unnamed)
    with pytest.raises(ValueError, match="lost = -1"):
        suggest_policy(optimizer, lost=-1)
