"""Every block of docs/recipes.md runs as it is printed: with torch alone here, with the frameworks in test-all."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashoptim_native
import recipe_setups
from recipe_setups import FRAMEWORKS, PLAIN

PACKAGE = Path(flashoptim_native.__file__).resolve().parents[1]
TEXT = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()
BLOCKS = {
    name: (language, body)
    for name, language, body in re.findall(r"<!-- recipe: (\w+) -->\n```(\w+)\n(.*?)```", TEXT, re.DOTALL)
}
#: As test_integrations.py has them; torch is pinned in the same command, else pip brings another.
PACKAGES = ["transformers", "accelerate", "trl", "peft", "lightning", "timm", "numpy"]
PROCESSES = ("ddp", "fsdp2")
BY_STRINGS = ("target", "kohya")
NANOGPT = ("nanogpt_model", "nanogpt_train")
LONG = pytest.mark.skipif(
    not os.environ.get("FLASHOPTIM_TEST_ALL"), reason="installs packages, minutes: FLASHOPTIM_TEST_ALL=1"
)


def run(python, program, folder, *before):
    """A program in a process of its own, in an empty folder."""
    (folder / "recipe.py").write_text(program)
    env = os.environ | {
        "PYTHONPATH": str(PACKAGE),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [python, *before, str(folder / "recipe.py")],
        cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def test_every_block_has_a_test():
    fences = len(re.findall(r"^```\w+$", TEXT, re.MULTILINE))
    snippets = len(re.findall(r"<!-- snippet: ", TEXT))  # tools/check_snippets.py compares these with files that run
    assert {*BLOCKS} == {*PLAIN, *FRAMEWORKS, *PROCESSES, *BY_STRINGS, *NANOGPT}
    assert fences == len(BLOCKS) + snippets


@pytest.fixture
def others_names():
    """Modules under others' names, which a recipe puts there, are gone at the end."""
    names = ("flashoptim", "swift")
    kept = {one: sys.modules.pop(one) for one in [*sys.modules] if one.partition(".")[0] in names}
    yield
    for one in [one for one in sys.modules if one.partition(".")[0] in names]:
        del sys.modules[one]
    sys.modules.update(kept)


@pytest.mark.parametrize("name", PLAIN)
def test_recipe(name, others_names):
    before, after = PLAIN[name]
    held: dict[str, object] = {}
    exec(compile(before + BLOCKS[name][1] + after, f"recipe {name}", "exec"), held)


@pytest.mark.parametrize("name", PROCESSES)
def test_recipe_over_two_processes(name, tmp_path):
    said = run(
        sys.executable,
        BLOCKS[name][1],
        tmp_path,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    )
    assert float(re.search(r"loss ([\d.]+)", said)[1]) < 2
    assert (tmp_path / ("checkpoint.pt" if name == "ddp" else "checkpoint/.metadata")).is_file()


def test_nanogpts_lines():
    loop = recipe_setups.NANOGPT_LOOP
    changes = BLOCKS["nanogpt_train"][1].splitlines()
    for old, new in zip(changes[::2], changes[1::2]):
        assert old[0] == "-" and new[0] == "+" and loop.count(old[1:].strip()) == 1
        loop = loop.replace(old[1:].strip(), new[1:].strip())
    exec(compile(recipe_setups.NANOGPT_METHOD + BLOCKS["nanogpt_model"][1] + loop, "nanogpt", "exec"), {})


def made_by_name(dotted, arguments):
    """As programs do that are given a class as a dotted path."""
    module, _, name = dotted.rpartition(".")
    params = [torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))]
    return getattr(importlib.import_module(module), name)(params, **arguments)


def test_a_target_in_yaml():
    lines = dict(line.strip().split(": ") for line in BLOCKS["target"][1].splitlines()[1:])
    arguments = {key: ast.literal_eval(value) for key, value in lines.items() if key != "_target_"}
    group = made_by_name(lines["_target_"], arguments).param_groups[0]
    assert (group["lr"], tuple(group["betas"]), group["weight_decay"], group["master_weight_bits"]) == (
        1e-4, (0.9, 0.95), 0.1, 24,
    )  # fmt: skip


def test_kohyas_strings():
    """Its get_optimizer() splits at the first "=" and reads what follows as Python."""
    words = shlex.split(BLOCKS["kohya"][1])
    pairs = [one.split("=", 1) for one in words[words.index("--optimizer_args") + 1 :]]
    arguments = {key: ast.literal_eval(value) for key, value in pairs}
    arguments["lr"] = float(words[words.index("--learning_rate") + 1])
    optimizer = made_by_name(words[words.index("--optimizer_type") + 1], arguments)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)


@pytest.fixture(scope="session")
def frameworks(tmp_path_factory):
    """Python of an environment with the frameworks beside this torch; FLASHOPTIM_RECIPES_PYTHON names another."""
    given = os.environ.get("FLASHOPTIM_RECIPES_PYTHON")
    if given:
        return given
    folder = tmp_path_factory.mktemp("recipes") / "venv"
    version = torch.__version__.split("+")[0]
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={version}", *PACKAGES], check=True, timeout=1800)
    # timm brings torchvision, which may be of another build of torch; timm and transformers do without it.
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True, check=False).returncode:
        subprocess.run([python, "-m", "pip", "uninstall", "-qy", "torchvision"], check=True)
    return python


@LONG
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_recipe_of_a_framework(frameworks, tmp_path, name):
    before, after = FRAMEWORKS[name]
    run(frameworks, before + BLOCKS[name][1] + after, tmp_path)
