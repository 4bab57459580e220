"""benchmarks/real_models: the digits model learns with every optimizer, finished runs are kept, tables are right."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

import flashoptim_native

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "real_models"))
digits, gpt, report, runs = (importlib.import_module(name) for name in ("digits", "gpt", "report", "runs"))


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_reference_lion_is_lion():
    start = torch.randn(200)
    ours, reference = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    optimizers = [flashoptim_native.FlashLion([ours], quantize=False, **options), digits.Lion([reference], **options)]
    for _ in range(20):
        gradient = torch.randn(200)
        for parameter, optimizer in zip((ours, reference), optimizers):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-6)


LONG = pytest.mark.skipif(not os.environ.get("FLASHOPTIM_TEST_ALL"), reason="a minute each: FLASHOPTIM_TEST_ALL=1")


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=LONG), pytest.param("lion", marks=LONG)])
def test_digits_learns(optimizer, one_thread):
    """10 classes. After 4 epochs fp32 reaches 0.95 (Lion) to 0.98, and a seed changes that by about 0.01."""
    pytest.importorskip("sklearn")
    results = {
        variant: digits.train(optimizer, variant, seed=0, epochs=4)["final"] for variant in ("fp32", "paper", "default")
    }
    for variant, final in results.items():
        assert final["accuracy"] > 0.9, (variant, results)
        assert abs(final["accuracy"] - results["fp32"]["accuracy"]) < 0.04, (variant, results)


# ---- the driver: a stand-in for train_gpt that writes what it writes, and a line for every call -----------------

STAND_IN = """#!{python}
import json, os, sys
from pathlib import Path
def option(name):
    return sys.argv[sys.argv.index(name) + 1]
out = Path(option("--out"))
with open("{calls}", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + chr(10))
(out / "checkpoint.pt").write_text("x")
if os.environ.get("STAND_IN_STOPS", "none") in str(out):
    print("stopped")
    sys.exit(130)
