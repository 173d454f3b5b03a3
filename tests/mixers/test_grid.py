"""What all mixers on grids ask for."""

from __future__ import annotations

import pytest
import torch

from foveate.catalogue.registry import mixer


def test_grid_mixers_ask_for_a_grid() -> None:
    for name in ("neighborhood_attention", "flash_window_attention", "hilo"):
        with pytest.raises(ValueError, match=r"layout=Grid\(height, width\)"):
            mixer(name, 32, heads=4)(torch.randn(1, 36, 32))
