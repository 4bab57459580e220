"""Checkpoints from file to file: whole or not at all, in little memory, to and from C++."""

import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

from flashoptim_native import FlashAdamW, convert
from flashoptim_native.convert import _files
from helpers import CLASSES, HYPERS, SHAPES, bits, make_params, run, set_grads

DATA = Path(__file__).resolve().parents[1] / "data"


def saved_by(kind, codec="default", shapes=SHAPES, dtype=torch.bfloat16, **more):
    params = make_params(dtype, shapes)
    params.append(
        torch.nn.Parameter(torch.randn(6, 8, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last))
    )
    optimizer = CLASSES[kind](params, **HYPERS[kind], state_codec=codec, min_quantized_numel=64, **more)
    run(optimizer, params, 0, 2)
    return params, optimizer, optimizer.state_dict()


def same_states(a, b):
    assert a["state"].keys() == b["state"].keys()
    for number, held in a["state"].items():
        other = b["state"][number]
        assert held.keys() == other.keys(), number
        for key, value in held.items():
            assert value.dtype == other[key].dtype and value.shape == other[key].shape, key
            assert bits(value) == bits(other[key]), (number, key)


@pytest.mark.parametrize("target", ["ours.pt", "ours.safetensors", "archive"])
@pytest.mark.parametrize(("kind", "codec"), [("adamw", "default"), ("sgd", "paper"), ("ademamix", "default")])
def test_ours_to_a_file_and_back_is_the_same_bytes(tmp_path, kind, codec, target):
    params, _, saved = saved_by(kind, codec, **({"decouple_lr": True} if kind == "adamw" else {}))
    torch.save(saved, tmp_path / "saved.pt")
    to = "archive" if target == "archive" else None
    convert.file(tmp_path / "saved.pt", tmp_path / target, to)
    convert.file(tmp_path / target, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt")
    same_states(saved, back)
    if target != "archive":  # which has no checksums of the weights, and no first learning rates
        assert all(torch.equal(saved[key], back[key]) for key in saved if key.startswith("flashoptim"))
    optimizers = []
    for source in (saved, back):
        others = [torch.nn.Parameter(param.detach().clone()) for param in params]
        optimizer = CLASSES[kind](others, **{**HYPERS[kind], "lr": 1.0}, state_codec=codec, min_quantized_numel=64)
        optimizer.load_state_dict(source)
        set_grads(others, 5)
        optimizer.step()
        optimizers.append(others)
    assert all(torch.equal(a, b) for a, b in zip(*optimizers))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["saved.pt", target, "back.pt"])


@pytest.mark.parametrize(("name", "kind"), [("adamw_format1", "adamw"), ("lion_paper_format1", "lion")])
def test_archives_that_cpp_wrote_hold_what_cpp_decoded(tmp_path, name, kind):
    source = DATA / "archives" / f"{name}.pt"
    convert.file(source, tmp_path / "ours.pt", key="optimizer", quantize=False, weights=None)
    states = torch.load(tmp_path / "ours.pt")["state"]
    module = torch.jit.load(source)
    weights = {}
    for number, held in states.items():
        for slot in ("exp_avg", "exp_avg_sq") if kind == "adamw" else ("exp_avg",):
            value = held[slot]
            order = held.get("storage_order")
            if order is not None:  # shown in the order of memory
                value = value.permute([order.tolist().index(d) for d in range(value.dim())])
            assert torch.equal(value, getattr(module, f"{slot}{number}")), (number, slot)
        weights[f"w{number}"] = getattr(module, f"param{number}").detach()
    merged = convert.fp32_weights(weights, torch.load(tmp_path / "ours.pt"), list(weights))
    for number in states:
        assert torch.equal(merged[f"w{number}"], getattr(module, f"weight{number}"))


