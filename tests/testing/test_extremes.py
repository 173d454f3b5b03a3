"""Nothing at all, points that are nowhere, tokens that are all alike."""

from __future__ import annotations

import pytest
import torch

from foveate import Points, attend, causal, key_padding, mass_blocks, topk_blocks, topk_keys, vertical_slash, within
from foveate.mixers.recurrent_ssm.mamba3d import LocalNormPooling, nearest

NOBODY = key_padding(torch.ones(0, 9, dtype=torch.bool))
PATTERNS = [causal, topk_keys(3), mass_blocks(4, 0.5), vertical_slash(2, 2), topk_blocks(4, k=1), NOBODY]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_points_are_somewhere(bad: float) -> None:
    coords = torch.rand(64, 3)
    coords[7, 1] = bad
    with pytest.raises(ValueError, match="1 of 64 points"):
        Points(coords)


def test_no_points_at_all() -> None:
    q, k, v = torch.rand(3, 1, 2, 0, 4).unbind()
    assert attend(q, k, v, within(0.5), layout=Points(torch.rand(0, 3))).shape == q.shape


@pytest.mark.parametrize("tile", [8, 64])
@pytest.mark.parametrize("shape", [(0, 2, 9, 9), (2, 2, 0, 9), (2, 2, 9, 0), (0, 2, 0, 0)])
@pytest.mark.parametrize(
    "pattern",
    [
        causal,
        topk_keys(3),
        mass_blocks(4, 0.5),
        vertical_slash(2, 2),
        topk_blocks(4, k=1),
        key_padding(torch.ones(0, 9).bool()),
    ],
    ids=str,
)
def test_selections_of_nothing(pattern, shape: tuple[int, int, int, int], tile: int) -> None:
    batch, heads, n, m = shape
    if pattern.tensors and (batch, m) != (0, 9):
        return
    selection = pattern.select(torch.rand(batch, heads, n, 4), torch.rand(batch, heads, m, 4), tile=tile)
    assert selection.pairs == 0 and selection.density == 0
    assert selection.num_q_tiles == -(-n // tile)
    assert selection.to_dense().shape[2:] == (n, m)


def test_pooling_of_equal_points_is_flat() -> None:
    """Where all neighbours are alike nothing is left to divide by its spread."""
    pool = LocalNormPooling(5)
    x = torch.ones(2, 9, 5, requires_grad=True)
    out = pool(x, nearest(Points(torch.rand(9, 2)), 4))
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert out.isfinite().all() and gradient.isfinite().all()
