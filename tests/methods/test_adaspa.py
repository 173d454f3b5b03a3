"""AdaSpa: what it searches, keeps and sees over the steps of a video, written out."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from tests.methods.test_video import bert
from tests.support.formulas import follows
from tests.support.on_grids import RESULTS, masked
from torch import Tensor, nn

from foveate import causal
from foveate.counting import count_operations
from foveate.methods.video import adaspa
from foveate.mixers.dynamic_sparse.adaspa import AdaSpa


def block_sums(weights: Tensor, video: int, block: int) -> Tensor:
    """Sums (R, R) of a head's weights (N, N) between blocks of the video."""
    cut = [range(first, min(first + block, video)) for first in range(0, video, block)]
    return torch.stack([torch.stack([weights[list(r)][:, list(c)].sum() for c in cut]) for r in cut])


def rows_of(sums: Tensor, sparsity: float) -> Tensor:
    """In each row as many of the greatest as 1 - sparsity of them."""
    chosen = torch.zeros_like(sums, dtype=torch.bool)
    for r, row in enumerate(sums):
        chosen[r, row.argsort(descending=True)[: math.ceil((1 - sparsity) * len(row) - 1e-9)]] = True
    return chosen


def searched(weights: Tensor, video: int, block: int, sparsity: float) -> tuple[Tensor, list[float]]:
    """Pairs (H, N, N) that an entry's heads see by weights (H, N, N), and what a plain share of each holds."""
    sums = [block_sums(head, video, block) for head in weights]
    held = []
    for head, own in zip(weights, sums, strict=True):
        kept = float((own * rows_of(own, sparsity)).sum() + head[:video, video:].sum())
        held.append(kept / float(head[:video].sum()))
    order = sorted(range(len(sums)), key=lambda h: -held[h])
    n = min(sum(share > 0.8 for share in held), len(sums) // 2)
    mask = torch.ones_like(weights, dtype=torch.bool)
    for place, head in enumerate(order):
        own = (1 + sparsity) / 2 if place < n else (3 * sparsity - 1) / 2 if place >= len(order) - n else sparsity
        table = rows_of(sums[head], own)
        for i, j in itertools.product(range(video), repeat=2):
            mask[head, i, j] = table[i // block, j // block]
    return mask, held


def step_heads(base: Tensor, step: int) -> list[Tensor]:
    return [(x + 0.3 * step * torch.randn_like(x)).requires_grad_() for x in base]


@pytest.mark.paper("AdaSpa", "definition")
@pytest.mark.paper("AdaSpa", "works_when")
@pytest.mark.parametrize(("text", "adaptive"), [(0, True), (3, True), (3, False)])
def test_blocks_are_searched_in_a_dense_step_and_seen_in_later_ones(text: int, adaptive: bool) -> None:
    """Steps 1 and 2 see all; 3 and 4 what the weights of 2 say; 5 and 6 what those of 5 say by the sums of 2."""
    dims, video, block = (3, 3, 4), 36, 5
    core = AdaSpa(dims, text, 0.6, block, (2, 5), adaptive)
    base = 1.5 * torch.randn(3, 2, 4, video + text, 4, dtype=torch.float64)
    base[0, :, :2] *= 3.0  # heads of few keys
    totals = mask = torch.ones(1)
    for step in range(1, 7):
        core.clock.advance()
        heads = step_heads(base, step)
        exponentials = (heads[0] @ heads[1].mT / 2).detach().exp()
        if step in (2, 5):
            totals = exponentials.sum(-1, keepdim=True) if step == 2 else totals
            found = [searched(entry, video, block, 0.6) for entry in exponentials / totals]
            if not adaptive:
                plain = [[rows_of(block_sums(head, video, block), 0.6) for head in x] for x in exponentials / totals]
                for (one, _), tables in zip(found, plain, strict=True):
                    for head, table in enumerate(tables):
                        of = torch.arange(video) // block
                        one[head, :video, :video] = table[of][:, of]
            mask = torch.stack([one for one, _ in found])
            assert any(sum(h > 0.8 for h in held) > 0 for _, held in found)
        seen = mask if step > 2 else torch.ones(2, 4, video + text, video + text, dtype=torch.bool)
        follows(nn.Module(), lambda: core(*heads), lambda: masked(*heads, seen), *heads)  # noqa: B023
        lower = seen & torch.ones_like(seen[0, 0]).tril()
        expected = masked(*heads, lower).nan_to_num()  # rows that see nothing give zeros
        torch.testing.assert_close(core(*heads, within=causal), expected, rtol=1e-9, atol=1e-9)
    shares = mask[:, :, :video, :video].float().mean((2, 3))
    assert (shares.max() > shares.min() + 0.1) == adaptive
    assert shares.mean() == pytest.approx(3.6 / 8, abs=0.13)  # the average budget stays


@pytest.mark.paper("AdaSpa", "works_when")
def test_each_row_sees_as_many_blocks_and_no_others_are_computed() -> None:
    core = AdaSpa((8, 16, 16), 32, searches=(1,), adaptive=False)
    q, k, v = torch.randn(3, 1, 2, 2080, 16)
    for _ in range(2):
        core.clock.advance()
        with count_operations() as counted:
            core(q, k, v)
    seen = core.mask(q, k, v, 0.25)
    assert counted.pairs == int(seen.sum())
    assert counted.computed < 0.3 * 2 * 2080**2
    assert (seen[:, :, :2048, :2048].sum(-1) == 7 * 64).all()  # a fifth of 32 blocks, rounded up


@pytest.mark.paper("AdaSpa", "works_when")
def test_searched_blocks_hold_more_than_blocks_by_means_and_heads_profit_from_budgets_of_their_own() -> None:
    codes = 3 * torch.randn(40, 32)
    places = torch.randint(40, (1, 4, 512)).sort(-1).values
    noise = torch.tensor([0.2, 0.4, 1.5, 2.5]).view(1, 4, 1, 1)
    q, k = (codes[places] + noise * torch.randn(1, 4, 512, 32) for _ in range(2))
    v, weights = torch.randn(1, 4, 512, 32), torch.softmax(q @ k.mT * 32**-0.5, -1)
    held = {}
    for adaptive in (True, False):
        core = AdaSpa((8, 8, 8), 0, 0.8, 16, (1,), adaptive)
        for _ in range(2):
            core.clock.advance()
            core(q, k, v)
        held[adaptive] = float((weights * core.mask(q, k, v, 32**-0.5)).sum(-1).mean())
    means = q.unflatten(2, (32, 16)).mean(3) @ k.unflatten(2, (32, 16)).mean(3).mT
    sums = weights.unflatten(3, (32, 16)).sum(4).unflatten(2, (32, 16)).sum(3)
    by_means = float(sums.gather(-1, means.topk(7).indices).sum(-1).mean()) / 16
    assert held[True] > held[False] > by_means
    assert core.kept[0].choice.recall.mean() == pytest.approx(held[False], abs=1e-4)


@pytest.mark.paper("AdaSpa", "works_when")
@torch.no_grad()
def test_in_a_model_steps_after_the_search_are_sparse_until_another_video() -> None:
    model, tokens = bert(), torch.randint(40, (2, 39))
    plain = model(tokens).last_hidden_state
    full = adaspa((4, 3, 3), text=3, sparsity=0.0, block=4, searches=(1,), steps=3).install(model)
    for _ in range(3):
        torch.testing.assert_close(model(tokens).last_hidden_state, plain, rtol=1e-9, atol=1e-9)
    full.undo()
    change = adaspa((4, 3, 3), text=3, sparsity=0.7, block=4, searches=(2,), steps=4).install(model)
    apart = []
    for _ in range(6):
        apart.append(float((model(tokens).last_hidden_state - plain).abs().max()))
    assert [one > 1e-3 for one in apart] == [False, False, True, True, False, False]
    assert max(apart[:2] + apart[4:]) < 1e-9
    change.undo()
    assert torch.equal(model(tokens).last_hidden_state, plain)


@pytest.mark.paper("AdaSpa", "works_when")
def test_recall_and_speed_on_grids_were_measured() -> None:
    lines = json.loads((RESULTS / "video_sparse.json").read_text(encoding="utf-8"))["adaspa"]
    assert len({tuple(line["grid"]) for line in lines}) >= 2
    for line in lines:
        assert line["recall"] > line["recall of as many blocks at random"] + 0.2
        assert line["density"] < 0.25 and line["seconds"]["dense"] > 2.5 * line["seconds"]["sparse step"]


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="sparsity is a share below 1"):
        AdaSpa((1, 1, 2), sparsity=1.0)
    with pytest.raises(ValueError, match="searches are steps from 1 on"):
        AdaSpa((1, 1, 2), searches=())
