"""Recurrent attention: a state that every token updates and every query reads."""

from foveate.recurrence.linear.api import RECUR, Recurrent, recur, step
from foveate.recurrence.selective.api import (
    CAUSAL_CONV,
    LINEAR_SCAN,
    SCAN,
    Convolved,
    Scanned,
    causal_conv,
    linear_scan,
    scan,
    scan_step,
)
from foveate.recurrence.ssm import discretize, evolve, evolve_shared, fft_conv

__all__ = [
    "CAUSAL_CONV",
    "LINEAR_SCAN",
    "RECUR",
    "SCAN",
    "Convolved",
    "Recurrent",
    "Scanned",
    "causal_conv",
    "discretize",
    "evolve",
    "evolve_shared",
    "fft_conv",
    "linear_scan",
    "recur",
    "scan",
    "scan_step",
    "step",
]
