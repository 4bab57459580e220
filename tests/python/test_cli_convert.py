"""flashoptim-native convert: files from format to format, dry runs, and mistakes that end without a traceback."""

import json
import sys
from pathlib import Path

import pytest
import torch

from flashoptim_native import FlashAdamW, FlashLion, convert

pytest.importorskip("typer")
from typer.testing import CliRunner

from flashoptim_native.cli._app import app

SAMPLES = Path(__file__).resolve().parents[1] / "data" / "convert"


def stepped(make, dtype=torch.float32):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(128, 64, dtype=dtype)), torch.nn.Parameter(torch.randn(64, dtype=dtype))]
    optimizer = make(params)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    return params, optimizer


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command in a folder with files; gives exit code, standard output and errors."""
    monkeypatch.chdir(tmp_path)
    params, theirs = stepped(torch.optim.AdamW)
    torch.save(theirs.state_dict(), "adamw.pt")
    torch.save({"optimizer": theirs.state_dict(), "epoch": 3}, "training.pt")
    torch.save({"a": params[0].detach(), "b": params[1].detach()}, "weights.pt")
    Path("names").write_text("a\nb\n")
    Path("empty.pt").touch()
    Path("text.pt").write_text("hello")
    Path("short.pt").write_bytes(Path("adamw.pt").read_bytes()[:900])
    Path("model.safetensors.index.json").write_text("{}")

    def call(*arguments):
        result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, " ".join(result.stderr.split())

    return call


def test_there_and_back(run):
    before = torch.load("adamw.pt")
    code, output, _ = run("adamw.pt", "ours.pt", "--to", "flashoptim")
    assert code == 0 and "ours.pt: flashoptim" in output
    _, optimizer = stepped(FlashAdamW, torch.bfloat16)
    optimizer.load_state_dict(torch.load("ours.pt"))
    assert run("ours.pt", "ours.safetensors", "--to", "safetensors")[0] == 0
    code, output, _ = run("ours.safetensors", "torch.pt", "--to", "torch", "--json")
    said = json.loads(output)
    assert (code, said["dry_run"], said["file_bytes"]) == (0, False, Path("torch.pt").stat().st_size)
    after = torch.load("torch.pt")
    for number, held in before["state"].items():
        difference = held["exp_avg"] - after["state"][number]["exp_avg"]
        assert difference.norm() < 0.01 * held["exp_avg"].norm()


def test_an_optimizer_in_a_larger_file_and_options_as_strings(run):
    options = ("--key", "optimizer", "--set", "state_codec=paper", "--set", "quantize=true")
    assert run("training.pt", "new.pt", "--to", "flashoptim", *options)[0] == 0
    made = torch.load("new.pt")
    assert made["epoch"] == 3
    assert made["optimizer"]["state"][0]["exp_avg_codes"].dtype == torch.int8


def test_a_dry_run_says_the_error_that_the_conversion_makes(run):
    before = torch.load("adamw.pt")["state"]
    code, output, _ = run("adamw.pt", "ours.pt", "--to", "flashoptim", "--dry-run", "--json")
    assert code == 0 and not Path("ours.pt").exists()
    said = json.loads(output)["expected"]
    assert (said["source"], said["optimizer"], said["parameters"]) == ("torch", "adamw", 2)
    assert run("adamw.pt", "ours.pt", "--to", "flashoptim")[0] == 0
    made = torch.load("ours.pt")
    assert said["target_bytes"] == sum(one.nbytes for held in made["state"].values() for one in held.values())
    back = convert.state_dict(made, to="torch")["state"]
    for error in said["errors"]:
        a = torch.cat([held[error["slot"]].flatten().double() for held in before.values()])
        b = torch.cat([held[error["slot"]].flatten().double() for held in back.values()])
        assert error["rms"] == pytest.approx(float(((a - b).square().sum() / a.square().sum()).sqrt()))
        assert error["zeroed"] == int(((a != 0) & (b == 0)).sum())
        kept = b != 0
        assert error["largest"] == pytest.approx(float(((a - b)[kept] / a[kept]).abs().max()))
        assert 0 < error["rms"] < 0.02


@pytest.mark.parametrize(
    "arguments",
    [
        ["ours.pt", "new.pt", "--to", "torch"],
        ["ours.pt", "new.pt", "--to", "flashoptim"],
        ["bf16.pt", "new.pt", "--to", "fp32", "--optimizer-file", "ours.pt", "--names", "names"],
    ],
)
def test_a_dry_run_of_what_is_exact_says_so(run, arguments):
    """Our own states stay, or are decoded; weights and corrections are joined."""
    given = ("--weights", "weights.pt", "--names", "names")
    assert run("adamw.pt", "ours.pt", "--to", "flashoptim", *given)[0] == 0
    assert run("weights.pt", "bf16.pt", "--to", "bf16")[0] == 0
    code, output, _ = run(*arguments, "--dry-run", "--json")
    said = json.loads(output)["expected"]
    assert code == 0 and said["target_bytes"] > 0
    assert all(one["rms"] == one["largest"] == one["zeroed"] == 0 for one in said["errors"])
    assert "Nothing was written" in run(*arguments, "--dry-run")[1]
    assert not Path("new.pt").exists()
    assert run(*arguments)[0] == 0
    made = torch.load("new.pt")
    tensors = (
        made.values() if "fp32" in arguments else [one for held in made["state"].values() for one in held.values()]
    )
    assert said["target_bytes"] == sum(one.nbytes for one in tensors)


def test_what_torch_does_not_keep_is_said(run):
    given = ("--weights", "weights.pt", "--names", "names")
    assert run("adamw.pt", "ours.pt", "--to", "flashoptim", *given)[0] == 0
    code, _, errors = run("ours.pt", "torch.pt", "--to", "torch")
    assert code == 0
    assert errors.startswith("warning: 2 parameters have corrections") and "UserWarning" not in errors


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_an_optimizer_that_torch_has_not_is_refused(run, more):
    _, optimizer = stepped(FlashLion, torch.bfloat16)
    torch.save(optimizer.state_dict(), "lion.pt")
    code, _, errors = run("lion.pt", "new.pt", "--to", "torch", *more)
    assert code == 2 and "torch.optim has no lion" in errors


def test_weights_become_16_bit_and_come_back_with_their_corrections(run):
    given = ("--weights", "weights.pt", "--names", "names")
    _, output, _ = run("adamw.pt", "ours.pt", "--to", "flashoptim", "--dry-run", "--json", *given)
    errors = {one["slot"]: one for one in json.loads(output)["expected"]["errors"]}
    assert 0 < errors["weights"]["largest"] < 2e-5  # half a unit of 16 bits of mantissa
    assert run("adamw.pt", "ours.pt", "--to", "flashoptim", *given)[0] == 0
    _, output, _ = run("weights.pt", "bf16.safetensors", "--to", "bf16", "--dry-run", "--json")
    (rounded,) = json.loads(output)["expected"]["errors"]
    assert 2e-3 < rounded["largest"] < 4e-3
    assert run("weights.pt", "bf16.safetensors", "--to", "bf16")[0] == 0
    back = ("bf16.safetensors", "fp32.pt", "--to", "fp32", "--optimizer-file", "ours.pt", "--names", "names")
    assert run(*back)[0] == 0
    before, after = torch.load("weights.pt"), torch.load("fp32.pt")
    for name in before:
        assert float(((before[name] - after[name]) / before[name]).abs().max()) == pytest.approx(
            errors["weights"]["largest"], rel=1
        )


def test_fp16_that_overflows_is_told(run):
    torch.save({"a": torch.tensor([1e5, 1.0])}, "large.pt")
    _, output, _ = run("large.pt", "new.pt", "--to", "fp16", "--dry-run", "--json")
    (error,) = json.loads(output)["expected"]["errors"]
    assert error["overflowed"] == 1


@pytest.mark.parametrize("to", ["flashoptim", "torch"])
def test_files_of_others_say_what_they_lack(run, to):
    source = SAMPLES / "torchao_adamw_8.pt"
    given = (source, "new.pt", "--to", to, "--key", "saved")
    code, _, errors = run(*given)
    assert code == 2 and "does not say whether it is of 'adam" in errors
    assert "give it as --optimizer" in errors
    assert run(*given, "--optimizer", "adamw")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["adamw.pt", "x.pt", "--to", "onnx"], "--to onnx is not allowed; allowed: flashoptim, torch"),
        (["adamw.pt", "x.pt"], "Missing option '--to'"),
        (["adamw.pt", "weights.pt", "--to", "torch"], "weights.pt exists, and is not overwritten"),
        (["adamw.pt", "adamw.pt", "--to", "torch"], "adamw.pt exists, and is not overwritten"),
        (["weights.pt", "names", "--to", "bf16", "--dry-run"], "names exists, and is not overwritten"),
        (["no.pt", "x.pt", "--to", "torch"], "no.pt does not exist"),
        (["adamw.pt", "no/x.pt", "--to", "torch"], "no is no folder"),
        (["weights.pt", "no/x.pt", "--to", "bf16"], "no is no folder"),
        (["training.pt", "x.pt", "--to", "torch"], "Say where it lies: --key 'optimizer'"),
        (["training.pt", "x.pt", "--to", "torch", "--key", "opt"], "has no 'opt' there; it holds 'optimizer'"),
        (["adamw.pt", "x.pt", "--to", "flashoptim", "--optimizer", "lion"], "allowed is 'adamw'"),
        (["adamw.pt", "x.pt", "--to", "flashoptim", "--set", "bits=3"], "bits"),
        (["adamw.pt", "x.pt", "--to", "flashoptim", "--set", "quantize=maybe"], "maybe"),
        (["adamw.pt", "x.pt", "--to", "torch", "--set", "quantize=false"], "takes no quantize"),
        (["adamw.pt", "x.pt", "--to", "flashoptim", "--dtype", "int8"], "--dtype int8 is not allowed"),
        (["adamw.pt", "x.pt", "--to", "flashoptim", "--weights", "weights.pt"], "--names"),
        (["adamw.pt", "x.pt", "--to", "flashoptim", "--weights", "no.pt"], "no.pt is no file"),
        (["adamw.pt", "x.pt", "--to", "flashoptim", "--keep-fp32", "a"], "--keep-fp32 means nothing with"),
        (["adamw.pt", "x.safetensors", "--to", "torch"], "x.safetensors is a name for --to safetensors"),
        (["adamw.pt", "x.pt", "--to", "safetensors"], "x.pt is no name of .safetensors"),
        (["weights.pt", "x.pt", "--to", "fp32"], "--to fp32 needs --optimizer-file"),
        (["weights.pt", "x.pt", "--to", "fp32", "--optimizer-file", "no.pt"], "no.pt"),
        (["weights.pt", "x.pt", "--to", "bf16", "--key", "a"], "--key means nothing with --to bf16"),
        (["weights.pt", "x.pt", "--to", "flashoptim"], "weights.pt"),
        (["model.safetensors.index.json", "x.pt", "--to", "bf16"], "is no index of weight files"),
        (["adamw.pt", "x.pt", "--to", "bf16"], "allowed are tensors by name"),
        (["empty.pt", "x.pt", "--to", "torch"], "empty.pt cannot be read"),
        (["text.pt", "x.pt", "--to", "torch"], "text.pt cannot be read"),
        (["short.pt", "x.pt", "--to", "torch"], "short.pt cannot be read"),
        (["text.pt", "x.pt", "--to", "bf16"], "text.pt cannot be read"),
        ([".", "x.pt", "--to", "torch"], "is a directory"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(run, arguments, said):
    before = sorted(Path(".").iterdir())
    code, output, errors = run(*arguments)
    assert code == 2
    assert said.lower() in errors.lower()
    assert "Traceback" not in output + errors
    assert sorted(Path(".").iterdir()) == before


def test_a_bar_is_shown_on_a_terminal_alone(run, monkeypatch, capsys):
    from flashoptim_native.cli import convert as command

    assert command._is_shown() is None  # pytest's stderr is no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert command._is_shown() is True
    convert.file("adamw.pt", "ours.pt", progress=True)
    said = capsys.readouterr().err
    assert "adamw.pt -> ours.pt" in said and "100" in said and "writing" in said
    convert.expected("ours.pt", "torch", progress=True)
    said = capsys.readouterr().err
    assert "ours.pt, dry run" in said and "100" in said
