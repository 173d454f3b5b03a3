"""Choices for prompts against the papers' rules, written out query by query and key by key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from foveate import attend, causal, window
from foveate.counting import count_operations
from foveate.patterns import Pattern, Scene
from foveate.patterns.rules.chunks import chunk_budget
from foveate.patterns.rules.hierarchical import halved_ranges
from foveate.patterns.rules.proxies import proxy_blocks
from foveate.patterns.rules.stripes import sampled_columns, stripes

SHAPES = [(53, 53), (29, 77), (1, 40)]  # queries and keys
reaches = pytest.mark.parametrize("reach", [None, 11], ids=lambda reach: f"reach={reach}")  # of the model's own window


def inputs(shape: tuple[int, int], spread: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, 4, shape[0], 8, dtype=torch.float64) * spread
    k, v = (torch.randn(2, 2, shape[1], 8, dtype=torch.float64) * spread for _ in range(2))
    return q, k, v


def hidden(n: int, m: int, reach: int | None = None) -> Tensor:
    """Keys after a query, or further back than the model's own window reaches, (N, M)."""
    age = torch.arange(n)[:, None] + m - n - torch.arange(m)
    return age < 0 if reach is None else (age < 0) | (age > reach)


def scores_of(q: Tensor, k: Tensor, reach: int | None = None) -> Tensor:
    """Causal logits (B, H, N, M)."""
    scores = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    return scores.masked_fill(hidden(q.shape[2], k.shape[2], reach), float("-inf"))


def check(pattern: Pattern, seen: Tensor, q: Tensor, k: Tensor, v: Tensor, reach: int | None = None) -> None:
    """The pattern chooses these pairs, and attention to it is softmax over them."""
    if reach is not None:
        pattern, seen = pattern & window(reach, 0), seen & ~hidden(q.shape[2], k.shape[2], reach)
    assert torch.equal(pattern.select(q, k).to_dense().expand_as(seen), seen)
    want = scores_of(q, k).masked_fill(~seen, float("-inf")).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(attend(q, k, v, pattern), want)


