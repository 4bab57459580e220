"""The package under the name ``flashoptim``, for frameworks that import their optimizers by that name.

On PyPI the distribution and import name ``flashoptim`` belong to the package of the paper's authors. This package has a
name of its own, so that both can be installed side by side; a program that wants this one in the other's place says so.
"""

from __future__ import annotations

import importlib
import sys

_ALIAS = "flashoptim"
#: Modules that have a public name of their own, besides the package itself.
_SUBMODULES = ("optimizers",)


def install_as_flashoptim() -> None:
    """Makes ``import flashoptim`` and ``import flashoptim.optimizers`` give this package, in this process.

    Calling it again does nothing. Call it before anything imports ``flashoptim``.

    Raises:
        RuntimeError: another package of that name is imported already; nothing has changed then.
    """
    package = importlib.import_module(__package__)
    modules = {_ALIAS: package}
    for name in _SUBMODULES:
        modules[f"{_ALIAS}.{name}"] = importlib.import_module(f"{__package__}.{name}")
    for name, module in sys.modules.items():
        is_other = name == _ALIAS or name.startswith(_ALIAS + ".")
        if is_other and module is not modules.get(name):
            where = getattr(module, "__file__", None)
            raise RuntimeError(
                f"install_as_flashoptim(): the module {name!r} is imported already, from {where!r}, and is not this "
                "package; call install_as_flashoptim() before anything imports flashoptim, or import "
                "flashoptim_native by its own name"
            )
    sys.modules.update(modules)


__all__ = ["install_as_flashoptim"]
