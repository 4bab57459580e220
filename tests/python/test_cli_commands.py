"""The command flashoptim-native: what it prints, its exit codes, and that mistakes end without a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import flashoptim_native
from flashoptim_native import checkpoint_contents, cli, diagnosis, planning

pytest.importorskip("typer")
from typer.testing import CliRunner

from flashoptim_native.cli._app import app

PACKAGE = Path(flashoptim_native.__file__).resolve().parents[1]
SAMPLES = Path(__file__).resolve().parents[1] / "data" / "convert"

MODELS = """
from torch import nn


def mlp():
    return nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 100))


def wide():
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 4, 3, padding=1))


def by_values():
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x[x.sum(1) > 0])

    return Chosen()


def needs_arguments(size):
    return nn.Linear(size, size)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command in a folder with a module of models; gives exit code and output."""
    (tmp_path / "some_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "some_models", raising=False)

    def call(*arguments):
        result = CliRunner().invoke(app, [str(one) for one in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output

    return call


def test_plan_prints_a_table_and_bars(run):
    code, output = run("plan", "some_models:mlp", "--gpu", 1)
    assert code == 0
    for word in ("activations", "FlashAdamW 24 bit, release", "bitsandbytes 8-bit", "fits 1", "█"):
        assert word in output


def test_plan_as_json_is_one_document(run):
    code, output = run("plan", "some_models:mlp", "--json", "--format", "24")
    assert code == 0
    said = json.loads(output)
    parameters = 512 * 2048 + 2048 + 2048 * 100 + 100
    assert said["parameters"] == parameters
    ours = {one["title"]: one for one in said["choices"]}["FlashAdamW 24 bit"]
    assert ours["peak_bytes"] == sum(ours["parts"].values())


def test_plan_says_when_nothing_fits(run):
    code, output = run("plan", "some_models:mlp", "--gpu", 0.005)
    assert code == 1
    assert "Nothing of ours fits" in output


def test_plan_says_when_activations_dominate(run):
    _, output = run("plan", "some_models:wide", "--batch", 4, "--size", 128)
    assert "saves nothing" in output
    assert "gradient accumulation" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "some_models:by_values"], "without memory"),
        (["plan", "some_models:nothing"], "has no function 'nothing'"),
        (["plan", "some_models:needs_arguments"], "needs size"),
        (["plan", "no_such_module:f"], "cannot be imported"),
        (["plan", "no/such/file"], "allowed are"),
        (["plan", "some_models:mlp", "--layout", "x"], "allowed: fsdp2, ddp"),
        (["plan", "some_models:mlp", "--optimizer", "x"], "allowed: adam"),
        (["plan", "some_models:mlp", "--format", "x"], "allowed: 24"),
        (["plan", "some_models:mlp", "--sequence", "3", "--size", "4"], "exclude each other"),
        (["plan", "some_models:mlp", "--checkpoint"], "no list of equal blocks"),
        (["plan", "some_models:mlp", "--largest-batch"], "needs --gpu"),
        (["inspect", "no_such_file.pt"], "is no file"),
        (["inspect", "some_models.py"], "cannot be read"),
        (["bench", "--device", "tpu"], "allowed: cpu, cuda"),
        (["plan", "some_models:mlp", "--batch", "0"], "batch"),
    ],
)
def test_mistakes_are_told_and_exit_with_2(run, arguments, said):
    code, output = run(*arguments)
    assert code == 2
    assert said in " ".join(output.split())
    assert "Traceback" not in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_plan_verify_needs_a_device(run):
    code, output = run("plan", "some_models:mlp", "--verify")
    assert code == 2
    assert "needs a CUDA device" in output


@pytest.mark.parametrize("fixed", [0, 2 * 2**30, 20 * 2**30])
def test_the_largest_batch_is_found(fixed):
    class Line:
        """A planner whose peaks are a straight line in the batch."""

        traced = 0

        def row(self, choice, setting):
            self.traced += 1
            return SimpleNamespace(total=fixed + setting.batch * 2**20)

    line = Line()
    card = 16 * 2**30
    found = planning.largest_batch(line, None, planning.Setting(batch=4), card)
    room = (card - planning.CONTEXT_BYTES) / (1 + planning.FRAGMENTATION) - fixed
    most = max(0, int(room // 2**20))
    assert most / 1.02 - 1 <= found <= most
    assert line.traced <= 20


def test_the_context_is_what_was_measured():
    results = json.loads((SAMPLES.parents[2] / "benchmarks" / "results" / "plan_h200.json").read_text())["results"]
    largest = max(one["outside"] for one in results)
    assert largest <= planning.CONTEXT_BYTES < largest + 2**20


def test_doctor_finds_what_is_here(run):
    code, output = run("doctor", "--json")
    findings = {one["name"]: one for one in json.loads(output)}
    assert code == 0
    assert findings["torch"]["text"].startswith(torch.__version__)
    assert findings["instructions"]["text"].startswith(flashoptim_native.cpu_isa())
    assert findings["self-test"]["level"] == "ok"


def _command_without_library(tmp_path, library, *arguments, name=None):
    """The command where its library is ``library``; as python -m, or as the script ``name``."""
    call = ["-m", "flashoptim_native"]
    if name is not None:
        script = tmp_path / name
        script.write_text("from flashoptim_native.cli import main\nmain()\n")
        call = [str(script)]
    env = os.environ | {"FLASHOPTIM_OPS_LIBRARY": str(library), "PYTHONPATH": str(PACKAGE)}
    return subprocess.run(
        [sys.executable, *call, *arguments], env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_doctor_reports_a_library_that_does_not_load(tmp_path):
    (tmp_path / "broken.so").write_bytes(b"junk")
    done = _command_without_library(tmp_path, tmp_path / "broken.so", "doctor", "--json")
    findings = {one["name"]: one for one in json.loads(done.stdout)}
    assert (done.returncode, done.stderr) == (1, "")
    assert findings["library"]["level"] == "fault"
    assert "file too short" in findings["library"]["text"]  # the loader's message
    assert "unset FLASHOPTIM_OPS_LIBRARY" in findings["library"]["remedy"]
    assert torch.__version__ in findings["torch"]["text"]


def test_the_script_reports_a_library_of_something_else(tmp_path):
    other = torch._C.__file__
    done = _command_without_library(tmp_path, other, "doctor", name="flashoptim-native")
    assert (done.returncode, done.stderr) == (1, "")
    assert "fault  library" in done.stdout and "flashoptim_python_functions" in done.stdout


def test_other_commands_and_imports_fail_in_their_way(tmp_path):
    done = _command_without_library(tmp_path, tmp_path / "no.so", "plan", "x")
    assert done.returncode == 2
    assert "no.so" in done.stderr and "doctor says more" in done.stderr and "Traceback" not in done.stderr
    done = _command_without_library(tmp_path, tmp_path / "no.so", "doctor", name="some_script.py")
    assert done.returncode == 1 and "Traceback" in done.stderr and "ImportError" in done.stderr


def test_doctor_exits_with_1_on_a_fault(run, monkeypatch):
    fault = diagnosis.Finding("fault", "self-test", "9 bytes differ", "report it")
    monkeypatch.setattr(diagnosis, "diagnose", lambda: [fault])
    code, output = run("doctor")
    assert code == 1
    assert "9 bytes differ" in output
    assert "report it" in output


def test_doctor_sees_bits_that_differ():
    left = [torch.zeros(8, dtype=torch.bfloat16)]
    right = [torch.zeros(8, dtype=torch.bfloat16)]
    assert diagnosis._differing(left, right) == 0
    right[0][3] = -0.0
    assert diagnosis._differing(left, right) == 1


def test_bench_times_ours_beside_torchs(run):
    code, output = run("bench", "--numel", 65536, "--steps", 2, "--device", "cpu", "--json")
    assert code == 0
    steps = {one["title"]: one for one in json.loads(output)["steps"]}
    assert {"FlashAdamW 24 bit", "torch fused, fp32", "torch foreach, fp32"} <= steps.keys()
    # One row below 2^20 elements: its states are fp32.
    assert steps["FlashAdamW 24 bit"]["bytes_held"] == 65536 * (2 + 2 + 1 + 8)
    assert steps["torch fused, fp32"]["bytes_held"] >= 65536 * 16


def saved(tmp_path, optimizer):
    path = tmp_path / "checkpoint.pt"
    torch.save({"optimizer": optimizer.state_dict(), "step": 3}, path)
    return path


def stepped(make, dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 10)).to(dtype)
    optimizer = make(model.named_parameters())
    for _ in range(2):
        model(torch.randn(16, 128, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("codec", ["default", "paper"])
def test_inspect_reads_our_checkpoints(run, tmp_path, codec):
    path = saved(tmp_path, stepped(lambda p: flashoptim_native.FlashAdamW(p, state_codec=codec)))
    code, output = run("inspect", path, "--json")
    assert code == 0
    said = json.loads(output)
    assert (said["writer"], said["optimizer"], said["version"]) == ("flashoptim-native", "adamw", 2)
    assert said["elements"] == 128 * 64 + 64 + 64 * 10 + 10
    codes = {(one["parameter"], one["name"]): one for one in said["tensors"]}["0.weight", "exp_avg_codes"]
    assert sum(codes["histogram"]) == 128 * 64
    assert 0 < codes["range"][0] < codes["range"][1]


def test_inspect_reads_torchs_checkpoints_and_draws_nothing(run, tmp_path):
    path = saved(tmp_path, stepped(torch.optim.AdamW, torch.float32))
    code, output = run("inspect", path, "--json")
    assert code == 0
    assert json.loads(output)["writer"] == "torch"
    code, output = run("inspect", path, "--plot", tmp_path / "a.png")
    assert code == 2
    assert "no codes" in output


@pytest.mark.parametrize(
    "name, writer, elements",
    [
        *((f"bitsandbytes_{one}8", "bitsandbytes", 8330) for one in ("adamw", "ademamix", "lion", "sgd")),
        *(
            (f"reference_{version}_{one}", "flashoptim (reference)", 4234)
            for version in ("013", "014")
            for one in ("adamw_compressed", "adamw_plain", "sgd_compressed")
        ),
        *((f"torchao_adamw_{one}", "torchao", 4176) for one in ("4", "8", "fp8")),
    ],
)
def test_inspect_reads_what_other_packages_wrote(run, name, writer, elements):
    code, output = run("inspect", SAMPLES / f"{name}.pt", "--json")
    said = json.loads(output)
    assert (code, said["writer"], said["elements"]) == (0, writer, elements)
    assert len(said["tensors"]) >= said["parameters"]
    assert all(one["histogram"] for one in said["tensors"] if one["kind"] == "codes")


def test_inspect_takes_nobodys_states_for_torchs(run, tmp_path):
    code, output = run("inspect", saved(tmp_path, stepped(torch.optim.RMSprop, torch.float32)), "--json")
    assert (code, json.loads(output)["writer"]) == (0, "unknown")


@pytest.mark.parametrize(("codec", "signed_ends"), [("default", {127, 255}), ("paper", {127, 128, 129})])
def test_inspect_knows_the_ends_of_codes(codec, signed_ends):
    stored = checkpoint_contents.StateCodec[codec.upper()]
    for slot, ends in (
        ("exp_avg_codes", signed_ends),
        ("momentum_buffer_codes", signed_ends),
        ("exp_avg_sq_codes", {255}),
    ):
        dtype = torch.int8 if codec == "paper" and len(ends) > 1 else torch.uint8
        for code in range(256):
            codes = torch.tensor([code, 1], dtype=torch.uint8).view(dtype)
            saturated, floored = checkpoint_contents._ends(slot, codes, stored)
            assert saturated == (0.5 if code in ends else 0)
            assert floored == (0.5 if code == 0 or (code == 128 and codec == "default" and len(ends) > 1) else 0)


def test_inspect_puts_suspicious_tensors_first(run, tmp_path):
    optimizer = stepped(flashoptim_native.FlashAdamW)
    held = optimizer.state_dict()
    held["state"][0]["exp_avg_sq_codes"].fill_(255)
    held["state"][1]["exp_avg"][5] = float("nan")
    torch.save(held, tmp_path / "damaged.pt")
    code, output = run("inspect", tmp_path / "damaged.pt", "--json")
    assert code == 1
    first = json.loads(output)["tensors"][:2]
    assert {(one["parameter"], one["name"]) for one in first} == {
        ("0.weight", "exp_avg_sq_codes"),
        ("0.bias", "exp_avg"),
    }
    assert any("end of their range" in said for one in first for said in one["suspicions"])
    assert any("NaN" in said for one in first for said in one["suspicions"])


def test_inspect_plots(run, tmp_path):
    pytest.importorskip("matplotlib")
    path = saved(tmp_path, stepped(flashoptim_native.FlashAdamW))
    code, _ = run("inspect", path, "--plot", tmp_path / "codes.png")
    assert code == 0
    assert (tmp_path / "codes.png").read_bytes().startswith(b"\x89PNG")


def test_help_teaches_by_example(run):
    code, output = run("plan", "--help")
    assert code == 0
    assert "flashoptim-native plan my_models:unet --batch 8 --size 128" in output


def test_python_m_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "flashoptim_native", "--version"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, flashoptim_native.__version__), done.stderr


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs typer and rich.*flashoptim-native\[cli\]"):
        cli.main()
