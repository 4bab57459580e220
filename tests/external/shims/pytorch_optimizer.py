"""pytorch_optimizer's tests with ours under the names of its registry."""

import pytorch_optimizer.optimizer as theirs

import flashoptim_native as ours

_NAMES = {"AdamW": ours.FlashAdamW, "Adam": ours.FlashAdam, "SGD": ours.FlashSGD, "Lion": ours.FlashLion,
          "SGDW": ours.FlashSGDW, "ADOPT": ours.FlashADOPT, "AdEMAMix": ours.FlashAdEMAMix}  # fmt: skip
#: Options of its own classes that ours do not have, with the values that ask nothing.
_LEFT_OUT = ("foreach", "weight_decouple", "fixed_decay", "cautious", "use_gc", "adanorm", "r", "clip_lambda",
             "stable_adamw", "adam_debias",
             "num_iterations")  # fmt: skip


def _adapted(name, cls):
    def __init__(self, params, lr=1e-3, **arguments):
        for one in _LEFT_OUT:
            arguments.pop(one, None)
        if "t_alpha_beta3" in arguments:
            arguments["t_alpha"] = arguments["t_beta3"] = arguments.pop("t_alpha_beta3")
        cls.__init__(self, params, lr=lr, **arguments)

    # load_optimizer() finds them by the lower-case name of their class.
    return type(name, (cls,), {"__init__": __init__, "__str__": lambda self: name})


def install():
    for name, cls in _NAMES.items():
        made = _adapted(name, cls)
        if not hasattr(theirs, name):
            continue
        old = getattr(theirs, name)
        setattr(theirs, name, made)
        for table in (theirs.OPTIMIZERS, getattr(theirs, "OPTIMIZER_LIST", [])):
            if isinstance(table, dict):
                for key, value in list(table.items()):
                    if value is old:
                        table[key] = made
            elif old in table:
                table[table.index(old)] = made


def is_ours(nodeid):
    name = nodeid.rpartition("[")[2].rstrip("]").lower()
    return any(part in {one.lower() for one in _NAMES} for part in name.replace("-", "_").split("_"))
