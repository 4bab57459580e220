"""bitsandbytes' optimizer tests with ours under its names: 8-bit states for its 8-bit classes, fp32 for its others.

Its tests read state1, state2, their maps and maxima, and decode them by its own function: here the maps are what ours
decode to, and that function hands them out.
"""

import inspect
import math

import bitsandbytes.functional
import torch
from bitsandbytes import optim

import flashoptim_native as ours

_KINDS = {"Adam": ours.FlashAdam, "AdamW": ours.FlashAdamW, "SGD": ours.FlashSGD, "Lion": ours.FlashLion,
          "AdEMAMix": ours.FlashAdEMAMix}  # fmt: skip
#: Our slots in each of theirs; two are stacked.
_SLOTS = {
    "adam": (["exp_avg"], ["exp_avg_sq"]),
    "adamw": (["exp_avg"], ["exp_avg_sq"]),
    "sgd": (["momentum_buffer"],),
    "lion": (["exp_avg"],),
    "ademamix": (["exp_avg", "exp_avg_slow"], ["exp_avg_sq"]),
}
_TESTS = ("test_optimizer32bit", "test_lion32bit_weight_decay", "test_optimizer8bit", "test_ademamix_state_dict_no_nan")
_NAMES = ("adam", "adamw", "momentum", "lion", "ademamix")


class StateView(dict):
    """A state of ours that also answers to theirs: state1, state2 as codes or values, qmap1 as values, absmax1."""

    def of(self, optimizer, param):
        self._source = (optimizer, param)
        return self

    def __missing__(self, key):
        if key[:-1] not in ("state", "qmap", "absmax") or key[-1] not in "12":
            raise KeyError(key)
        optimizer, param = self._source
        slots = _SLOTS[optimizer.kind][int(key[-1]) - 1]
        if key.startswith("absmax"):
            return torch.arange(float(len(slots)))  # the number of the slot, for _decoded()
        decoded = optimizer.decoded_state(param)
        if optimizer.kind == "ademamix":  # ours keeps what the slow average has beyond its share of the fast one
            share = _slow_from_fast(optimizer, self["step"])
            decoded = decoded | {"exp_avg_slow": decoded["exp_avg_slow"] + share * decoded["exp_avg"]}
        is_coded = key.startswith("state") and f"{slots[0]}_codes" in self
        found = [self[f"{slot}_codes"] if is_coded else decoded[slot] for slot in slots]
        return found[0] if len(found) == 1 else torch.stack(found)


def _slow_from_fast(optimizer, step):
    group = optimizer.param_groups[0]
    beta1, _, beta3 = group["betas"]
    share = min(1.0, step / group["t_beta3"]) if group["t_beta3"] else 1.0
    now = math.exp(1.0 / ((1.0 - share) / math.log(beta1) + share / math.log(beta3)))
    return (1.0 - min(now, beta3)) / (1.0 - beta1)


def _decoded(A, absmax, code, blocksize):
    return code[int(absmax)] if absmax.dim() == 0 else code


def _show(optimizer, *arguments):
    for param, held in list(optimizer.state.items()):
        optimizer.state[param] = StateView(held).of(optimizer, param)


def _adapted(theirs, cls, bits):
    signature = inspect.signature(theirs.__init__)

    def __init__(self, params, *arguments, **named):
        given = signature.bind(self, params, *arguments, **named)
        given.apply_defaults()
        known = inspect.signature(cls.__init__).parameters
        options = {name: value for name, value in given.arguments.items() if name in known}
        options = {name: value for name, value in options.items() if name not in ("self", "params")}
        if cls is ours.FlashAdam or cls is ours.FlashAdamW:
            options["betas"] = tuple(options["betas"])
        quantize = bits == 8 or given.arguments.get("optim_bits") == 8
        cls.__init__(self, params, **options, quantize=quantize, min_quantized_numel=0, master_weight_bits=None)
        self.register_step_post_hook(_show)
        self.register_load_state_dict_post_hook(_show)

    return type(theirs.__name__, (cls,), {"__init__": __init__})


def install():
    for name, cls in _KINDS.items():
        for made in (name, f"{name}8bit", f"{name}32bit", f"Paged{name}", f"Paged{name}8bit", f"Paged{name}32bit"):
            theirs = getattr(optim, made, None)
            if theirs is not None:
                setattr(optim, made, _adapted(theirs, cls, 8 if made.endswith("8bit") else 32))
    bitsandbytes.functional.dequantize_blockwise = _decoded
    torch.set_num_threads(1)


def is_ours(nodeid):
    test, _, rest = nodeid.rpartition("::")[2].partition("[")
    if test in ("test_optimizer32bit", "test_optimizer8bit"):
        name = rest.partition("opt=")[2].partition("-")[0].rstrip("]").removeprefix("paged_")
        return name.partition("8bit")[0].partition("_")[0] in _NAMES
    return test in _TESTS
