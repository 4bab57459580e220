"""The C++ front end and the Python package leave the same bytes on the same inputs.

The C++ side is the program tests/front_ends/front_end_bytes, named by FLASHOPTIM_FRONT_END_BYTES.
"""

import json
import os
import subprocess
import warnings
import zlib

import pytest
import safetensors.torch
import torch

from flashoptim_native import FlashAdamW, _ops, convert, enable_gradient_release
from helpers import CLASSES

PROGRAM = os.environ.get("FLASHOPTIM_FRONT_END_BYTES")
SHAPES = [(64, 100), (5000,), (33,), (3, 7), (8, 32, 3, 3)]
STEPS = 7

KNOWN = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "momentum": 0.8, "dampening": 0.2, "nesterov": False}


def of_hyperparameters(kind):
    """The same as value_of in tests/front_ends/front_end_bytes.cpp."""
    known = KNOWN | ({"dampening": 0.0, "nesterov": True} if kind == "sgdw" else {})
    arguments, betas = {}, []
    for one in _ops.describe(kind).hyperparameters[6:]:
        other = 5 if one.kind == "whole" else 0.975 if one.highest == 1.0 else 0.5 * one.default + 1.0
        if one.name.removeprefix("beta").isdigit():
            betas.append(known.get(one.name, other))
        else:
            arguments[one.name] = known.get(one.name, other)
    return arguments | ({"betas": tuple(betas)} if betas else {})


def ramp(shape, slope, offset):
    numel = torch.Size(shape).numel()
    return torch.sin(torch.arange(numel, dtype=torch.float64) * slope + offset).reshape(shape)


def raw(tensor):
    if tensor is None or tensor.numel() == 0:
        return b""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


@pytest.fixture(scope="module")
def cpp_bytes(tmp_path_factory):
    if not PROGRAM:
        pytest.skip("FLASHOPTIM_FRONT_END_BYTES names no program: the C++ front end was not built")
    folder = tmp_path_factory.mktemp("front_ends")
    subprocess.run([PROGRAM, str(folder)], check=True)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [None, 24, 32])
