"""Recurrent attention: a state that every token updates and every query reads."""

from foveate.recurrence.api import IMPLEMENTATIONS, Recurrent, recur, step
from foveate.recurrence.orders import (
    Order,
    bidirectional,
    column_major,
    cross_scan,
    raster,
    reverse,
    scan_orders,
    spatio_temporal,
    windows,
    zigzag,
)
from foveate.recurrence.scan import Convolved, Scanned, causal_conv, linear_scan, scan, scan_step
from foveate.recurrence.ssm import discretize, evolve, evolve_shared, fft_conv

__all__ = [
    "IMPLEMENTATIONS",
    "Convolved",
    "Order",
    "Recurrent",
    "Scanned",
    "bidirectional",
    "causal_conv",
    "column_major",
    "cross_scan",
    "discretize",
    "evolve",
    "evolve_shared",
    "fft_conv",
    "linear_scan",
    "raster",
    "recur",
    "reverse",
    "scan",
    "scan_orders",
    "scan_step",
    "spatio_temporal",
    "step",
    "windows",
    "zigzag",
]
