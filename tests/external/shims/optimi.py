"""optimi's tests with ours for its Adam, AdamW, Lion and SGD, compared with what it compares them with: fp32
references, to 1e-5, and so with fp32 states.
"""

import functools

import optimi
import optimi.adam
import optimi.adamw
import optimi.lion
import optimi.sgd
import torch

import flashoptim_native as ours

_KINDS = {"Adam": ours.FlashAdam, "AdamW": ours.FlashAdamW, "Lion": ours.FlashLion, "SGD": ours.FlashSGD}


def _adapted(name, cls):
    def __init__(self, params, lr, **arguments):
        for left_out in ("kahan_sum", "foreach", "triton", "max_lr", "gradient_release"):
            arguments.pop(left_out, None)
        if name == "SGD" and arguments.pop("dampening", False):
            arguments["dampening"] = arguments.get("momentum", 0.0)  # optimi's flag: an average of gradients
        arguments.pop("torch_init", None)
        if arguments.get("decouple_lr") and name == "SGD":
            decoupled = ours.FlashSGDW
            self.__class__ = type(name, (decoupled,), {})
            return decoupled.__init__(self, params, lr=lr, quantize=False, **arguments)
        if name == "SGD":
            arguments.pop("decouple_lr", None)
        return cls.__init__(self, params, lr=lr, quantize=False, **arguments)

    # The tests hand over what the signature names; SGDW's has decouple_lr.
    shown = ours.FlashSGDW if name == "SGD" else cls
    return type(name, (cls,), {"__init__": functools.wraps(shown.__init__)(__init__)})


def install():
    for name, cls in _KINDS.items():
        made = _adapted(name, cls)
        setattr(optimi, name, made)
        setattr(getattr(optimi, name.lower()), name, made)
    torch.set_num_threads(1)


def is_ours(nodeid):
    name = nodeid.rpartition("-")[2].rstrip("]")
    return name.partition("_")[0] in {"adam", "adamw", "lion", "sgd"}
