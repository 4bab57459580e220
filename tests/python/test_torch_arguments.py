"""What callers of torch.optim hand over: its arguments at neutral values, NumPy's numbers, strings, hooks, names."""

import io
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import flashoptim_native
from flashoptim_native import FlashAdamW, FlashSGD, parse_optimizer_arguments
from helpers import CLASSES, assert_same_bits, assert_untouched, make_params, run, snapshot

KINDS = list(CLASSES)
NEUTRAL = [("amsgrad", False), ("foreach", None), ("foreach", False), ("differentiable", False)]
NEUTRAL += [("fused", None), ("fused", True), ("fused", False), ("capturable", False)]
REFUSED = [("amsgrad", True), ("foreach", True), ("differentiable", True), ("amsgrad", None), ("foreach", "yes")]
TORCHS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "value"), NEUTRAL)
def test_neutral_values_change_nothing(kind, name, value):
    plain, given, grouped, later, set_later = (make_params() for _ in range(5))
    optimizers = [CLASSES[kind](plain), CLASSES[kind](given, **{name: value})]
    optimizers.append(CLASSES[kind]([{"params": grouped, name: value}]))
    optimizers.append(CLASSES[kind](later[:1]))
    optimizers[-1].add_param_group({"params": later[1:], name: value})
    optimizers.append(CLASSES[kind](set_later))
    optimizers[-1].param_groups[0][name] = value
    for optimizer, params in zip(optimizers, (plain, given, grouped, later, set_later), strict=True):
        run(optimizer, params, 0, 2)
        assert_same_bits((params, optimizer), (plain, optimizers[0]))
        # A group's keys are its checkpoint's: one that asks nothing is not among them.
        assert optimizer.param_groups[0].keys() == optimizers[0].param_groups[0].keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_what_is_not_there_is_refused_by_name(kind, name, value):
    message = f"{name} = {value!r} is not allowed; allowed: "
    with pytest.raises(ValueError, match=message):
        CLASSES[kind](make_params(), **{name: value})
    params = make_params()
    with pytest.raises(ValueError, match=message):
        CLASSES[kind]([{"params": params, name: value}])
    optimizer = CLASSES[kind](params[:1])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:], name: value})
    with pytest.raises(ValueError, match=message):
        optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=message):
        optimizer.param_groups[0].update({name: value})
    assert_untouched(optimizer, before)
    assert len(optimizer.param_groups) == 1
    good = optimizer.param_groups[0]
    optimizer.param_groups[0] = {**good, name: value}  # a dict of somebody's own
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(ValueError, match=message):
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_decoupled_weight_decay_is_the_classs_own(kind):
    is_decoupled = kind not in ("adam", "sgd")
    CLASSES[kind](make_params(), decoupled_weight_decay=is_decoupled)
    with pytest.raises(ValueError, match=f"decoupled_weight_decay = {not is_decoupled}"):
        CLASSES[kind](make_params(), decoupled_weight_decay=not is_decoupled)


@pytest.mark.parametrize("kind", TORCHS)
def test_every_default_of_torch_is_taken(kind):
    """Whatever a version of torch has among its defaults, at its default."""
    defaults = TORCHS[kind](make_params()).defaults
    optimizer = CLASSES[kind](make_params(), **defaults)
    group = TORCHS[kind](make_params()).param_groups[0]
    CLASSES[kind]([dict(group, params=make_params())])
    for name, value in defaults.items():
        if name in optimizer.param_groups[0]:
            assert optimizer.param_groups[0][name] == value


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_arguments_are_named(kind):
    with pytest.raises(TypeError, match=f"{CLASSES[kind].__name__}.* unexpected keyword argument 'amsgard'"):
        CLASSES[kind](make_params(), amsgard=False)


@pytest.mark.parametrize("name", ["check_numerics", "compress_state_dict"])
def test_the_optimizers_own_arguments_are_not_a_groups(name):
    with pytest.raises(ValueError, match=f"{name} is the whole optimizer's"):
        FlashAdamW([{"params": make_params(), name: False}])
    optimizer = FlashAdamW(make_params())
    with pytest.raises(ValueError, match=f"{name} is the whole optimizer's"):
        optimizer.param_groups[0][name] = True


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_are_checked_before_the_parameters(kind):
    p = make_params()[0]
    with pytest.raises(ValueError, match="lr = -1.0"):  # though no group has it
        CLASSES[kind]([{"params": [p], "lr": 1e-3}], lr=-1.0)
    params = iter([p])
    for wrong in (
        {"lr": -1.0},
        {"weight_decay": float("nan")},
        {"state_codec": "fp8"},
        {"seed": -1},
        {"amsgrad": True},
    ):
        with pytest.raises(ValueError):
            CLASSES[kind](params, **wrong)
    assert CLASSES[kind](params).param_groups[0]["params"] == [p]


# Numbers


