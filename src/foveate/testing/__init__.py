"""The suites of the tiers: what every row must hold to, for ours and for yours."""

from foveate.testing.by_tier import check_row
from foveate.testing.closeness import reference_only
from foveate.testing.doc import check_doc
from foveate.testing.hook import check_hook
from foveate.testing.method import check_method
from foveate.testing.mixer import check_mixer
from foveate.testing.model import check_model
from foveate.testing.parallel import check_parallel
from foveate.testing.pattern import check_pattern
from foveate.testing.probe import check_probe
from foveate.testing.recipe import check_recipe
from foveate.testing.report import Check, Report

__all__ = [
    "Check",
    "Report",
    "check_doc",
    "check_hook",
    "check_method",
    "check_mixer",
    "check_model",
    "check_parallel",
    "check_pattern",
    "check_probe",
    "check_recipe",
    "check_row",
    "reference_only",
]
