"""The reference's tests over our package under its name, on the CPU; FLASHOPTIM_SUITE_DEVICE=cuda leaves them there.

Our formats by default; FLASHOPTIM_SUITE_CODEC=paper takes its own 8-bit codes. Small tensors are quantized, too, as
there. What the tests read of a state object (materialize()) is answered from decoded_state().
"""

import math
import os
import sys
import types

import torch
import torch._dynamo  # asks for Triton when it is imported: before there is one of ours

import flashoptim_native
from flashoptim_native import _parameters, _states, optimizers
from flashoptim_native._ops import MasterWeights
from flashoptim_native.numerics import smallest_certain_step

from . import on_cpu

CODEC = os.environ.get("FLASHOPTIM_SUITE_CODEC", "default")


def install():
    if os.environ.get("FLASHOPTIM_SUITE_DEVICE", "cpu") == "cpu":
        on_cpu.install()
    for name in optimizers.__all__:
        cls = getattr(optimizers, name)
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer):
            made = type(name, (cls,), {"__init__": _as_theirs(cls), "_ensure_state_initialized": _make_state})
            for module in (optimizers, flashoptim_native):
                setattr(module, name, made)
    torch.Tensor.materialize = lambda self: self
    is_quantized = torch.Tensor.is_quantized
    torch.Tensor.is_quantized = property(lambda self: Answer(is_quantized.__get__(self)))
    flashoptim_native.install_as_flashoptim()
    inner = types.ModuleType("flashoptim.optimizers")
    vars(inner).update(vars(optimizers))
    inner._BITS_TO_BYTES = {None: 0, 24: 3, 32: 4}
    inner._log2_min_expressible_step_size = _log2_of_smallest_step
    inner._NUM_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10}
    inner._apply_error_correction = None  # part of their kernel, see Kernel
    triton = types.ModuleType("triton")
    triton.jit, triton.cdiv = Kernel, lambda count, size: -(-count // size)
    triton.language = types.ModuleType("triton.language")
    triton.language.constexpr = int
    sys.modules |= {"triton": triton, "triton.language": triton.language}
    sys.modules["flashoptim.optimizers"] = inner
    sys.modules["flashoptim"].optimizers = inner


def _as_theirs(cls):
    def __init__(self, params, *args, **kwargs):
        params = list(params)
        groups = params if params and isinstance(params[0], dict) else [{"params": params}]
        tensors = [one[1] if isinstance(one, tuple) else one for group in groups for one in _listed(group["params"])]
        if all(tensor.dtype == torch.float32 for tensor in tensors):
            kwargs.setdefault("master_weight_bits", None)
        cls.__init__(self, params, *args, **{"state_codec": CODEC, "min_quantized_numel": 0, **kwargs})
        self.register_step_post_hook(_show)
        self.register_load_state_dict_post_hook(_show)

    return __init__


def _make_state(self, param, hparams):
    if not self.state.get(param):
        group = next(one for one in self.param_groups if any(param is other for other in one["params"]))
        item = (_parameters.local(param), _states.format_of(param, group), "a parameter")
        self.state[param] = StateView(_states.new_states(self.kind, [item])[0])


def _show(optimizer, *arguments):
    for param, held in list(optimizer.state.items()):
        optimizer.state[param] = StateView(held)


def _listed(params):
    return [params] if isinstance(params, torch.Tensor) else params


def _log2_of_smallest_step(dtype, largest, bytes_):
    """Of weights of ``dtype`` kept in ``bytes_`` bytes: what numerics.smallest_certain_step() is 2 to the power of."""
    kept = {2: MasterWeights.NONE, 3: MasterWeights.CORRECTION8_NEAREST, 4: MasterWeights.CORRECTION16_NEAREST}
    master = MasterWeights.NONE if dtype == torch.float32 else kept[max(2, bytes_ or 0)]
    return math.log2(smallest_certain_step(largest, dtype, master))


class StateView(dict):
    """A state of ours that also answers to the names of theirs."""

    def __missing__(self, key):
        if key == "error_bits" and "correction" in self:
            return self["correction"]
        if f"{key}_codes" in self:
            slots = [slot for slot in ("exp_avg", "exp_avg_sq", "momentum_buffer") if f"{slot}_codes" in self]
            kind = {1: "lion" if key == "exp_avg" else "sgd", 2: "adamw"}[len(slots)]
            values = dict(zip(slots, _states.decode(kind, self, slots)))[key]
            return Coded(values, self[f"{key}_codes"], self[f"{key}_scale"])
        raise KeyError(key)

    def __contains__(self, key):
        return dict.__contains__(self, key) or (key == "error_bits" and dict.__contains__(self, "correction"))

    def get(self, key, default=None):
        try:
            return self[key]
        except KeyError:
            return default


class Answer(int):
    """An attribute of torch's tensors that is a method of their states."""

    def __call__(self):
        return bool(self)


class Kernel:
    """In the place of the one kernel of their tests, which adds error bits to weights: our own way to do that."""

    def __init__(self, function):
        pass

    def __getitem__(self, grid):
        return lambda weights, errors, out, *sizes, **options: out.copy_(
            flashoptim_native.reconstruct_fp32_param(weights, errors)
        )


class Coded:
    def __init__(self, values, codes, scales):
        self._values = values
        self.quantized = codes
        self.scales = scales

    def materialize(self):
        return self._values

    def is_quantized(self):
        return True


def is_ours(nodeid):
    return True