NUMBERS = [np.float64(0.01), np.float32(0.01), np.float16(0.01), np.array(0.01), np.array(0.01, np.float32)]


@pytest.mark.parametrize("lr", NUMBERS)
def test_numbers_of_numpy_are_stored_as_pythons(lr):
    optimizer = FlashAdamW(
        make_params(),
        lr=lr,
        betas=(np.float64(0.9), np.float32(0.5)),
        weight_decay=np.int64(0),
        seed=np.int64(3),
        maximize=np.bool_(True),
        quantize=np.bool_(False),
    )
    optimizer.add_param_group({"params": make_params(seed=1), "lr": lr, "eps": np.float32(0.5)})
    optimizer.param_groups[0]["lr"] = lr
    optimizer.param_groups[1].update(weight_decay=np.float64(0.5), min_quantized_numel=np.int32(64))
    optimizer.param_groups[0].setdefault("initial_lr", lr)
    for group in optimizer.param_groups:
        values = [value for name, value in group.items() if name != "params"]
        values += [*group["betas"], *group.options.values()]
        assert all(type(value).__module__ != "numpy" for value in values)
        assert group["lr"] == float(lr) and type(group["lr"]) is float
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.5)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    optimizer.load_state_dict(torch.load(buffer, weights_only=True))


def test_a_schedule_of_numpys_numbers():
    params = make_params()
    optimizer = FlashAdamW(params, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float64(0.5) ** step)
    for step in range(3):
        run(optimizer, params, step, step + 1)
        scheduler.step()
    assert type(optimizer.param_groups[0]["lr"]) is float and optimizer.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_as_numbers(dtype):
    a, b = make_params(), make_params()
    numbers = FlashAdamW(a, lr=0.5, betas=(0.5, 0.75))
    tensors = FlashAdamW(b, lr=torch.tensor(0.5, dtype=dtype), betas=(torch.tensor(0.5), torch.tensor([0.75])))
    run(numbers, a, 0, 2)
    run(tensors, b, 0, 2)
    assert_same_bits((a, numbers), (b, tensors))
    tensors.param_groups[0]["lr"].fill_(0.25)
    tensors.param_groups[0]["betas"][0].fill_(0.25)
    numbers.param_groups[0].update(lr=0.25, betas=(0.25, 0.75))
    run(numbers, a, 2, 4)
    run(tensors, b, 2, 4)
    assert_same_bits((a, numbers), (b, tensors))


@pytest.mark.parametrize("kind", ["adam", "sgd", "lion"])
def test_a_learning_rate_of_0(kind):
    params = make_params(dtype=torch.float32)
    before = [p.detach().clone() for p in params]
    run(CLASSES[kind](params, lr=0), params, 0, 2)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


# Strings


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        (" .5 ", 0.5),
        ("24", 24),
        ("-3", -3),
        ("true", True),
        ("False", False),
        ("none", None),
        ("NULL", None),
        ("(0.9, 0.95)", (0.9, 0.95)),
        ("[0.9,0.95]", (0.9, 0.95)),
        ("(0.9, 0.95,)", (0.9, 0.95)),
        ("((1, 2), none)", ((1, 2), None)),
        ("()", ()),
        ("paper", "paper"),
        ("'paper'", "paper"),
        ('"1e-3"', 1e-3),
        ("inf", "inf"),
        ("1_000", "1_000"),
        ("", ""),
        (0.5, 0.5),
        (None, None),
        (np.float32(0.5), 0.5),
    ],
)
def test_values_of_strings(text, value):
    parsed = parse_optimizer_arguments({"x": text})["x"]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "arguments",
    [
        "lr=1e-3,betas=(0.9, 0.95),quantize=false,master_weight_bits=none,state_codec=paper",
        " lr = 1e-3 , betas=[0.9,0.95], quantize=False, master_weight_bits=None, state_codec='paper',",
        ["lr=1e-3", "betas=(0.9, 0.95)", "quantize=false", "master_weight_bits=none", "state_codec=paper"],
        {"lr": "1e-3", "betas": (0.9, 0.95), "quantize": False, "master_weight_bits": "none", "state_codec": "paper"},
    ],
)
def test_arguments_of_frameworks(arguments):
    parsed = parse_optimizer_arguments(arguments)
    assert parsed == {
        "lr": 1e-3,
        "betas": (0.9, 0.95),
        "quantize": False,
        "master_weight_bits": None,
        "state_codec": "paper",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no bits are kept below 16
        FlashAdamW(make_params(), **parsed)


@pytest.mark.parametrize("arguments", ["", [], {}])
def test_no_arguments(arguments):
    assert parse_optimizer_arguments(arguments) == {}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ("lr=1,betas=0.9,0.95", ValueError, r"'0.95' is no name=value; .* \(0.9, 0.95\)"),
        ("lr=1,lr=2", ValueError, "lr is given twice: 1 and '2'"),
        ("betas=(0.9, 0.95", ValueError, "parenthesis"),
        ("betas=0.9)", ValueError, "parenthesis"),
        ("2lr=1", ValueError, "'2lr' is no name"),
        (["lr"], ValueError, "'lr' is no name=value"),
        ([1], TypeError, "the entry 1 is a int"),
        ({1: "2"}, TypeError, "the name 1 is a int"),
        (7, TypeError, "arguments = 7 is a int"),
        (b"lr=1", TypeError, "bytes"),
    ],
)
def test_strings_that_are_no_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        parse_optimizer_arguments(arguments)


