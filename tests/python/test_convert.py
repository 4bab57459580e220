"""State dicts of others, converted: what their own packages say that a file holds is what our states hold.

tests/data/convert holds files that the packages wrote (make_samples.py there).
"""

import warnings
from pathlib import Path

import pytest
import torch

import flashoptim_native
from flashoptim_native import FlashAdamW, convert
from helpers import CLASSES, HYPERS, assert_same_bits, bits, make_params, run, set_grads

SAMPLES = Path(__file__).resolve().parents[1] / "data" / "convert"
KINDS = {"adamw": "adamw", "adamw8": "adamw", "lion8": "lion", "sgd8": "sgd", "sgd": "sgd", "ademamix8": "ademamix"}


def sample(name):
    held = convert.load(SAMPLES / f"{name}.pt")
    package, kind = name.split("_")[0], next(KINDS[part] for part in name.split("_") if part in KINDS)
    return held["saved"], held["expected"], package, kind


def fp32_states(saved, kind):
    """What a checkpoint holds, in fp32: states that are not quantized, of our format."""
    return convert.state_dict(saved, optimizer=kind, quantize=False)["state"]


def is_shown(values, expected):
    values = values.reshape(-1)
    assert values.numel() == expected["count"]
    torch.testing.assert_close(values[:64], expected["first"], rtol=2e-7, atol=0)
    # In double, of numbers that cancel.
    assert float(values.double().sum()) == pytest.approx(expected["sum"], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", sorted(path.stem for path in SAMPLES.glob("*.pt")))
def test_what_a_package_decodes_is_what_we_read(name):
    saved, expected, package, kind = sample(name)
    assert convert.detect(saved) == package
    states = fp32_states(saved, kind)
    assert states.keys() == expected.keys()
    for number, slots in expected.items():
        for slot, values in slots.items():
            if slot != "weights":
                assert states[number][slot].dtype == torch.float32
                is_shown(states[number][slot], values)
        if kind != "sgd":
            assert int(states[number]["step"]) == 3


@pytest.mark.parametrize("name", sorted(path.stem for path in SAMPLES.glob("reference*compressed.pt")))
def test_error_bits_of_the_reference_are_corrections(name):
    saved, expected, _, kind = sample(name)
    made = convert.state_dict(saved, optimizer=kind)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for number, shape in enumerate([(80,), (67, 62)]):
        weights[f"w{number}"] = torch.randn(shape, generator=generator).to(torch.bfloat16)
    merged = convert.fp32_weights(weights, made, names=list(weights))
    for number, slots in expected.items():
        is_shown(merged[f"w{number}"], slots["weights"])
    # The bits that they came as, in the paper's codec, where rows are whole groups.
    paper = convert.state_dict(saved, optimizer=kind, state_codec="paper", min_quantized_numel=0)
    slot = "exp_avg" if kind == "adamw" else "momentum_buffer"
    assert torch.equal(paper["state"][0][f"{slot}_codes"], saved["state"][0][f"{slot}::quantized"])


@pytest.mark.parametrize("name", sorted(path.stem for path in SAMPLES.glob("*.pt")))
def test_an_optimizer_goes_on_from_what_was_converted(name):
    saved, expected, _, kind = sample(name)
    shapes = [(64, 64), (80,), (67, 62)][: len(expected)]
    if name.startswith("reference"):
        shapes = [(80,), (67, 62)]
    params = make_params(torch.bfloat16, shapes)
    optimizer = CLASSES[kind](params, lr=1e-3, master_weight_bits=32 if "sgd_" in name else 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(convert.state_dict(saved, optimizer=kind))
    run(optimizer, params, 0, 1)
    assert all(torch.isfinite(param).all() for param in params)
    assert kind == "sgd" or int(optimizer.state[params[0]]["step"]) == 4


# torch.optim, both ways


def torch_pair(cls, steps=3, **more):
    params = make_params(torch.float32, [(96, 64), (50,), (8, 4, 3, 3)])
    optimizer = cls(params, lr=1e-3, **more)
    run(optimizer, params, 0, steps)
    return params, optimizer


TORCH = [
    (torch.optim.AdamW, "adamw", {}),
    (torch.optim.AdamW, "adamw", {"fused": True}),
    (torch.optim.AdamW, "adamw", {"foreach": True}),
    (torch.optim.Adam, "adam", {"weight_decay": 0.1}),
    (torch.optim.SGD, "sgd", {"momentum": 0.9, "nesterov": True}),
]


@pytest.mark.parametrize(("cls", "kind", "more"), TORCH)
def test_torch_states_go_through_fp32_states_of_ours_exactly(cls, kind, more):
    _, optimizer = torch_pair(cls, **more)
    saved = optimizer.state_dict()
    back = convert.state_dict(convert.state_dict(saved, quantize=False), "torch")
    for number, held in saved["state"].items():
        for key, value in held.items():
            if value is not None:
                assert torch.equal(back["state"][number][key], value), key
    again = cls(make_params(torch.float32, [(96, 64), (50,), (8, 4, 3, 3)]), lr=7.0)
    again.load_state_dict(back)
    assert again.param_groups[0]["lr"] == 1e-3
    assert kind != "sgd" or again.param_groups[0]["nesterov"]


#: By codec and decades of spread over 96 gradients: RMS error of exp_avg and exp_avg_sq, the largest relative one of
#: exp_avg_sq (docs/convert.md, "Error").
BOUNDS = {
    ("default", 1): (0.008, 0.008, 0.02),
    ("default", 5): (0.008, 0.035, 0.07),
    ("paper", 1): (0.008, 0.005, 0.03),
    ("paper", 5): (0.008, 0.005, None),
}


@pytest.mark.parametrize(("codec", "decades"), BOUNDS)
def test_torch_to_ours_to_torch_is_within_the_stated_error(codec, decades):
    params = make_params(torch.float32, [(96, 64), (64, 96)])
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            scale = torch.logspace(-1 - decades, -1, param.shape[1])
            param.grad = torch.randn(param.shape, generator=generator) * scale
        optimizer.step()
    saved = optimizer.state_dict()
    back = convert.state_dict(convert.state_dict(saved, state_codec=codec), "torch")
    for number, held in saved["state"].items():
        assert torch.equal(back["state"][number]["step"], held["step"])
        for slot, bound in zip(("exp_avg", "exp_avg_sq"), BOUNDS[codec, decades]):
            wanted, got = held[slot].double(), back["state"][number][slot].double()
            assert float((wanted - got).norm() / wanted.norm()) < bound
        if (largest := BOUNDS[codec, decades][2]) is not None:
            assert float(((wanted - got).abs() / wanted).max()) < largest
        elif codec == "paper":
            assert int((got == 0).sum()) > 0 or number  # what the default codec is there for


def test_amsgrad_is_dropped_with_a_warning():
    _, optimizer = torch_pair(torch.optim.AdamW, amsgrad=True)
    with pytest.warns(UserWarning, match="max_exp_avg_sq"):
        made = convert.state_dict(optimizer.state_dict(), quantize=False)
    assert set(made["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}


def test_what_a_checkpoint_does_not_tell_is_asked_for():
    _, optimizer = torch_pair(torch.optim.AdamW)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["decoupled_weight_decay"]  # as before torch 2.7
    with pytest.raises(ValueError, match="'adamw' or 'adam'"):
        convert.state_dict(saved)
    assert convert.state_dict(saved, optimizer="adam")["param_groups"][0]["flashoptim_native.adam.2"] is not None
    with pytest.raises(ValueError, match="'lion'.*'adamw' or 'adam'"):
        convert.state_dict(saved, optimizer="lion")


def test_decoupled_decay_of_the_learning_rate_becomes_torchs():
    params = make_params(torch.float32, [(96, 64)])
    optimizer = FlashAdamW(params, lr=1e-2, weight_decay=1e-3, decouple_lr=True, quantize=False)
    run(optimizer, params, 0, 2)
    made = convert.state_dict(optimizer.state_dict(), "torch")
    assert made["param_groups"][0]["weight_decay"] == pytest.approx(0.1)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    theirs = torch.optim.AdamW(others, lr=1.0)
    theirs.load_state_dict(made)
    for one, tensors in ((optimizer, params), (theirs, others)):
        one.param_groups[0]["lr"] = 5e-3
        set_grads(tensors, 7)
        one.step()
    torch.testing.assert_close(params[0], others[0], rtol=0, atol=1e-6)


# Ours


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("codec", ["default", "paper"])
def test_ours_stays_as_it_is_and_changes_format_as_loading_does(kind, codec):
    params = make_params()
    optimizer = CLASSES[kind](params, **HYPERS[kind], state_codec=codec, min_quantized_numel=64, seed=5)
    run(optimizer, params, 0, 3)
    saved = optimizer.state_dict()
    same = convert.state_dict(saved)
    assert all(torch.equal(same[key], saved[key]) for key in saved if key.startswith("flashoptim"))
    for number, held in saved["state"].items():
        assert held.keys() == same["state"][number].keys()
        assert all(bits(value) == bits(same["state"][number][key]) for key, value in held.items())
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    loaded, converted = (
        CLASSES[kind](others, **HYPERS[kind], state_codec="paper", quantize=False, seed=5) for _ in range(2)
    )
    loaded.load_state_dict(saved)
    converted.load_state_dict(convert.state_dict(saved, state_codec="paper", quantize=False))
    assert_same_bits((others, loaded), (others, converted))


def test_fp32_weights_become_16_bits_and_corrections():
    model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run(optimizer, list(model.parameters()), 0, 2)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    made = convert.state_dict(optimizer.state_dict(), weights=weights, names=names)
    narrow = convert.narrow_weights(weights)
    model.load_state_dict(narrow, assign=True)
    ours = FlashAdamW(model.parameters(), lr=1e-3)
    ours.load_state_dict(made)
    merged = ours.get_fp32_model_state_dict(model)
    for name, value in weights.items():
        # Half a unit in the last place of bf16, over 127 (docs/state_format.md, "Correction").
        assert float(((merged[name] - value).abs() / value.abs()).max()) < 2.0**-8 / 127
        assert torch.equal(merged[name], convert.fp32_weights(narrow, made, names)[name])
    run(ours, list(model.parameters()), 2, 3)


def test_a_correction_is_not_widened_without_weights():
    params = make_params()
    optimizer = FlashAdamW(params)
    run(optimizer, params, 0, 1)
    with pytest.raises(ValueError, match="give the fp32 weights"):
        convert.state_dict(optimizer.state_dict(), master_weight_bits=32)


# What is refused


def test_unknown_and_damaged_dicts_are_refused():
    params, optimizer = torch_pair(torch.optim.AdamW)
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="no format that is known"):
        convert.state_dict({"state": {0: {"shampoo": torch.zeros(3)}}, "param_groups": saved["param_groups"]})
    with pytest.raises(TypeError, match="a list; allowed is a dict"):
        convert.state_dict([])
    with pytest.raises(ValueError, match="'numpy'; allowed|to = 'numpy' is not allowed"):
        convert.state_dict(saved, "numpy")
    with pytest.raises(ValueError, match="takes no quantize"):
        convert.state_dict(saved, "torch", quantize=False)
    nan = {**saved, "state": {**saved["state"], 0: {**saved["state"][0], "exp_avg": torch.full((96, 64), torch.nan)}}}
    with pytest.raises(ValueError, match="parameter 0.*finite numbers"):
        convert.state_dict(nan, quantize=False)
    ours = convert.state_dict(saved)
    ours["state"][0]["exp_avg_codes"][0, 0] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        convert.state_dict(ours)
    assert convert.state_dict(ours, verify=False)["state"][0]["exp_avg_codes"].dtype == torch.uint8
    lion = CLASSES["lion"](params)
    run(lion, params, 0, 1)
    with pytest.raises(ValueError, match="torch.optim has no lion"):
        convert.state_dict(lion.state_dict(), "torch")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bitsandbytes_adamw8", lambda s: s["__bnb_optimizer_quant_state__"].pop("absmax1"), "lacks absmax1"),
        ("bitsandbytes_adamw8", lambda s: s.update(extra=1), "holds extra, which bitsandbytes does not write"),
        ("reference_014_adamw_compressed", lambda s: s.pop("exp_avg::scales"), "lacks exp_avg::scales"),
        ("reference_014_adamw_compressed", lambda s: s.update(error_bits=s["error_bits"] + 500), "-127 to 127"),
        ("reference_014_adamw_compressed", lambda s: s.update(new=0), "holds new, which the reference does not write"),
        ("torchao_adamw_8", lambda s: s.pop("step"), "lacks step"),
        ("torchao_adamw_8", lambda s: setattr(s["exp_avg"], "scale", torch.ones(7)), "whole blocks"),
    ],
)
def test_states_that_lack_something_are_refused_by_name(name, change, message):
    saved, _, _, kind = sample(name)
    change(saved["state"][0])
    with pytest.raises(ValueError, match=message):
        convert.state_dict(saved, optimizer=kind)


def test_our_load_names_the_converter_for_the_checkpoints_of_others():
    for name in ("reference_014_sgd_compressed", "reference_013_adamw_compressed", "bitsandbytes_adamw8"):
        saved, _, _, kind = sample(name)
        shapes = [(64, 64), (80,), (67, 62)] if name.startswith("bits") else [(80,), (67, 62)]
        params = make_params(torch.bfloat16, shapes)
        optimizer = CLASSES[kind](params)
        with pytest.raises(ValueError, match=r"flashoptim_native\.convert"):
            optimizer.load_state_dict(saved)
        assert not optimizer.state


def test_names():
    assert sorted(convert.__all__) == [
        "Expected", "SlotError", "detect", "expected", "expected_weights", "file", "fp32_weights", "load",
        "load_weights", "narrow_weights", "state_dict", "weights_file",
    ]  # fmt: skip
    assert flashoptim_native.convert is convert
