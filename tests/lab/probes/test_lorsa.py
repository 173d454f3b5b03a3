"""Lorsa: heads of one direction each, written out, and its reconstruction of a given layer."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.formulas import follows
from tests.support.heads import turned
from torch import Tensor

from foveate.catalogue.tiers import row
from foveate.lab.probes.lorsa import Layer, LowRankSparseAttention, explained, of_random, reconstruct

DIM, HEADS, GROUPS, WIDTH, ACTIVE = 6, 8, 2, 4, 3


def formula(lorsa: LowRankSparseAttention, x: Tensor, *, active: int | None) -> Tensor:
    """Head by head: a scalar value, weights of its group, a direction; the longest few of each token."""
    batch, length, _ = x.shape
    q, k = ((x @ w.weight.T + w.bias).view(batch, length, GROUPS, WIDTH) for w in (lorsa.to_q, lorsa.to_k))
    if lorsa.rotary is not None:
        q, k = (turned(y.transpose(1, 2), torch.arange(length), lorsa.rotary).transpose(1, 2) for y in (q, k))
    v = x @ lorsa.to_v.weight.T + lorsa.to_v.bias
    rows = []
    for b in range(batch):
        for i in range(length):
            written = []
            for h in range(HEADS):
                g = h // (HEADS // GROUPS)
                weights = (k[b, : i + 1, g] @ q[b, i, g] / math.sqrt(WIDTH)).softmax(0)
                written.append((weights @ v[b, : i + 1, h]) * lorsa.to_out.weight[:, h])
            lengths = [float(one.detach().norm()) for one in written]
            kept = sorted(range(HEADS), key=lambda h: -lengths[h])[: HEADS if active is None else active]
            rows.append(sum(written[h] for h in kept) + lorsa.to_out.bias)
    return torch.stack(rows).view(batch, length, DIM)


@pytest.mark.paper("Lorsa", "definition")
@pytest.mark.paper("Lorsa", "works_when")
@pytest.mark.parametrize(("active", "rotary"), [(None, None), (ACTIVE, None), (ACTIVE, 20.0)])
def test_it_is_many_heads_of_one_direction_with_shared_queries_and_keys_and_few_at_work(
    active: int | None, rotary: float | None
) -> None:
    sizes = {"heads": HEADS, "groups": GROUPS, "width": WIDTH, "active": active}
    lorsa = LowRankSparseAttention(DIM, **sizes, rotary=rotary).double()
    x = torch.randn(2, 7, DIM, dtype=torch.float64, requires_grad=True)
    follows(lorsa, lambda: lorsa(x), lambda: formula(lorsa, x, active=active), x)
    writing = (lorsa.activations(x) != 0).sum(-1)
    assert (writing == (HEADS if active is None else active)).all()


@pytest.mark.paper("Lorsa", "works_when")
def test_it_learns_to_reconstruct_a_given_layer() -> None:
    layer = of_random(48, 8, 12)
    lorsa = LowRankSparseAttention(12, heads=48, groups=4, width=6, active=12)
    fresh = explained(lorsa(layer.inputs[-6:]), layer.outputs[-6:])
    losses = reconstruct(lorsa, layer, steps=120, batch=16, lr=1e-2)
    assert sum(losses[-20:]) < 0.1 * sum(losses[:20])
    learned = explained(lorsa(layer.inputs[-6:]), layer.outputs[-6:])  # texts that it was not shown
    assert 1 - learned < 0.1 * (1 - fresh)


def test_the_share_of_variance_explained_is_one_for_the_same_and_none_for_the_mean() -> None:
    wanted = torch.randn(4, 5, 3)
    assert explained(wanted, wanted) == 1
    assert abs(explained(wanted.mean((0, 1)).expand_as(wanted), wanted)) < 1e-5


@pytest.mark.paper("Lorsa", "works_when")
def test_the_probe_reports_the_reconstruction_and_judges_by_it() -> None:
    found = row("lorsa").run(target="random", texts=32, length=8, heads=48, groups=4, active=6, steps=60, batch=8)
    sparse, few = (found.figures[f"{name}: variance explained"] for name in ("sparse", "few"))
    assert found.confirmed == (sparse > few and sparse > 0.5)
    assert found.figures["sparse: heads writing at a token"] == found.figures["few: heads writing at a token"] == 6


def test_refusals_in_words() -> None:
    with pytest.raises(ValueError, match="groups divide heads"):
        LowRankSparseAttention(8, heads=9, groups=2, width=4, active=3)
    with pytest.raises(ValueError, match="active is some"):
        LowRankSparseAttention(8, heads=8, groups=2, width=4, active=9)
    assert isinstance(of_random(2, 3, 8), Layer)
