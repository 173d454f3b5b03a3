"""Windows of the greatest norm attend, the others give zeros: by loops."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.formulas import follows
from tests.support.on_grids import boxes, heads_of, joined
from torch import Tensor

from foveate import Grid
from foveate.catalogue.registry import mixer
from foveate.counting import count_operations

DIM, HEADS = 12, 3


@pytest.mark.parametrize(("dims", "keep"), [((7, 10), 0.5), ((6, 6), 0.3), ((5, 4), 1.0)])
def test_the_strongest_windows_attend_and_the_others_are_left_out(dims: tuple[int, int], keep: float) -> None:
    layer = mixer("kept_windows", DIM, heads=HEADS, window=3, keep=keep).double()
    x = torch.randn(2, dims[0] * dims[1], DIM, dtype=torch.float64)
    x = (x * torch.rand(2, x.shape[1], 1, dtype=torch.float64)).requires_grad_()
    cut = boxes(dims, (3, 3))

    def formula() -> Tensor:
        q, k, v = (heads_of(x, each.weight, None, HEADS) for each in (layer.to_q, layer.to_k, layer.to_v))
        out = torch.zeros_like(q)
        for b in range(2):
            energy = [float((x[b, tokens].detach() ** 2).sum() / len(tokens)) for tokens in cut]
            for w in sorted(range(len(cut)), key=lambda w: -energy[w])[: math.ceil(keep * len(cut))]:
                tokens = cut[w]
                weights = torch.softmax(q[b][:, tokens] @ k[b][:, tokens].mT / 2, -1)
                out[b, :, tokens] = weights @ v[b][:, tokens]
        return joined(out) @ layer.to_out.weight.T

    follows(layer, lambda: layer(x, layout=Grid(*dims)), formula, x)


def test_the_cost_follows_the_share_of_windows() -> None:
    for keep, windows in ((0.25, 4), (0.5, 8), (1.0, 16)):
        layer = mixer("kept_windows", DIM, heads=HEADS, window=5, keep=keep)
        with torch.no_grad(), count_operations() as counted:
            layer(torch.randn(1, 400, DIM), layout=Grid(20, 20))
        assert counted.pairs == HEADS * windows * 25**2
    with pytest.raises(ValueError, match="share of the windows"):
        mixer("kept_windows", DIM, heads=HEADS, keep=0.0)