def test_constructors_take_no_strings_themselves():
    with pytest.raises(TypeError, match="lr = '1e-3' is a str"):
        FlashAdamW(make_params(), lr="1e-3")


# Modules that get their shapes later


@pytest.mark.parametrize("options", [{}, {"check_numerics": True, "state_codec": "paper"}])
def test_lazy_modules(options):
    torch.manual_seed(0)
    lazy = nn.Sequential(nn.LazyLinear(64), nn.Linear(64, 8))
    optimizer = FlashAdamW(lazy.parameters(), lr=0.1, **options)
    optimizer.zero_grad()
    optimizer.step()
    lazy[1].weight.grad = torch.ones_like(lazy[1].weight)
    optimizer.step()  # while others have no shape yet
    optimizer.load_state_dict(optimizer.state_dict())
    lazy(torch.ones(2, 96))
    ready = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 8))
    ready.load_state_dict(lazy.state_dict())
    twin = FlashAdamW(ready.parameters(), lr=0.1, **options)
    twin.load_state_dict(optimizer.state_dict())
    for model, its in ((lazy, optimizer), (ready, twin)):
        for _ in range(2):
            its.zero_grad()
            model(torch.ones(2, 96)).sum().backward()
            its.step()
    assert_same_bits((list(lazy.parameters()), optimizer), (list(ready.parameters()), twin))


def test_decoupled_decay_in_a_checkpoint_of_adam_is_warned_of():
    params = make_params(dtype=torch.float32)
    theirs = torch.optim.Adam(params, weight_decay=0.1, decoupled_weight_decay=True)
    with pytest.warns(UserWarning, match="decoupled_weight_decay=True of group 0 .* FlashAdamW"):
        CLASSES["adam"](params).load_state_dict(theirs.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CLASSES["adamw"](params).load_state_dict(theirs.state_dict())


# Names and hooks


def test_groups_of_named_parameters():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).bfloat16()
    for cls in (torch.optim.AdamW, FlashAdamW):
        optimizer = cls(model.named_parameters())
        assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
        with pytest.raises(ValueError, match="names"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == optimizer.param_groups[0]["param_names"]
    unnamed = FlashAdamW(model.parameters())
    unnamed.load_state_dict(saved)
    optimizer.load_state_dict(FlashAdamW(model.parameters()).state_dict())
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def hooked(cls, **options):
    """Everything that hooks see, in order."""
    params = [nn.Parameter(torch.ones(8, 8))]
    optimizer = cls(params, lr=0.1, **options)
    seen = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append("step pre"))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append("step post"))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append("step post 2"))
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda opt, d: {**d, "mark": sorted(d["state"])})
    optimizer.register_state_dict_post_hook(lambda opt, d: seen.append(("save post", d["mark"])))
    optimizer.register_state_dict_post_hook(lambda opt, d: seen.append("save post first"), prepend=True)
    optimizer.register_load_state_dict_pre_hook(lambda opt, d: seen.append(("load pre", d["mark"])))
    optimizer.register_load_state_dict_pre_hook(lambda opt, d: {**d, "mark": 2})
    optimizer.register_load_state_dict_pre_hook(lambda opt, d: seen.append(("load pre", d["mark"])))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("load post"))

    def closure():
        seen.append("closure")
        params[0].grad = torch.ones_like(params[0])
        return 5

    assert optimizer.step(closure) == 5
    optimizer.load_state_dict(optimizer.state_dict())
    return seen


def test_hooks_are_called_as_torchs_are():
    assert hooked(FlashAdamW) == hooked(torch.optim.AdamW)
    momentum = {"momentum": 0.9}  # plain SGD of torch has no states
    assert hooked(FlashSGD, compress_state_dict=False, **momentum) == hooked(torch.optim.SGD, **momentum)


def test_a_hook_sees_the_state_dict_that_is_returned():
    optimizer = FlashAdamW(make_params(shapes=[(96, 64)]))
    run(optimizer, optimizer.param_groups[0]["params"], 0, 1)
    seen = []
    optimizer.register_state_dict_post_hook(lambda opt, state_dict: seen.append(state_dict))
    assert optimizer.state_dict() is seen[0]
    assert seen[0]["state"][0]["exp_avg_scale"].dtype == torch.uint8


def test_what_the_package_offers():
    assert "parse_optimizer_arguments" in flashoptim_native.__all__
