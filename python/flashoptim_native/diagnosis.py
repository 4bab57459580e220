"""What an installation is and whether it works: torch, CUDA, the library, names that clash, bits on CPU and CUDA."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import _ops
from .optimizers import FlashAdamW

_STEPS = 3


class Finding(NamedTuple):
    """One thing that was looked at."""

    #: "ok", "note" (works, could be better) or "fault".
    level: str
    #: What was looked at.
    name: str
    #: What was found.
    text: str
    #: What to do about it; empty where there is nothing to do.
    remedy: str = ""


def diagnose() -> list[Finding]:
    """All findings, in the order in which a person reads them. Takes some two seconds."""
    findings = [_python(), _torch(), _library(), _instructions(), _tensor_access(), _name_clash(), *_cuda()]
    findings.append(_self_test_cpu())
    if torch.cuda.is_available() and _ops.has_cuda():
        findings += [_self_test_cuda(index) for index in range(torch.cuda.device_count())]
    return findings


def _python() -> Finding:
    return Finding("ok", "Python", f"{platform.python_version()}, {sys.executable}")


def _torch() -> Finding:
    return Finding("ok", "torch", f"{torch.__version__}, {Path(torch.__file__).parent}")


def _library() -> Finding:
    path = _ops.loaded_from()
    if path is None:
        return Finding(
            "note", "library", "operators were registered before: a program that embeds Python linked them in"
        )
    override = os.environ.get(_ops.LIBRARY_VARIABLE)
    if override:
        return Finding(
            "note",
            "library",
            f"{path}, because the environment variable {_ops.LIBRARY_VARIABLE} names it",
            f"unset {_ops.LIBRARY_VARIABLE} to use the installed package's own, unless you are developing it",
        )
    return Finding("ok", "library", f"{path}, the package's own")


def _instructions() -> Finding:
    isa = _ops.cpu_isa()
    if isa == "scalar":
        return Finding(
            "note",
            "instructions",
            f"{isa}: this processor has neither AVX2 nor AVX-512",
            "steps on the CPU are slow here",
        )
    if isa == "avx2":
        return Finding(
            "note",
            "instructions",
            f"{isa}: steps on the CPU take longer than torch's",
            "a processor with AVX-512 is faster",
        )
    return Finding("ok", "instructions", isa)


def _tensor_access() -> Finding:
    access = _ops.tensor_access()
    if access == "direct":
        return Finding("ok", "tensor access", access)
    remedy = (
        "unset FLASHOPTIM_TENSOR_ACCESS"
        if os.environ.get("FLASHOPTIM_TENSOR_ACCESS")
        else "results are the same; the host's part of a step is slower. A newer flashoptim-native may know this torch"
    )
    return Finding("note", "tensor access", access, remedy)


def _name_clash() -> Finding:
    owners = importlib.metadata.packages_distributions().get("flashoptim", [])
    module = sys.modules.get("flashoptim")
    if module is not None and getattr(module, "__name__", "") == "flashoptim_native":
        return Finding("ok", "names", "`import flashoptim` gives this package (install_as_flashoptim() was called)")
    found = importlib.util.find_spec("flashoptim")
    if found is None:
        return Finding("ok", "names", "no other package is called flashoptim")
    owner = f"the distribution {', '.join(sorted(set(owners)))}" if owners else str(found.origin)
    return Finding(
        "note",
        "names",
        f"`import flashoptim` gives another package: {owner}, the reference implementation or a fork of it",
        "import flashoptim_native for this one; flashoptim_native.install_as_flashoptim() makes programs that import "
        "flashoptim use it",
    )


def _cuda() -> list[Finding]:
    if not _ops.has_cuda():
        if torch.cuda.is_available():
            return [
                Finding(
                    "fault",
                    "CUDA",
                    "torch has CUDA devices, but this build of the library steps CPU tensors alone",
                    "install the wheel, or build with nvcc (pip install --no-build-isolation . where CUDA is found)",
                )
            ]
        return [Finding("ok", "CUDA", "neither torch nor this build use it: steps are on the CPU")]
    if torch.version.cuda is None:
        return [
            Finding(
                "note",
                "CUDA",
                "the library has it, torch is a build for the CPU",
                "install torch with CUDA to use a GPU",
            )
        ]
    if not torch.cuda.is_available():
        return [
            Finding(
                "note",
                "CUDA",
                f"torch is built for CUDA {torch.version.cuda}, but finds no device",
                "no GPU here, or its driver is missing or too old (CUDA 13 needs 580): nvidia-smi shows its version",
            )
        ]
    findings = [Finding("ok", "CUDA", f"torch's is {torch.version.cuda}, driver {_driver()}")]
    for index in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(index)
        text = f"{of.name}, compute capability {of.major}.{of.minor}, {of.total_memory / 2**30:.0f} GiB"
        findings.append(Finding("ok", f"GPU {index}", text))
    return findings


def _driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    if not file.is_file():
        return "unknown"
    words = file.read_text().split()
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), "unknown")


# Self-tests


def _stepped(device: str) -> list[Tensor]:
    """Everything that a few steps leave, on the host: the same bits everywhere."""
    made = torch.Generator().manual_seed(0)
    shapes = ((97, 64), (4099,), (64, 3, 7, 7))
    params = [torch.nn.Parameter(torch.randn(shape, generator=made).to(torch.bfloat16).to(device)) for shape in shapes]
    optimizer = FlashAdamW(params, lr=1e-3, min_quantized_numel=0)
    for _ in range(_STEPS):
        for param in params:
            param.grad = torch.randn(param.shape, generator=made).to(param.dtype).to(device)
        optimizer.step()
    held = [*params, *(one for p in params for one in optimizer.state[p].values() if isinstance(one, Tensor))]
    return [tensor.detach().cpu() for tensor in held]


def _differing(left: list[Tensor], right: list[Tensor]) -> int:
    """How many elements differ."""
    return sum(int((a.view(torch.uint8) != b.view(torch.uint8)).sum()) for a, b in zip(left, right, strict=True))


def _self_test_cpu() -> Finding:
    threads = torch.get_num_threads()
    try:
        many = _stepped("cpu")
        torch.set_num_threads(1)
        one = _stepped("cpu")
    except RuntimeError as error:
        return Finding("fault", "self-test", f"a step on the CPU fails: {error}", _REPORT)
    finally:
        torch.set_num_threads(threads)
    wrong = _differing(many, one)
    if wrong:
        return Finding("fault", "self-test", f"{wrong} bytes depend on the number of threads", _REPORT)
    return Finding("ok", "self-test", f"{_STEPS} steps on the CPU: the same bits with 1 and with {threads} threads")


def _self_test_cuda(index: int) -> Finding:
    name = f"self-test, GPU {index}"
    try:
        wrong = _differing(_stepped("cpu"), _stepped(f"cuda:{index}"))
    except RuntimeError as error:
        return Finding(
            "fault",
            name,
            f"a step fails: {str(error).splitlines()[0]}",
            "the library may have no code for this device: build it here (CMAKE_CUDA_ARCHITECTURES=native). " + _REPORT,
        )
    if wrong:
        return Finding("fault", name, f"{wrong} bytes differ from the CPU's", _REPORT)
    return Finding("ok", name, f"{_STEPS} steps: the CPU's bits")


_REPORT = "Please report this, with all that is printed here."

__all__ = ["Finding", "diagnose"]