@pytest.mark.paper("SampleAttention", "definition")
@reaches
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("mass", "stride", "width"), [(0.4, 5, 0.1), (0.9, 3, 0.02), (0.7, 1, 0.3)])
def test_sampled_columns_are_the_fewest_that_hold_the_mass_of_sampled_queries(
    shape: tuple[int, int], mass: float, stride: int, width: float, reach: int | None
) -> None:
    q, k, v = inputs(shape)
    scores = scores_of(q, k, reach)
    sampled = [i for i in range(shape[0]) if (shape[0] - 1 - i) % stride == 0]
    near = max(round(width * shape[1]), 1)
    seen = torch.zeros_like(scores, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            total = sum(scores[b, h, i].softmax(-1) for i in sampled)
            columns: list[int] = []
            for j in total.argsort(descending=True).tolist():
                if total[columns].sum() < mass * total.sum():
                    columns.append(j)
            for i in range(shape[0]):
                place = i + shape[1] - shape[0]
                for j in range(place + 1):
                    seen[b, h, i, j] = j in columns or place - j < near
    check(sampled_columns(mass, rows=1 / stride, width=width), seen, q, k, v, reach)


@pytest.mark.paper("AnchorAttention", "definition")
@reaches
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("theta", "block", "step"), [(0.5, 3, 2), (2.0, 4, 3), (1.0, 1, 1), (0.0, 16, 1)])
def test_stripes_are_keys_near_the_anchor_of_a_block_of_queries(
    shape: tuple[int, int], theta: float, block: int, step: int, reach: int | None
) -> None:
    q, k, v = inputs(shape)
    scores, group = scores_of(q, k, reach), block * step
    offset = shape[1] - shape[0]
    seen = torch.zeros_like(scores, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            anchor = torch.zeros(shape[0], dtype=torch.float64)
            for i in range(shape[0]):
                own = (i + offset) // group
                common = [j for j in range(i + offset + 1) if j < block or j // group == own]
                anchor[i] = scores[b, h, i, common].max()
            chosen: dict[int, set[int]] = {}
            for number in range(offset // block, (shape[1] - 1) // block + 1):
                rows = [i for i in range(shape[0]) if (i + offset) // block == number]
                mean = q[b, h, rows].mean(0)
                near = (k[b, h // 2] @ mean * 8**-0.5 >= anchor[rows].mean() - theta).nonzero()[:, 0].tolist()
                chosen.setdefault(number * block // group, set()).update(near)
            for i in range(shape[0]):
                own = (i + offset) // group
                for j in range(i + offset + 1):
                    seen[b, h, i, j] = j < block or j // group == own or j in chosen[own]
    check(stripes(theta, block=block, step=step), seen, q, k, v, reach)


def chunks_by_hand(k: Tensor, chunk: int) -> list[int]:
    """Where keys (G, M, D) of one entry change most: the least mean cosine of what lies before and behind."""
    width, length = max(chunk // 4, 1), k.shape[1]
    alike = []
    for at in range(1, length):
        before, behind = k[:, max(at - width, 0) : at].mean(1), k[:, at : at + width].mean(1)
        alike.append(float(torch.cosine_similarity(before, behind, dim=-1).mean()))
    wanted = min(length // chunk, length - 1)
    return [0, *sorted(1 + place for place in sorted(range(length - 1), key=lambda i: alike[i])[:wanted])]


@pytest.mark.paper("DHSA", "definition")
@pytest.mark.paper("DHSA", "works_when")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("keys", "chunk", "given"), [(9, 6, False), (20, 9, False), (13, 1, True), (1, 8, False)])
def test_each_query_keeps_a_budget_of_keys_by_the_scores_of_their_chunks(
    shape: tuple[int, int], keys: int, chunk: int, given: bool
) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(shape))
    starts = [0, 2, 3, 11, 12, 30, 51] if given else None
    offset = shape[1] - shape[0]
    seen = torch.zeros(2, 4, *shape, dtype=torch.bool)
    for b in range(2):
        begins = [s for s in starts or chunks_by_hand(k[b].detach(), chunk) if s < shape[1]]
        ends = [*begins[1:], shape[1]]
        for h in range(4):
            for first, end in zip(begins, ends, strict=True):
                mine = [i for i in range(shape[0]) if first <= i + offset < end]
                if not mine:
                    continue
                mean = q[b, h, mine].detach().mean(0) * len(mine) ** 0.5
                pooled = [
                    k[b, h // 2, a:z].detach().mean(0) * (z - a) ** 0.5 for a, z in zip(begins, ends, strict=True)
                ]
                upsampled = [
                    float(mean @ own) for own, a, z in zip(pooled, begins, ends, strict=True) for _ in range(a, z)
                ]
                for i in mine:
                    best = sorted(range(i + offset + 1), key=lambda j, s=upsampled: -s[j])[:keys]
                    assert len(best) == min(keys, i + offset + 1)
                    seen[b, h, i, best] = True
    pattern = chunk_budget(keys, chunk=chunk, starts=starts)
    for tile in (64, 8):  # the native builder, and that in torch
        assert torch.equal(pattern.select(q, k, tile=tile).to_dense().expand_as(seen), seen)
    want = scores_of(q, k).masked_fill(~seen, float("-inf")).softmax(-1) @ v.repeat_interleave(2, 1)
    out = attend(q, k, v, pattern)
    torch.testing.assert_close(out, want)
    towards = torch.randn_like(out)
    for one, other in zip(*(torch.autograd.grad(y, (q, k, v), towards) for y in (out, want)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("length", "keys", "chunk"), [(700, 90, 13), (333, 150, 70), (260, 40, 300)])
def test_longer_texts_have_the_same_chunks_in_tiles_of_either_builder(length: int, keys: int, chunk: int) -> None:
    q, k = torch.randn(2, 2, length, 8, dtype=torch.float64), torch.randn(2, 1, length, 8, dtype=torch.float64)
    found = [chunk_budget(keys, chunk=chunk).select(q[:, :, 7:], k, tile=tile) for tile in (64, 8)]
    native, plain = (one.to_dense() for one in found)
    assert torch.equal(native, plain)
    place = torch.arange(7, length) + 1
    assert torch.equal(native.sum(-1), place.clamp(max=keys).expand_as(native[..., 0]))


@pytest.mark.paper("DHSA", "works_when")
def test_attention_to_chosen_chunks_forms_few_pairs_besides() -> None:
    q, k, v = torch.randn(3, 1, 1, 2048, 16).unbind(0)
    with count_operations() as sparse:
        attend(q, k, v, chunk_budget(64, chunk=32))
    with count_operations() as dense:
        attend(q, k, v, causal)
    assert sparse.pairs < 0.07 * dense.pairs
    assert sparse.by_operator["attend"].computed < 0.5 * dense.by_operator["attend"].computed


@pytest.mark.paper("ProxyAttn", "definition")
@reaches
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("mass", "block", "proxies"), [(0.3, 4, 1), (0.6, 7, 2), (0.8, 3, 4)])
def test_blocks_are_judged_by_mean_heads_and_counted_by_each_head(
    shape: tuple[int, int], mass: float, block: int, proxies: int, reach: int | None
) -> None:
    q, k, v = inputs(shape)
    offset, last = shape[1] - shape[0], min(block, shape[0])
    every = k.repeat_interleave(2, 1)
    mean_q, mean_k = (x.view(2, proxies, 4 // proxies, -1, 8).mean(2) for x in (q, every))
    proxy = (mean_q @ mean_k.mT * 8**-0.5).masked_fill(hidden(*shape, reach), float("-inf")).softmax(-1)
    exact = scores_of(q, k, reach).softmax(-1)[:, :, -last:].mean(2)
    blocks = -(-shape[1] // block)
    seen = torch.zeros(2, 4, *shape, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            shares = [float(exact[b, h, c * block : (c + 1) * block].sum()) for c in range(blocks)]
            needed = next(n for n in range(1, blocks + 1) if sum(sorted(shares)[-n:]) >= mass)
            for row in range(offset // block, blocks):
                mine = [i for i in range(shape[0]) if (i + offset) // block == row]
                weights = proxy[b, h * proxies // 4][mine]
                judged = [float(weights[:, c * block : (c + 1) * block].max()) for c in range(row)]
                count = -(-needed * (row + 1) // blocks)
                kept = {row, *sorted(range(row), key=lambda c: -judged[c])[:count]}
                for i in mine:
                    for j in range(i + offset + 1):
                        seen[b, h, i, j] = j // block in kept
    check(proxy_blocks(mass, block=block, proxies=proxies), seen, q, k, v, reach)


@pytest.mark.paper("HiP", "definition")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("keys", "q_block", "k_block"), [(7, 1, 1), (12, 4, 2), (20, 5, 3), (9, 8, 9)])
def test_ranges_are_halved_and_the_best_kept(shape: tuple[int, int], keys: int, q_block: int, k_block: int) -> None:
    q, k, v = inputs(shape)
    plain = q @ k.repeat_interleave(2, 1).mT * 8**-0.5
    offset, count = shape[1] - shape[0], -(-keys // k_block)
    seen = torch.zeros_like(plain, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            for row in range(offset // q_block, (shape[1] - 1) // q_block + 1):
                mine = [i for i in range(shape[0]) if (i + offset) // q_block == row]
                last = mine[-1] + offset
                blocks = last // k_block + 1
                ranges = [(blocks * c // count, blocks * (c + 1) // count) for c in range(count)]
                while any(end - first > 1 for first, end in ranges):
                    halves = [(a, (a + z + 1) // 2) for a, z in ranges] + [((a + z + 1) // 2, z) for a, z in ranges]
                    halves = [(a, z) for a, z in halves if a < z]
                    middle = [min((a + z) * k_block // 2, last) for a, z in halves]
                    judged = plain[b, h][mine][:, middle].amax(0)
                    best = judged.argsort(descending=True, stable=True)[:count].tolist()
                    ranges = [halves[at] for at in best]
                kept = {a for a, z in ranges if a < z}
                for i in mine:
                    for j in range(i + offset + 1):
                        seen[b, h, i, j] = j // k_block in kept
    pattern = halved_ranges(keys, q_block=q_block, k_block=k_block)
    assert torch.equal(pattern.select(q, k).to_dense().expand_as(seen), seen)
    want = torch.nan_to_num(scores_of(q, k).masked_fill(~seen, float("-inf")).softmax(-1)) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(attend(q, k, v, pattern), want)


@pytest.mark.parametrize(
    "pattern",
    [
        sampled_columns(1.0),
        sampled_columns(1 - 1e-12),
        stripes(1e9, block=3, step=2),
        halved_ranges(400),
        proxy_blocks(1.0),
        proxy_blocks(1 - 1e-12),
        chunk_budget(90),
    ],
    ids=str,
)
@pytest.mark.paper("SampleAttention", "works_when")
@pytest.mark.paper("AnchorAttention", "works_when")
@pytest.mark.paper("ProxyAttn", "works_when")
@pytest.mark.paper("HiP", "works_when")
@pytest.mark.paper("DHSA", "works_when")
def test_all_of_the_budget_is_causal_attention(pattern: Pattern) -> None:
    q, k, v = inputs((77, 90))
    torch.testing.assert_close(attend(q, k, v, pattern), attend(q, k, v, causal))


@pytest.mark.parametrize("pattern", [sampled_columns(1.0), proxy_blocks(1.0)], ids=str)
def test_all_of_the_mass_is_causal_without_a_choice(pattern: Pattern) -> None:
    q, k, _ = inputs((9, 21))
    assert pattern.resolve(Scene(9, 21, q=q, k=k)) == causal


@pytest.mark.parametrize("proxies", [3, 8])
def test_proxies_divide_the_heads(proxies: int) -> None:
    q, k, v = inputs((9, 21))
    with pytest.raises(ValueError, match=rf"heads in {proxies} groups; got 4 heads on 2 of keys"):
        attend(q, k, v, proxy_blocks(0.5, block=4, proxies=proxies))


@pytest.mark.paper("HiP", "works_when")
def test_the_search_grows_like_n_log_n() -> None:
    flops = {}
    for length in (1024, 4096):
        q = k = torch.randn(1, 1, length, 16)
        with FlopCounterMode(display=False) as counter:
            halved_ranges(64, q_block=16, k_block=4).select(q, k)
        flops[length] = counter.get_total_flops()
    assert flops[1024] > 0
    assert 3.5 <= flops[4096] / flops[1024] <= 4 * 12 / 10 * 1.3  # 4 for n, log 4096 / log 1024; 16 were n squared