def test_an_optimizer_inside_a_larger_file_is_named_and_the_rest_stays(tmp_path):
    _, optimizer, _ = saved_by("adamw")
    theirs = torch.optim.AdamW(make_params(torch.float32), lr=1e-2)
    run(theirs, theirs.param_groups[0]["params"], 0, 1)
    torch.save({"train": {"optimizer": theirs.state_dict()}, "epoch": 3, "w": torch.ones(4)}, tmp_path / "all.pt")
    with pytest.raises(ValueError, match="it holds 'train', 'epoch', 'w'"):
        convert.file(tmp_path / "all.pt", tmp_path / "no.pt")
    with pytest.raises(ValueError, match="no 'optim' there; it holds 'optimizer'"):
        convert.file(tmp_path / "all.pt", tmp_path / "no.pt", key="train.optim")
    convert.file(tmp_path / "all.pt", tmp_path / "new.pt", key="train.optimizer")
    made = torch.load(tmp_path / "new.pt")
    assert made["epoch"] == 3 and torch.equal(made["w"], torch.ones(4))
    optimizer = FlashAdamW(make_params(torch.bfloat16), lr=1.0)
    optimizer.load_state_dict(made["train"]["optimizer"])
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert not (tmp_path / "no.pt").exists()


def test_files_are_not_overwritten_and_not_left_in_parts(tmp_path, monkeypatch):
    _, _, saved = saved_by("adamw")
    torch.save(saved, tmp_path / "saved.pt")
    for function, more in ((convert.file, {}), (convert.weights_file, {"dtype": torch.bfloat16})):
        (tmp_path / "old").write_bytes(b"old")
        with pytest.raises(FileExistsError, match="is not overwritten"):
            function(tmp_path / "saved.pt", tmp_path / "old", **more)
        assert (tmp_path / "old").read_bytes() == b"old"
    for to in ("flashoptim", "safetensors", "archive"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "no space left on device")))
            with pytest.raises(OSError, match="no space left"):
                convert.file(tmp_path / "saved.pt", tmp_path / "new", to)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "saved.pt"]


def in_a_fork(function):
    """What a child that calls ``function`` exits with; importing torch anew would take longer than all of it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # the parent's are not here
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("late", [False, True])
def test_a_kill_leaves_no_file_or_a_whole_one(tmp_path, monkeypatch, late):
    """Before the file is renamed, and behind it."""
    _, _, saved = saved_by("adamw")
    torch.save(saved, tmp_path / "saved.pt")
    real = _files.flush

    def flush(path):
        if late == (path == tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
        real(path)

    monkeypatch.setattr(_files, "flush", flush)
    assert in_a_fork(lambda: convert.file(tmp_path / "saved.pt", tmp_path / "new.pt")) == -signal.SIGKILL
    assert (tmp_path / "new.pt").exists() == late
    if late:
        same_states(saved, torch.load(tmp_path / "new.pt"))


CONVERSION = """
import sys, torch
from pathlib import Path
from flashoptim_native import convert
from flashoptim_native.convert import _files

def own_memory():  # bytes of this process that are no file's
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) << 10

folder, shown = Path(sys.argv[1]), torch.rand(512, 1024)
optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.empty(512, 1024, device="meta")) for _ in range(12)])
saved = optimizer.state_dict()
for number in range(12):
    saved["state"][number] = {"step": torch.tensor(3.0), "exp_avg": shown + number, "exp_avg_sq": shown * number}
torch.save(saved, folder / "large.pt")
convert.state_dict(saved, quantize=False)  # what the first call makes
del saved
keep, seen = _files.Scratch.keep, []
_files.Scratch.keep = lambda self, one: (seen.append(own_memory()), keep(self, one))[1]
before = own_memory()
convert.file(folder / "large.pt", folder / "ours.pt", quantize=False)
convert.file(folder / "ours.pt", folder / "ours.safetensors")
convert.file(folder / "ours.safetensors", folder / "torch.pt", to="torch")
back = torch.load(folder / "torch.pt", mmap=True)["state"]
for n in back:
    assert torch.equal(back[n]["exp_avg_sq"], shown * n) and torch.equal(back[n]["exp_avg"], shown + n)
