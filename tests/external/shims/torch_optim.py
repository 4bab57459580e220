"""PyTorch's test_optim.py through its own table of optimizers, and test_lrscheduler.py, test_swa_utils.py with ours for
torch.optim's SGD, Adam and AdamW.

FLASHOPTIM_SUITE_QUANTIZE=0 keeps states in fp32.
"""

import os
import sys
import types

import torch

import flashoptim_native as ours

QUANTIZE = os.environ.get("FLASHOPTIM_SUITE_QUANTIZE", "1") == "1"
_NAMES = {"AdamW": ours.FlashAdamW, "Adam": ours.FlashAdam, "SGD": ours.FlashSGD}


def _adapted(name, cls):
    def __init__(self, params, lr=1e-3, **arguments):
        cls.__init__(self, params, lr=lr, quantize=QUANTIZE, min_quantized_numel=0, **arguments)

    return type(f"Flash{name}", (cls,), {"__init__": __init__, "__module__": __name__})


def install():
    made = {name: _adapted(name, cls) for name, cls in _NAMES.items()}
    for one in made.values():
        globals()[one.__name__] = one  # for pickle
    from torch.testing._internal import common_optimizers as table

    kept = []
    for info in table.optim_db:
        if info.optim_cls.__name__ in made:
            info.optim_cls = made[info.optim_cls.__name__]
            info.supported_impls = ("forloop",)
            info.supports_complex = info.supports_sparse = False
            info.has_capturable_arg = False
            kept.append(info)
    table.optim_db[:] = kept
    for name, cls in made.items():
        setattr(torch.optim, name, cls)
    # torch_npu carries copies of two of the files, which import it and use nothing of it.
    for name in ("torch_npu", "torch_npu.testing"):
        sys.modules.setdefault(name, types.ModuleType(name))
    if not hasattr(torch, "npu"):
        torch.npu = types.SimpleNamespace(is_available=lambda: False)


def is_ours(nodeid):
    return True
