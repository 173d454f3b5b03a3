"""Recurrent attention: a state that every token updates and every query reads."""

from foveate.recurrence.api import Recurrent, recur, step
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

__all__ = [
    "Order",
    "Recurrent",
    "bidirectional",
    "column_major",
    "cross_scan",
    "raster",
    "recur",
    "reverse",
    "scan_orders",
    "spatio_temporal",
    "step",
    "windows",
    "zigzag",
]
