"""examples/train_gpt while its disk fails, and killed: an error that says so, and the old checkpoint or the new one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
import zlib
from pathlib import Path

import pytest

from attacks import IS_LONG

PROGRAM = os.environ.get("FLASHOPTIM_FRONT_END_BYTES")
BUILD = Path(PROGRAM).resolve().parents[2] if PROGRAM else Path("nowhere")
TRAIN_GPT = BUILD / "examples" / "train_gpt" / "train_gpt"
SHIM = BUILD / "tests" / "reliability" / "libio_shim.so"
MODES = ["EIO", "ENOSPC", "EINTR", "short", "full"]
OPTIONS = "--data text.txt --model micro --context 16 --batch 2 --warmup 1 --threads 1"

pytestmark = pytest.mark.skipif(
    not (TRAIN_GPT.exists() and SHIM.exists()),
    reason="FLASHOPTIM_FRONT_END_BYTES names no program: the C++ examples were not built",
)


def run(command, folder, environment=None):
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", timeout=120, check=False
    )


def train(folder, *arguments, **environment):
    command = [str(TRAIN_GPT), *(() if "--resume" in arguments else (*OPTIONS.split(), "--steps", "3"))]
    command += ["--out", "out", "--eval-every", "0", "--eval-windows", "4", "--sample", "5", *arguments]
    return run(command, folder, os.environ | environment)


def text_file(folder):
    (folder / "text.txt").write_text("It is said that a disk fails when nobody looks. " * 200)


def is_whole(path):
    """By length and CRC-32 behind the zip file."""
    data = path.read_bytes()
    mark, length, crc = data[-32:-16], *(int.from_bytes(data[i:][:8], "little") for i in (-16, len(data) - 8))
    return mark == b"flashoptim file\n" and length == len(data) - 32 and crc == zlib.crc32(data[:-32])


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A folder whose checkpoint is of step 1, and the bytes of those of steps 1, 2 and of the end."""
    folder = tmp_path_factory.mktemp("train_gpt")
    text_file(folder)
    assert train(folder, "--stop-after", "1").returncode == 0
    start = folder / "start"
    shutil.copytree(folder / "out", start)
    checkpoints = [(start / "checkpoint.pt").read_bytes()]
    assert train(folder, "--resume", "--stop-after", "2").returncode == 0
    checkpoints.append((folder / "out" / "checkpoint.pt").read_bytes())
    assert train(folder, "--resume").returncode == 0
    checkpoints.append((folder / "out" / "checkpoint.pt").read_bytes())
    assert len(set(checkpoints)) == 3 and is_whole(folder / "out" / "checkpoint.pt")
    return start, checkpoints


def begun(folder, start):
    """A run in `folder` that has taken one step. Its text stays where it is, as a checkpoint holds its name."""
    folder.mkdir()
    shutil.copytree(start, folder / "out")
    return folder / "out"


def problem_of(done, out, checkpoints, wanted):
    """What is wrong behind a run; "" where all is well. `wanted`: the checkpoint of a run that went well."""
    if done.returncode not in (0, 1):
        return f"ended with {done.returncode}: {done.stderr[-300:]}"
    found = (out / "checkpoint.pt").read_bytes() if (out / "checkpoint.pt").exists() else None
    if found not in checkpoints:
        return "the checkpoint is neither the old one nor a new one"
    if done.returncode == 0 and found != wanted:
        return "says that all went well, and the checkpoint is an older one"
    if done.returncode == 1 and "train_gpt: " not in done.stderr:
        return f"does not say what failed: {done.stderr[-300:]}"
    if left := [name for name in os.listdir(out) if name.endswith(".partial")]:
        return f"{left} is left"
    return ""


def with_fault(out, number, mode, *arguments):
    """A run whose call `number` fails; how it ended, how many calls there were, and which failed ("-": none)."""
    log = out.parent / "log"
    shim = {"IO_SHIM_MATCH": "out/", "IO_SHIM_AT": str(number), "IO_SHIM_MODE": mode, "IO_SHIM_LOG": str(log)}
    done = train(out.parent, "--resume", *arguments, LD_PRELOAD=str(SHIM), **shim)
    seen, call = log.read_text().split()
    return done, int(seen), call


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arguments", [["--stop-after", "2"], []], ids=["stopped", "to the end"])
def test_calls_of_a_run_fail(stages, tmp_path, mode, arguments, tally):
    """One in each run. The one to the end writes a summary and a sample, too."""
    start, checkpoints = stages
    wanted = checkpoints[1 if arguments else 2]
    _, count, _ = with_fault(begun(tmp_path / "sound", start), -1, mode, *arguments)
    assert count > 50, "the shim sees nothing"
    # The first and the last calls open, flush, rename and close; what is between them writes.
    places = [*range(4), *range(4, count - 6, 7 if IS_LONG else count // 3), *range(count - 6, count)]
    for number in places if IS_LONG else places[MODES.index(mode) % 3 :: 3]:
        out = begun(tmp_path / str(number), start)
        done, _, call = with_fault(out, number, mode, *arguments)
        if call != "-":
            problem = problem_of(done, out, checkpoints, wanted)
            again = train(out.parent, "--resume", *arguments)
            if not problem and (again.returncode or (out / "checkpoint.pt").read_bytes() != wanted):
                problem = f"cannot be taken up again: {again.stderr[-300:]}"
            ended = "said" if done.returncode else "went well all the same"
            tally.find(f"{mode} at {call}, call {number}: {problem}") if problem else tally.count(ended)
        shutil.rmtree(out.parent)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl.partial", "summary.json.partial", "sample.txt", "checkpoint.pt.partial"]
)
def test_a_disk_that_is_full_for_one_file(stages, tmp_path, name, tally):
    start, checkpoints = stages
    out = begun(tmp_path / "run", start)
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to("/dev/full")
    done = train(out.parent, "--resume")
    problem = "no error" if done.returncode == 0 else problem_of(done, out, checkpoints, checkpoints[2])
    tally.find(f"{name}: {problem}") if problem else tally.count("said")


def test_a_kill_at_any_moment(tmp_path, tally):
    chance = random.Random(3)
    for number in range(300 if IS_LONG else 12):
        folder = tmp_path / str(number)
        folder.mkdir()
        text_file(folder)
        command = [str(TRAIN_GPT), *OPTIONS.split(), "--steps", "100000", "--save-every", "1", "--out", "out"]
        command += ["--eval-every", "0"]
        running = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        checkpoint = folder / "out" / "checkpoint.pt"
        while not checkpoint.exists() and running.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.15))
        running.kill()
        assert running.wait() == -signal.SIGKILL
        was_whole = is_whole(checkpoint)
        again = [str(TRAIN_GPT), "--resume", "--out", "out", "--stop-after", "1"]
        done = subprocess.run(
            again, cwd=folder, capture_output=True, text=True, errors="replace", timeout=120, check=False
        )
        left = [name for name in os.listdir(checkpoint.parent) if name.endswith(".partial")]
        if was_whole and done.returncode == 0 and not left:
            tally.count("resumed")
        else:
            tally.find(f"kill {number}: whole {was_whole}, left {left}, resumed: {done.stderr[-300:]}")
        shutil.rmtree(folder)
