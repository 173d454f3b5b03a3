"""Recurrent attention: a state that every token updates and every query reads."""

from foveate.recurrence.linear.api import IMPLEMENTATIONS, Recurrent, recur, step
from foveate.recurrence.selective.api import Convolved, Scanned, causal_conv, linear_scan, scan, scan_step
from foveate.recurrence.ssm import discretize, evolve, evolve_shared, fft_conv

__all__ = [
    "IMPLEMENTATIONS",
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