(out / "metrics.jsonl").write_text('{{"step": 1, "loss": 3.0}}\\n{{"step": 2, "loss": 2.0, "val_loss": 2.5}}\\n')
summary = {{"val_loss": 2.5, "train_loss": 2.0, "parameters": 10, "unigram_loss": 3.0}}
summary["memory"] = {{"bytes_per_parameter": 7.1}}
(out / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def driver(tmp_path):
    """driver(options...): the runs that gpt.py returns, and the command lines of train_gpt that it took."""
    program, calls, text = tmp_path / "train_gpt", tmp_path / "calls", tmp_path / "text"
    program.write_text(STAND_IN.format(python=sys.executable, calls=calls))
    program.chmod(0o755)
    text.write_text("text")

    def call(*options):
        calls.write_text("")
        common = ["--program", str(program), "--data", str(text), "--out", str(tmp_path / "out"), "--seeds", "2"]
        result = gpt.main([*common, "--variants", "fp32", "default", "--steps", "2", *options])
        return result, calls.read_text().splitlines()

    return call


def test_driver_runs_every_seed_and_variant_alike(driver):
    result, calls = driver("--jobs", "2")
    assert [runs.run_name(run) for run in result] == [
        f"gpt_tiny-adamw-{variant}-seed{seed}" for seed in (0, 1) for variant in ("fp32", "default")
    ]
    assert result[0]["final"] == {"val_loss": 2.5, "train_loss": 2.0}
    assert result[0]["curve"] == {"step": [2], "val_loss": [2.5]}

    def shared(line):  # what all variants of a seed must have in common
        words = line.split()
        start = words.index("--model")
        return words[start : words.index("--optimizer")]

    for seed in ("0", "1"):
        own = [shared(line) for line in calls if f"--seed {seed} " in line]
        assert len(own) == 2 and own[0] == own[1]


def test_driver_does_not_repeat_finished_runs(driver, tmp_path):
    first, calls = driver()
    assert len(calls) == 4
    again, calls = driver()
    assert again == first and calls == []
    (tmp_path / "out" / "gpt_tiny-adamw-fp32-seed1.json").unlink()
    _, calls = driver()
    assert len(calls) == 1 and "fp32-seed1" in calls[0]
    _, calls = driver("--steps", "3")  # another config: from the start
    assert len(calls) == 4 and not any("--resume" in call for call in calls)


def test_driver_goes_on_after_an_interruption(driver, monkeypatch):
    monkeypatch.setenv("STAND_IN_STOPS", "default-seed0")
    with pytest.raises(RuntimeError, match=r"exit code 130; its output: .*default-seed0/log\.txt"):
        driver()
    monkeypatch.delenv("STAND_IN_STOPS")
    result, calls = driver()
    assert len(result) == 4
    assert len(calls) == 1 and "--resume" in calls[0] and "default-seed0" in calls[0]


# ---- the report -------------------------------------------------------------------------------------------------


def made_up(variant, seed, loss, task="gpt_tiny", optimizer="adamw", steps=100, options=""):
    curve = {"step": list(range(10, steps + 1, 10)), "val_loss": [loss] * 10}
    machine = {"device": "cpu", "processor": "P", "threads": 1, "torch": "2", "python": "3", "commit": "abc"}
    return {
        "task": task,
        "optimizer": optimizer,
        "variant": variant,
        "seed": seed,
        "config": {"model": "tiny", "steps": steps, "arguments": [*gpt.VARIANTS[variant], *options.split()]},
        "facts": {"parameters": 1000, "unigram_loss": 3.25},
        "machine": machine,
        "final": {"val_loss": loss, "train_loss": loss - 0.25},
        "curve": curve,
        "seconds": 1.0,
    }


LOSSES = {"fp32": (1.0, 1.1, 1.2), "paper": (1.3, 1.3, 1.3), "default": (1.02, 1.08, 1.23)}


def made_up_runs():
    return [made_up(variant, seed, loss) for variant, losses in LOSSES.items() for seed, loss in enumerate(losses)]


def test_report_tables():
    lines = report.make_report(made_up_runs()).splitlines()
    # By hand: fp32 1.1 +- 0.1. default: mean 1.11, deviation sqrt(0.0117); pairs +.02, -.02, +.03: 0.01 +- 0.0153.
    assert "| AdamW: fp32 | 3 | 1.1000 | 0.1000 |  |  |  |  |" in lines
    assert "| AdamW: flashoptim, `default` | 3 | 1.1100 | 0.1082 | +0.0100 | +0.10 | +0.0100 +- 0.0153 | yes |" in lines
    assert (
        "| AdamW: flashoptim, `paper` | 3 | 1.3000 | 0.0000 | +0.2000 | +2.00 | +0.2000 +- 0.0577 | **no** |" in lines
    )
    assert "| AdamW: flashoptim, `default` | 3 | 0.8600 | 0.1082 | +0.0100 | +0.10 | +0.0100 +- 0.0153 | yes |" in lines
    assert "| flashoptim, `default` | 1.0200 | 1.0800 | 1.2300 |" in lines
    end = next(line for line in lines if line.startswith("- AdamW: fp32 +0.0000 (+0.00 %)"))
    assert end.endswith(": flat by the limit of 0.5 %")


def test_report_compares_equal_seeds_only_and_admits_what_it_cannot_know():
    one = [made_up("fp32", 0, 1.0), made_up("default", 0, 1.5), made_up("default", 1, 2.0)]
    lines = report.make_report(one).splitlines()
    row = next(line for line in lines if line.startswith("| AdamW: flashoptim, `default`"))
    assert row == "| AdamW: flashoptim, `default` | 2 | 1.7500 | 0.3536 | +0.7500 |  | +0.5000 +- nan |  |"


def test_report_sees_a_loss_that_still_falls():
    falling = made_up("fp32", 0, 1.0)
    falling["curve"]["val_loss"] = [2.0 - 0.01 * step for step in range(10, 101, 10)]
    assert report.drift(falling) == pytest.approx(-0.2)
    assert report.value_of(falling, "val_loss_tail") == pytest.approx(2.0 - 0.9)
    assert "not flat" in report.make_report([falling])


def test_report_refuses_what_does_not_compare():
    with pytest.raises(ValueError, match="different configs"):
        report.make_report([made_up("fp32", 0, 1.0), made_up("default", 0, 1.0, steps=200)])
    with pytest.raises(ValueError, match="different configs"):
        report.make_report([made_up("fp32", 0, 1.0), made_up("default", 0, 1.0, options="--lr 1")])
    with pytest.raises(ValueError, match="no fp32 runs"):
        report.make_report([made_up("default", 0, 1.0)])


def test_report_is_made_again_from_its_own_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    for run in made_up_runs():
        runs.write_run(tmp_path / "runs", run)
    report.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "a")])
    assert (tmp_path / "a" / "real_models_gpt_tiny.png").stat().st_size < 150_000
    report.main(["--runs", str(tmp_path / "a" / "real_models.json"), "--out", str(tmp_path / "b")])
    for name in ("real_models.md", "real_models.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    by_name = {runs.run_name(run): run for run in runs.load_runs(tmp_path / "a" / "real_models.json")}
    assert by_name == {runs.run_name(run): run for run in made_up_runs()}
