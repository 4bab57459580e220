"""Lets tests that were written for CUDA run on the CPU: every ``device="cuda"`` means the CPU."""

import torch
from torch.overrides import TorchFunctionMode

_real_generator = torch.Generator


def _is_cuda(value):
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


def _moved(value):
    return torch.device("cpu") if _is_cuda(value) else value


class Generator(_real_generator):
    def __new__(cls, device="cpu"):
        return _real_generator(_moved(device))


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {name: _moved(value) for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*map(_moved, args), **kwargs)


def install():
    torch.cuda.is_available = lambda: True
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.synchronize = lambda *arguments: None
    torch.cuda.device_count = lambda: 1
    torch.cuda.is_bf16_supported = lambda *arguments: True
    torch.Generator = Generator
    move = torch.nn.Module.to
    torch.nn.Module.to = lambda self, *args, **kwargs: move(
        self, *map(_moved, args), **{name: _moved(value) for name, value in kwargs.items()}
    )
    torch.nn.Module.cuda = lambda self, device=None: self
    OnCpu().__enter__()
