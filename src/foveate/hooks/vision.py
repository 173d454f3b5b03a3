"""Applications to images."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.catalogue.contracts import Hook
from foveate.catalogue.tiers import hook
from foveate.patterns import Grid


@hook("dome_detr", papers=("Dome-DETR",), tiny={"height": 11, "width": 14, "window": 4})
def dome_detr(height: int = 100, width: int = 100, window: int = 10, foreground: Tensor | None = None) -> Hook:
    """Dome-DETR's attention: inside the windows of a feature map that a foreground mask flags, and nowhere else.

    The detector's density extractor gives the mask; without one, small objects stand here on a lattice. Sizes are ours,
    for images of 800 x 800 pixels at a stride of 8.

    Hu et al., Dome-DETR: DETR with Density-Oriented Feature-Query Manipulation for Efficient Tiny Object Detection,
    arXiv 2505.05741.
    """
    if foreground is None:
        rows, columns = torch.arange(height).unsqueeze(1), torch.arange(width)
        foreground = (rows % 40 < 4) & (columns % 30 < 4)
    options = {"window": window, "foreground": foreground}
    return Hook("kept_windows", heads=8, head_dim=32, options=options, layout=Grid(height, width))


@hook("dfir_detr", papers=("DFIR-DETR",), tiny={"height": 5, "width": 7, "keys": 6})
def dfir_detr(height: int = 20, width: int = 20, keys: int = 64) -> Hook:
    """DFIR-DETR's attention: each token of a feature map sees the keys of its best scores.

    Products with values are of N K pairs; to find the keys all N^2 scores are computed, a few queries at a time, so
    that time grows with N^2 all the same. Sizes are ours, for images of 640 x 640 pixels at a stride of 32.

    DFIR-DETR: Frequency Domain Enhancement and Dynamic Feature Aggregation for Cross-Scene Small Object Detection,
    arXiv 2512.07078.
    """
    return Hook(f"topk_keys({keys}, causal=False)", heads=8, head_dim=32, layout=Grid(height, width))
