"""PSA: importance, levels and pooled keys, by loops; and what pooling is worth beside leaving blocks out."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.formulas import follows
from tests.support.on_grids import heads_of, joined
from torch import Tensor, nn

from foveate.catalogue.registry import mixer
from foveate.counting import count_operations

DIM, HEADS = 12, 3
LEVELS = ((1, 0.3), (2, 0.55), (4, 0.8))
Levels = tuple[tuple[int, float], ...]


def pieces(length: int, size: int) -> list[list[int]]:
    return [list(range(first, min(first + size, length))) for first in range(0, length, size)]


def level_of(q: Tensor, k: Tensor, rows: list[list[int]], cut: list[list[int]], levels: Levels, by: str, sample: int):  # type: ignore[no-untyped-def]
    """Number of the level at which each row reads each block, for one head; beyond the last it is skipped."""
    logits, table = (q @ k.T / q.shape[1] ** 0.5).tolist(), []
    for row in rows:
        weights = [0.0] * len(cut)
        for i in row[::sample]:
            of_block = [max(logits[i][j] for j in tokens[::sample]) for tokens in cut]
            weights = [max(w, math.exp(most - max(of_block))) for w, most in zip(weights, of_block, strict=True)]
        order = sorted(range(len(cut)), key=lambda c: -weights[c])
        found, before = [0] * len(cut), 0.0
        for rank, c in enumerate(order):
            at = [
                rank >= int(len(cut) * bound) if by == "rank" else before / sum(weights) >= bound for _, bound in levels
            ]
            found[c] = sum(at) if rank else 0
            before += weights[c]
        table.append(found)
    return table


def formula(psa: nn.Module, x: Tensor, q_block: int, block: int, levels: Levels, by: str, sample: int) -> Tensor:
    q, k, v = (heads_of(x, each.weight, None, HEADS) for each in (psa.to_q, psa.to_k, psa.to_v))
    rows, cut = pieces(x.shape[1], q_block), pieces(x.shape[1], block)
    outs = torch.zeros_like(q)
    for b, h in torch.cartesian_prod(torch.arange(len(x)), torch.arange(HEADS)).tolist():
        table = level_of(q[b, h].detach(), k[b, h].detach(), rows, cut, levels, by, sample)
        for row, of_row in zip(rows, table, strict=True):
            keys, values, extra = [], [], []
            for tokens, level in zip(cut, of_row, strict=True):
                if level == len(levels):
                    continue
                for group in pieces(len(tokens), levels[level][0]):
                    at = [tokens[g] for g in group]
                    keys.append(k[b, h, at].mean(0))
                    values.append(v[b, h, at].mean(0))
                    extra.append(math.log(len(at)))
            logits = q[b, h, row] @ torch.stack(keys).T / q.shape[3] ** 0.5 + torch.tensor(extra, dtype=x.dtype)
            outs[b, h, row] = torch.softmax(logits, -1) @ torch.stack(values)
    return joined(outs) @ psa.to_out.weight.T


@pytest.mark.paper("PSA", "definition")
@pytest.mark.paper("PSA", "works_when")
@pytest.mark.parametrize(
    ("length", "q_block", "block", "by", "sample"),
    [(30, 8, 4, "rank", 2), (29, 5, 4, "mass", 1), (23, 8, 8, "rank", 3)],
)
def test_it_is_mixed_resolutions_written_out(length: int, q_block: int, block: int, by: str, sample: int) -> None:
    options = {"q_block": q_block, "block": block, "levels": LEVELS, "by": by, "sample": sample}
    psa = mixer("psa", DIM, heads=HEADS, **options).double()
    x = torch.randn(2, length, DIM, dtype=torch.float64, requires_grad=True)
    follows(psa, lambda: psa(x), lambda: formula(psa, x, q_block, block, LEVELS, by, sample), x)


@pytest.mark.paper("PSA", "works_when")
@pytest.mark.parametrize("by", ["rank", "mass"])
def test_at_level_1_it_is_full_attention(by: str) -> None:
    psa = mixer("psa", DIM, heads=HEADS, q_block=8, block=4, levels=((1, 1.0),), by=by).double()
    x = torch.randn(2, 29, DIM, dtype=torch.float64, requires_grad=True)

    def dense() -> Tensor:
        q, k, v = (heads_of(x, each.weight, None, HEADS) for each in (psa.to_q, psa.to_k, psa.to_v))
        return joined(torch.softmax(q @ k.mT / 2, -1) @ v) @ psa.to_out.weight.T

    follows(psa, lambda: psa(x), dense, x)


@pytest.mark.paper("PSA", "works_when")
@pytest.mark.parametrize("weights", ["begun", "identity"])
def test_where_neighbours_are_alike_it_errs_less_than_leaving_blocks_out_at_equal_compute(weights: str) -> None:
    """Of 16 blocks, 2 read whole, 2 by halves and 8 by eighths are as many keys as 4 whole ones."""
    x = torch.randn(4, 256, 16, dtype=torch.float64).cumsum(1) / 20
    exact = mixer("psa", 16, heads=2, q_block=32, block=16, levels=((1, 1.0),)).double()
    if weights == "identity":
        for parameter in exact.parameters():
            nn.init.eye_(parameter)
    errors, pairs = {}, {}
    for name, levels in {"pyramid": ((1, 2 / 16), (2, 4 / 16), (8, 12 / 16)), "binary": ((1, 4 / 16),)}.items():
        psa = mixer("psa", 16, heads=2, q_block=32, block=16, levels=levels).double()
        psa.load_state_dict(exact.state_dict())
        with torch.no_grad(), count_operations() as counted:
            errors[name] = float((psa(x) - exact(x)).norm())
        pairs[name] = counted.pairs - 4 * 2 * 256**2  # without those of exact attention
    assert pairs["pyramid"] == pairs["binary"] == 4 * 2 * 256 * 64
    assert errors["pyramid"] < 0.7 * errors["binary"]


def test_defaults_and_refusals() -> None:
    psa = mixer("psa", DIM, heads=HEADS)
    assert (psa.q_block, psa.block, psa.by, psa.sample) == (128, 64, "rank", 4)
    assert psa.levels == ((1, 0.1), (2, 0.15), (4, 0.15), (8, 0.35))
    for options, words in (
        ({"levels": ((3, 0.5),)}, "dividing the block"),
        ({"levels": ((1, 0.5), (2, 0.4))}, "rising"),
        ({"levels": ()}, "group, bound"),
        ({"by": "size"}, '"rank" or "mass"'),
        ({"sample": 100}, "leaves a token"),
    ):
        with pytest.raises(ValueError, match=words):
            mixer("psa", DIM, heads=HEADS, **options)
