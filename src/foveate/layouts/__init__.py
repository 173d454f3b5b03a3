"""Layouts: where tokens live, and in which order they are read."""

from foveate.layouts.graph import Graph
from foveate.layouts.kinds import Grid, Layout, Packed, Points, Sequence
from foveate.layouts.orders import (
    Order,
    bidirectional,
    by_score,
    column_major,
    cross_scan,
    morton,
    raster,
    reverse,
    scan_orders,
    spatio_temporal,
    windows,
    zigzag,
)

__all__ = [
    "Graph",
    "Grid",
    "Layout",
    "Order",
    "Packed",
    "Points",
    "Sequence",
    "bidirectional",
    "by_score",
    "column_major",
    "cross_scan",
    "morton",
    "raster",
    "reverse",
    "scan_orders",
    "spatio_temporal",
    "windows",
    "zigzag",
]
