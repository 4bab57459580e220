"""policy={pattern: options}: sensitive layers by name; describe(): what is stored how, in bytes."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from flashoptim_native import FlashAdamW, FlashSGD, enable_gradient_release
from helpers import CLASSES, assert_same_bits, set_grads

KINDS = list(CLASSES)
POLICY = {
    "*embed*": {"quantize": False},
    "*norm*": {"weight_decay": 0.5, "master_weight_bits": 32},
    "head.*": {"lr": 0.5},
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(96, 64)
        self.norm = nn.LayerNorm(64)
        self.body = nn.Linear(64, 128)
        self.head = nn.Linear(128, 96)
        self.bfloat16()


def names(optimizer):
    return [group["param_names"] for group in optimizer.param_groups]


def train(model, optimizer, steps=range(2)):
    for step in steps:
        set_grads(list(model.parameters()), step)
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_is_groups_made_by_name(kind):
    model, twin = Model(), Model()
    optimizer = CLASSES[kind](model.named_parameters(), lr=0.1, policy=POLICY)
    assert names(optimizer) == [
        ["embedding.weight"],
        ["norm.weight", "norm.bias"],
        ["body.weight", "body.bias"],
        ["head.weight", "head.bias"],
    ]
    by_hand = CLASSES[kind](
        [
            {"params": [("embedding.weight", twin.embedding.weight)], "quantize": False},
            {
                "params": [(f"norm.{n}", p) for n, p in twin.norm.named_parameters()],
                "weight_decay": 0.5,
                "master_weight_bits": 32,
            },
            {"params": [(f"body.{n}", p) for n, p in twin.body.named_parameters()]},
            {"params": [(f"head.{n}", p) for n, p in twin.head.named_parameters()], "lr": 0.5},
        ],
        lr=0.1,
    )
    for one, other in zip(optimizer.param_groups, by_hand.param_groups, strict=True):
        assert {k: v for k, v in one.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}
    train(model, optimizer)
    train(twin, by_hand)
    assert_same_bits((list(model.parameters()), optimizer), (list(twin.parameters()), by_hand))


def test_later_patterns_decide_and_equal_options_share_a_group():
    model = Model()
    policy = {"*": {"lr": 0.25, "eps": 1e-6}, "*.bias": {"lr": 0.5}, "norm.bias": {"lr": 0.25}}
    optimizer = FlashAdamW(model.named_parameters(), policy=policy)
    assert names(optimizer) == [
        ["embedding.weight", "norm.weight", "norm.bias", "body.weight", "head.weight"],
        ["body.bias", "head.bias"],
    ]
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]
    assert all(group["eps"] == 1e-6 for group in optimizer.param_groups)


def test_groups_have_their_own_options_and_the_policys_over_them():
    model = Model()
    optimizer = FlashAdamW(
        [
            {"params": model.body.named_parameters(), "weight_decay": 0.25},
            {"params": model.head.named_parameters(), "lr": 0.125},
        ],
        policy={"bias": {"weight_decay": 0.0}},
    )
    assert names(optimizer) == [["weight"], ["bias"], ["weight"], ["bias"]]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0, 0.01, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 0.125, 0.125]


@pytest.mark.parametrize("released", [False, True])
def test_groups_that_are_added_later(released):
    model, extra = Model(), nn.ModuleDict({"norm": nn.LayerNorm(8), "body": nn.Linear(8, 8)})
    optimizer = FlashAdamW(model.named_parameters(), policy=POLICY)
    if released:
        enable_gradient_release(model, optimizer)
    optimizer.add_param_group({"params": extra.named_parameters(), "lr": 0.25})
    assert names(optimizer)[4:] == [["norm.weight", "norm.bias"], ["body.weight", "body.bias"]]
    assert optimizer.param_groups[4]["weight_decay"] == 0.5 and optimizer.param_groups[5]["weight_decay"] == 0.01
    before = len(optimizer.param_groups)
    bad = [("norm.a", nn.Parameter(torch.ones(3))), ("b", nn.Parameter(torch.ones(3, dtype=torch.float64)))]
    with pytest.raises(TypeError, match="float64"):
        optimizer.add_param_group({"params": bad})
    assert len(optimizer.param_groups) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_keep_it(copied):
    optimizer = copied(FlashAdamW(Model().named_parameters(), policy=POLICY))
    assert len(optimizer.param_groups) == 4
    optimizer.add_param_group({"params": [("other.norm", nn.Parameter(torch.ones(3)))]})
    assert optimizer.param_groups[4]["weight_decay"] == 0.5


def test_checkpoints_keep_it():
    model, twin = Model(), Model()
    optimizer = FlashAdamW(model.named_parameters(), policy=POLICY)
    train(model, optimizer)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed = FlashAdamW(twin.named_parameters(), policy=POLICY)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert [group["weight_decay"] for group in resumed.param_groups] == [0.01, 0.5, 0.01, 0.01]
    train(model, optimizer, range(2, 4))
    train(twin, resumed, range(2, 4))
    assert_same_bits((list(model.parameters()), optimizer), (list(twin.parameters()), resumed))
    with pytest.raises(ValueError, match="4 parameter groups; allowed is this optimizer's number, 1"):
        FlashAdamW(Model().named_parameters()).load_state_dict(optimizer.state_dict())


def test_a_pattern_that_matches_nothing_is_warned_of():
    with pytest.warns(UserWarning, match=r"policy: '\*.typo' matches no parameter"):
        FlashAdamW(Model().named_parameters(), policy={"*.typo": {"lr": 1.0}, "*": {"lr": 0.5}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FlashAdamW(Model().named_parameters(), policy=POLICY)
        FlashAdamW(Model().named_parameters(), policy={})
        FlashAdamW(Model().named_parameters(), policy=None)


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        ([("*", {})], TypeError, r"policy = .* is a list; allowed is \{pattern: options\}"),
        ({"*": 1}, TypeError, r"policy\['\*'\] = 1"),
        ({1: {}}, TypeError, r"policy\[1\]"),
        ({"*": {"learning_rate": 1.0}}, ValueError, "sets 'learning_rate', which is no option .* betas, .*, lr, "),
        ({"*": {"momentum": 0.9}}, ValueError, "sets 'momentum'"),
        ({"*": {"params": []}}, ValueError, "sets 'params'"),
        ({"*": {"check_numerics": True}}, ValueError, "sets 'check_numerics'"),
        ({"nothing": {"lr": -1.0}}, ValueError, r"policy\['nothing'\]: lr = -1.0"),
        ({"*": {"master_weight_bits": 16}}, ValueError, "master_weight_bits = 16"),
        ({"*": {"quantize": "no"}}, TypeError, "quantize = 'no'"),
    ],
)
def test_wrong_policies(policy, error, message):
    params = Model().named_parameters()
    with pytest.raises(error, match=message):
        FlashAdamW(params, policy=policy)
    assert len(list(params)) == 7  # none is used up


@pytest.mark.parametrize("params", [lambda m: m.parameters(), lambda m: [{"params": m.head.weight}]])
def test_parameters_without_names(params):
    with pytest.raises(ValueError, match=r"policy goes by the names .* model.named_parameters\(\)"):
        FlashAdamW(params(Model()), policy=POLICY)


# describe()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"master_weight_bits": 32, "state_codec": "paper"}, {"quantize": False}])
def test_bytes_are_those_that_states_take(kind, dtype, options):
    model = Model().to(dtype)
    model.odd = nn.Parameter(torch.ones(3, 50, 7, dtype=dtype))
    model.none = nn.Parameter(torch.ones(0, dtype=dtype))
    momentum = {"momentum": 0.9} if kind.startswith("sgd") else {}
    optimizer = CLASSES[kind](model.named_parameters(), **{"min_quantized_numel": 64}, **options, **momentum)
    said = optimizer.describe()
    train(model, optimizer)
    held = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
    assert said.bytes == held + sum(p.nbytes for p in model.parameters())
    assert said.elements == sum(p.numel() for p in model.parameters())
    assert optimizer.describe() == said


def test_rows_are_groups_and_formats():
    optimizer = FlashAdamW(Model().named_parameters(), policy=POLICY)
    rows = optimizer.describe()
    assert [(row.group, row.weights, row.states, len(row.parameters)) for row in rows] == [
        (0, "bfloat16 + 8", "fp32", 1),
        (1, "bfloat16 + 16", "fp32", 2),
        (2, "bfloat16 + 8", "8-bit", 1),
        (2, "bfloat16 + 8", "fp32", 1),
        (3, "bfloat16 + 8", "8-bit", 1),
        (3, "bfloat16 + 8", "fp32", 1),
    ]
    assert rows[0].parameters == ["parameter 'embedding.weight'"]
    assert rows[1].options == {"weight_decay": 0.5, "quantize": True, "master_weight_bits": 32}


def test_the_table():
    lines = str(FlashSGD(Model().named_parameters(), lr=0.1, policy={"head.*": {"lr": 0.5}}).describe()).split("\n")
    assert lines[0].split() == ["group", "tensors", "elements", "weights", "states", "bytes", "each", "options"]
    assert lines[2].split()[-1] == "lr=0.5"
    assert lines[-1].split() == ["all", "7", "26,976", "80,928", "3.000"]
    assert max(map(len, lines)) <= 120