@pytest.mark.parametrize("codec", ["default", "paper"])
@pytest.mark.parametrize("name", list(CLASSES))
def test_same_bytes(cpp_bytes, name, codec, bits, dtype):
    cls, arguments = CLASSES[name], of_hyperparameters(name)
    params = [torch.nn.Parameter((ramp(s, 0.37, i) * 0.5).to(dtype)) for i, s in enumerate(SHAPES)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # master_weight_bits=None with 16-bit parameters warns
        opt = cls(params, lr=3e-3, weight_decay=0.1, state_codec=codec, master_weight_bits=bits, seed=7, **arguments)
    for t in range(STEPS):
        for i, p in enumerate(params):
            p.grad = (ramp(SHAPES[i], 0.11 * (t + 1), i) * 1e-2).to(dtype)
        opt.step()
    python = b""
    for p in params:
        state = opt.state[p]
        python += raw(p) + raw(state.get("correction"))
        for slot in _ops.state_names(name, True):
            python += raw(state.get(slot + "_codes", state.get(slot))) + raw(state.get(slot + "_scale"))
    file = cpp_bytes / f"{name}-{codec}-{bits or 0}-{str(dtype).removeprefix('torch.')}.bin"
    assert python == file.read_bytes()


def loss_of(params, step):
    """Whose gradients are those of test_same_bytes."""
    loss = torch.zeros(())
    for i, p in enumerate(params):
        loss = loss + (p * (ramp(SHAPES[i], 0.11 * (step + 1), i) * 1e-2).to(p.dtype)).sum().float()
    return loss


def bytes_of(opt, params):
    held = b""
    for p in params:
        state = opt.state[p]
        held += raw(p) + raw(state.get("correction"))
        for slot in _ops.state_names("adamw", True):
            held += raw(state.get(slot + "_codes", state.get(slot))) + raw(state.get(slot + "_scale"))
    return held


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("way", ["none", "two_pass", "previous", "parameter", "step"])
def test_same_bytes_of_released_and_clipped_gradients(cpp_bytes, way, dtype):
    params = [torch.nn.Parameter((ramp(s, 0.37, i) * 0.5).to(dtype)) for i, s in enumerate(SHAPES)]
    opt = FlashAdamW(params, lr=3e-3, weight_decay=0.1, seed=7)
    handle = None
    if way != "step":
        options = {} if way == "none" else {"clip": way, "max_norm": 0.25}
        handle = enable_gradient_release(params, opt, **options, norm_decay=0.25 if way == "previous" else 0.0)
    for t in range(STEPS):
        loss = loss_of(params, t)
        if way == "two_pass":
            with handle.measure_norm():
                loss.backward(retain_graph=True)
        loss.backward()
        if way == "step":
            assert opt.clip_grad_norm_(0.25) > 0.25, "something is clipped"
        opt.step()
        opt.zero_grad()
    if handle is not None and way != "none":
        assert handle.grad_norm > 0.25, "something is clipped"
    file = cpp_bytes / f"clip-{way}-{str(dtype).removeprefix('torch.')}.bin"
    assert bytes_of(opt, params) == file.read_bytes()


# ---- a run that changes from one front end to the other ------------------------------------------------------------


def trained():
    """The same run as `train` of tests/front_ends/front_end_bytes.cpp: parameters, optimizer."""
    params = [torch.nn.Parameter((ramp(s, 0.37, i) * 0.5).bfloat16()) for i, s in enumerate(SHAPES)]
    last = (ramp((6, 40, 2, 3), 0.37, 9) * 0.5).bfloat16().to(memory_format=torch.channels_last)
    params.append(torch.nn.Parameter(last))
    groups = [{"params": params[:2]}]
    groups += [{"params": params[2:], "lr": 1e-3, "state_codec": "paper", "master_weight_bits": 32}]
    return params, FlashAdamW(groups, lr=3e-3, weight_decay=0.1, seed=7, min_quantized_numel=0)


def load(folder, step, params, opt):
    """A file of the C++ front end's as docs/state_format.md, "Safetensors", says it, without any code of ours."""
    with safetensors.safe_open(folder / f"{step}.weights.safetensors", "pt") as file:
        for i, p in enumerate(params):
            p.data.copy_(file.get_tensor(str(i)))
    path = folder / f"{step}.state.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        said = file.metadata()
    state = {}
    for key, tensor in safetensors.torch.load_file(path).items():
        _, number, name = key.split(".")
        state.setdefault(int(number), {})[name] = tensor
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    text = said["flashoptim_native.param_groups"]
    assert zlib.crc32(data, zlib.crc32(text.encode())) == int(said["flashoptim_native.checksum"])
    assert said["flashoptim_native.optimizer"] == "adamw" and said["flashoptim_native.format"] == "2"
    groups = json.loads(text)
    for group in groups:
        described = json.dumps(group["flashoptim_native.adamw.2"]).encode()
        group["flashoptim_native.adamw.2"] = torch.frombuffer(bytearray(described.ljust(512)), dtype=torch.uint8)
    opt.load_state_dict({"state": state, "param_groups": groups})


def save(folder, step, params, opt):
    weights = {str(i): p.detach().contiguous() for i, p in enumerate(params)}
    safetensors.torch.save_file(weights, folder / f"{step}.weights.safetensors")
    state_dict = opt.state_dict()
    groups = [
        {key: json.loads(bytes(v.tolist())) if isinstance(v, torch.Tensor) else v for key, v in group.items()}
        for group in state_dict["param_groups"]
    ]
    text = json.dumps(groups)
    tensors = {f"state.{n}.{k}": v for n, held in state_dict["state"].items() for k, v in held.items()}
    tensors["flashoptim_native.weights"] = state_dict["flashoptim_native.weights"]
    said = {"format": "pt", "flashoptim_native.format": "2", "flashoptim_native.optimizer": "adamw"}
    said |= {"flashoptim_native.library": "test", "flashoptim_native.param_groups": text}
    path = folder / f"{step}.state.safetensors"
    safetensors.torch.save_file(tensors, path, said | {"flashoptim_native.checksum": "0" * 10})
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    said["flashoptim_native.checksum"] = str(zlib.crc32(data, zlib.crc32(text.encode())))
    safetensors.torch.save_file(tensors, path, said)


def load_converted(folder, step, params, opt, suffix):
    """The same by convert, which reads what C++ wrote: a safetensors file, or an archive."""
    with safetensors.safe_open(folder / f"{step}.weights.safetensors", "pt") as file:
        for i, p in enumerate(params):
            p.data.copy_(file.get_tensor(str(i)))
    convert.file(folder / f"{step}.state.{suffix}", folder / f"{step}.pt")
    opt.load_state_dict(torch.load(folder / f"{step}.pt"))


def save_converted(folder, step, params, opt, suffix):
    weights = {str(i): p.detach().contiguous() for i, p in enumerate(params)}
    safetensors.torch.save_file(weights, folder / f"{step}.weights.safetensors")
    torch.save(opt.state_dict(), folder / f"{step}.python.pt")
    convert.file(folder / f"{step}.python.pt", folder / f"{step}.state.{suffix}", to=suffix)


def run_cpp(folder, first, last, *more):
    if not PROGRAM:
        pytest.skip("FLASHOPTIM_FRONT_END_BYTES names no program: the C++ front end was not built")
    subprocess.run([PROGRAM, "train", str(folder), str(first), str(last), *more], check=True)


@pytest.mark.parametrize("way", ["by hand", "safetensors", "archive"])
def test_a_run_that_goes_from_cpp_to_python_and_back_is_the_uninterrupted_one(tmp_path, way):
    whole, changing = tmp_path / "whole", tmp_path / "changing"
    for folder in (whole, changing):
        folder.mkdir()
    run_cpp(whole, 0, 9)
    run_cpp(changing, 0, 3)
    params, opt = trained()
    load(changing, 3, params, opt) if way == "by hand" else load_converted(changing, 3, params, opt, way)
    for t in range(3, 6):
        for i, p in enumerate(params):
            p.grad = (ramp(p.shape, 0.11 * (t + 1), i) * 1e-2).bfloat16()
        opt.step()
    save(changing, 6, params, opt) if way == "by hand" else save_converted(changing, 6, params, opt, way)
    run_cpp(changing, 6, 9, *(["archive"] if way == "archive" else []))
    for what in ("weights", "state"):
        names = [folder / f"9.{what}.safetensors" for folder in (whole, changing)]
        ours, theirs = (safetensors.torch.load_file(name) for name in names)
        assert ours.keys() == theirs.keys() and len(ours) > 5
        for key, value in ours.items():
            assert value.dtype == theirs[key].dtype and raw(value) == raw(theirs[key]), key
    with safetensors.safe_open(names[0], "pt") as a, safetensors.safe_open(names[1], "pt") as b:
        groups = [json.loads(one.metadata()["flashoptim_native.param_groups"]) for one in (a, b)]
    assert groups[0] == groups[1]


def test_what_cpp_wrote_loads_by_convert_as_it_is(tmp_path):
    """A file and an archive of one moment hold one state, and it is what Python has at that moment, byte for byte."""
    run_cpp(tmp_path, 0, 3)
    params, opt = trained()
    for t in range(3):
        for i, p in enumerate(params):
            p.grad = (ramp(p.shape, 0.11 * (t + 1), i) * 1e-2).bfloat16()
        opt.step()
    for suffix in ("safetensors", "archive"):
        others, loaded = trained()
        load_converted(tmp_path, 3, others, loaded, suffix)
        (tmp_path / "3.pt").unlink()
        assert bytes_of(loaded, others) == bytes_of(opt, params)
        assert all(loaded.state[q]["step"] == 3 for q in others)


def test_an_archive_that_cpp_wrote_for_torch_is_refused_by_name(tmp_path):
    run_cpp(tmp_path, 0, 1)
    with pytest.raises(ValueError, match="torch.archive"):
        convert.file(tmp_path / "1.torch.archive", tmp_path / "1.pt")
    assert not (tmp_path / "1.pt").exists()
