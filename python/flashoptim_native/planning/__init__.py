"""Memory plans: what a training step takes on a card, by part, before there is a card or a weight.

    from flashoptim_native import planning

    planner = planning.Planner(planning.load("config.json"))
    row = planner.row(planning.own("adamw", releases=True), planning.Setting(batch=4, length=2048))
    print(row.total, row.peak.parts)

The command ``flashoptim-native plan`` prints these. See docs/cli.md for what is counted and how well it fits.
"""

from ._advice import advice
from ._choices import Choice, baselines, kinds, own
from ._cuda_rules import Device
from ._models import Model, PlanError, Weights, load
from ._plan import CONTEXT_BYTES, FRAGMENTATION, Planner, Row, Setting, largest_batch, plan
from ._replay import Holding, Peak
from ._shards import LAYOUTS
from ._verify import Verification, verify

__all__ = [
    "CONTEXT_BYTES",
    "FRAGMENTATION",
    "LAYOUTS",
    "Choice",
    "Device",
    "Holding",
    "Model",
    "Peak",
    "PlanError",
    "Planner",
    "Row",
    "Setting",
    "Verification",
    "Weights",
    "advice",
    "baselines",
    "kinds",
    "largest_batch",
    "load",
    "own",
    "plan",
    "verify",
]
