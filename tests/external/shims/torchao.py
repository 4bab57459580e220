"""torchao's low-bit optimizers' tests with ours for its 8-bit Adam and AdamW."""

import torch
from torchao import optim

import flashoptim_native as ours


def _adapted(name, cls):
    def __init__(self, params, lr=1e-3, **arguments):
        if arguments.pop("bf16_stochastic_round", False):
            arguments |= {"master_weight_bits": None, "stochastic_rounding": True}
        arguments.pop("block_size", None)
        cls.__init__(self, params, lr=lr, **arguments)

    return type(name, (cls,), {"__init__": __init__})


def install():
    optim.Adam8bit = _adapted("Adam8bit", ours.FlashAdam)
    optim.AdamW8bit = _adapted("AdamW8bit", ours.FlashAdamW)
    optim._AdamW = _adapted("_AdamW", ours.FlashAdamW)
    torch.set_num_threads(1)


def is_ours(nodeid):
    test = nodeid.rpartition("::")[2]
    if "4bit" in test or "Fp8" in test:
        return False
    return any(one in test for one in ("Adam8bit", "AdamW8bit", "bf16_stochastic_round_correctness"))
