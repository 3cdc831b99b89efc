"""From a trained run to a bundle that runs on a device.

from sdgm_edge.export import export_run

report = export_run("runs/tale", "tale.sdgm", bits=(8, 4))
"""

from .gates import Accuracy, Parity
from .pipeline import BUNDLES, MAX_LOSS_INCREASE, export_run
from .planning import BITS, Candidate, Costs, PlanReport, Wishes, plan_model, plan_toml
from .report import ExportReport, VariantExport

__all__ = [
    "BITS",
    "BUNDLES",
    "MAX_LOSS_INCREASE",
    "Accuracy",
    "Candidate",
    "Costs",
    "ExportReport",
    "Parity",
    "PlanReport",
    "VariantExport",
    "Wishes",
    "export_run",
    "plan_model",
    "plan_toml",
]