print(len(seen), max(seen) - before)
"""


def test_a_checkpoint_is_converted_parameter_by_parameter(tmp_path):
    """48 MB of states take at no time more memory than one parameter of 2 MB and some copies of it.

    In a process of its own, whose allocator gives back at once what is freed.
    """
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", CONVERSION, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls, most = map(int, done.stdout.split())
    assert calls > 60 and most < 24 << 20, (calls, most)


# Weights


def test_consolidated_fp32_weights_become_16_bit_files_and_come_back(tmp_path):
    """As DeepSpeed's zero_to_fp32.py writes them: one pytorch_model.bin, or several and an index."""
    weights = {"a.weight": torch.randn(96, 64), "b.bias": torch.randn(50), "steps": torch.tensor(3)}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    parts = tmp_path / "parts"
    parts.mkdir()
    torch.save({"a.weight": weights["a.weight"]}, parts / "one.bin")
    torch.save({"b.bias": weights["b.bias"], "steps": weights["steps"]}, parts / "two.bin")
    index = '{"weight_map": {"a.weight": "one.bin", "b.bias": "two.bin", "steps": "two.bin"}}'
    (parts / "pytorch_model.bin.index.json").write_text(index)
    convert.weights_file(tmp_path / "pytorch_model.bin", tmp_path / "16.safetensors", dtype=torch.bfloat16)
    convert.weights_file(parts, tmp_path / "16.pt", dtype=torch.float16, keep_fp32=["b.*"])
    narrow = convert.load_weights(tmp_path / "16.safetensors")
    assert torch.equal(narrow["a.weight"], weights["a.weight"].bfloat16()) and narrow["steps"] == 3
    other = torch.load(tmp_path / "16.pt")
    assert torch.equal(other["b.bias"], weights["b.bias"]) and other["a.weight"].dtype == torch.float16

    names = ["a.weight", "b.bias"]
    fresh = torch.optim.AdamW([weights[name].clone() for name in names]).state_dict()
    torch.save(convert.state_dict(fresh, weights=weights, names=names, master_weight_bits=32), tmp_path / "opt.pt")
    convert.weights_file(
        tmp_path / "16.safetensors", tmp_path / "32.safetensors", optimizer_file=tmp_path / "opt.pt", names=names
    )
    merged = convert.load_weights(tmp_path / "32.safetensors")
    for name in names:
        torch.testing.assert_close(merged[name], weights[name], rtol=2.0**-23, atol=0)
    with pytest.raises(ValueError, match="allowed is one of them"):
        convert.weights_file(parts, tmp_path / "no.pt")
    with pytest.raises(ValueError, match="names holds 1 names"):
        convert.weights_file(
            tmp_path / "16.pt", tmp_path / "no.pt", optimizer_file=tmp_path / "opt.pt", names=["a.weight"]
        )


# Damage


@pytest.mark.parametrize("target", ["ours.safetensors", "archive"])
def test_damage_is_told(tmp_path, target):
    _, _, saved = saved_by("adamw", shapes=[(64, 64)])
    torch.save(saved, tmp_path / "saved.pt")
    convert.file(tmp_path / "saved.pt", tmp_path / target, "archive" if target == "archive" else None)
    data = (tmp_path / target).read_bytes()
    for at in range(5, len(data), len(data) // 40):
        (tmp_path / target).write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        with pytest.raises((ValueError, RuntimeError)):
            convert.file(tmp_path / target, tmp_path / "back.pt")
        (tmp_path / target).write_bytes(data[: min(at, len(data) - 64)])
        with pytest.raises((ValueError, RuntimeError, OSError)):
            convert.file(tmp_path / target, tmp_path / "back.pt")
    assert not (tmp_path / "back.pt").exists()


def test_objects_in_a_file_are_not_run(tmp_path):
    torch.save({"state": {}, "param_groups": [{"params": [], "x": Path("/")}]}, tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match="holds other things than tensors"):
        convert.file(tmp_path / "hostile.pt", tmp_path / "new.pt")


def test_progress_is_a_line_on_stderr(tmp_path, capsys):
    _, _, saved = saved_by("adamw")
    torch.save(saved, tmp_path / "saved.pt")
    convert.file(tmp_path / "saved.pt", tmp_path / "new.pt", progress=True)
    said = capsys.readouterr().err
    assert "saved.pt -> new.pt" in said and "%" in said
    convert.file(tmp_path / "saved.pt", tmp_path / "other.pt")
    assert capsys.readouterr().err == ""
