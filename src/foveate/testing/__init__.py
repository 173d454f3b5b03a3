"""The conformance suite: what every mechanism must hold to, for ours and for yours."""

from foveate.testing.closeness import reference_only
from foveate.testing.mixer import check_mixer
from foveate.testing.pattern import check_pattern
from foveate.testing.report import Check, Report

__all__ = ["Check", "Report", "check_mixer", "check_pattern", "reference_only"]
