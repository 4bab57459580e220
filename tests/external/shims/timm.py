"""timm's optimizer factory with ours under torch.optim's names: its tests of adam, adamw, sgd, lion and their like."""

import importlib.abc
import importlib.machinery
import sys
import types


def _anything(name):
    if name.startswith("__"):
        raise AttributeError(name)
    modes = ("NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")
    return type(name, (), {mode: number for number, mode in enumerate(modes)})


class _NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """timm's models import torchvision, which its optimizers do not use; one for another torch would not load."""

    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = _anything
        module.__version__ = "0.28.0"
        return module

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _NoTorchvision())

from timm.optim import OptimInfo  # noqa: E402
from timm.optim import _optim_factory as factory  # noqa: E402

import flashoptim_native as ours  # noqa: E402

NAMES = {
    "adamw": ours.FlashAdamW,
    "adam": ours.FlashAdam,
    "sgd": ours.FlashSGD,
    "momentum": ours.FlashSGD,
    "nesterov": ours.FlashSGD,
    "lion": ours.FlashLion,
    "sgdw": ours.FlashSGDW,
    "nesterovw": ours.FlashSGDW,
    "sgdwm": ours.FlashSGDW,
}


def install():
    for name, cls in NAMES.items():
        if name not in factory.default_registry._optimizers:
            continue
        old = factory.default_registry._optimizers[name]
        defaults = dict(old.defaults or {})
        defaults.pop("foreach", None)
        factory.default_registry.register(
            OptimInfo(
                name=name,
                opt_class=cls,
                description="ours",
                has_momentum=old.has_momentum,
                has_betas=old.has_betas,
                has_eps=old.has_eps,
                num_betas=old.num_betas,
                defaults=defaults or None,
            )
        )


def is_ours(nodeid):
    """Tests by the name of an optimizer in brackets, of ours."""
    if "[" not in nodeid:
        return False
    return nodeid.rpartition("[")[2].rstrip("]") in NAMES
