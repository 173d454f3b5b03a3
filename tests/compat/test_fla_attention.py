"""foveate.compat.fla's attentions are their formulas: all pairs, in float64, query by query."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from foveate.compat import fla

OFFSETS = [0, 5, 5, 18, 29]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def assert_same(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def same_gradients(got: Tensor, wanted: Tensor, leaves: list[Tensor]) -> None:
    cotangent = torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, cotangent), torch.autograd.grad(wanted, leaves, cotangent), strict=True
    ):
        assert_same(ours, theirs)


def drawn(batch: int = 2, length: int = 29, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    shapes = ((heads, 6), (kv_heads, 6), (kv_heads, 5))
    return [normal(batch, length, *shape).requires_grad_() for shape in shapes]


def row(q: Tensor, k: Tensor, v: Tensor, seen: list[int], bias: Tensor | None = None, scale: float = 6**-0.5) -> Tensor:
    """One query (K,) over the keys (T, K) it sees."""
    if not seen:
        return torch.zeros(v.shape[1], dtype=v.dtype)
    logits = scale * (k[seen] @ q) + (0 if bias is None else bias[seen])
    return logits.softmax(0) @ v[seen]


def by_rows(one: Callable[[int, int, int], Tensor], batch: int, length: int, heads: int) -> Tensor:
    rows = [[torch.stack([one(b, t, h) for h in range(heads)]) for t in range(length)] for b in range(batch)]
    return torch.stack([torch.stack(row) for row in rows])


# ---- forgetting attention --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 4])
def test_forgetting_attention_fades_with_what_lies_between(packed: bool, window: int | None) -> None:
    batch = 1 if packed else 2
    q, k, v = drawn(batch)
    g = logsigmoid(normal(batch, 29, 4)).requires_grad_()
    starts = [max(s for s in (OFFSETS[:-1] if packed else [0]) if s <= t) for t in range(29)]

    def one(b: int, t: int, h: int) -> Tensor:
        first = max(starts[t], 0 if window is None else t - window + 1)
        fades = torch.stack([g[b, j + 1 : t + 1, h].sum() for j in range(29)])
        return row(q[b, t, h], k[b, :, h // 2], v[b, :, h // 2], list(range(first, t + 1)), fades, 0.3)

    more = {"cu_seqlens": torch.tensor(OFFSETS)} if packed else {}
    got = fla.parallel_forgetting_attn(q, k, v, g, 0.3, window, **more)
    wanted = by_rows(one, batch, 29, 4)
    assert_same(got, wanted)
    same_gradients(got, wanted, [q, k, v, g])


def test_forgetting_attention_without_forgetting_is_attention() -> None:
    q, k, v = drawn()
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    got = fla.parallel_forgetting_attn(q, k, v, torch.zeros(2, 29, 4))
    assert_same(got, wanted.transpose(1, 2))


def test_long_forgetting_keeps_its_digits_across_packed_sequences() -> None:
    """Sums begin again with each sequence, so that one far down the line is as exact as the first."""
    q, k, v = (torch.randn(1, 20, 2, 8) for _ in range(3))
    g = -torch.rand(1, 20, 2)
    alone = fla.parallel_forgetting_attn(q, k, v, g)
    lead = [torch.zeros(1, 4000, 2, 8) for _ in range(3)]
    long = [torch.cat(pair, 1) for pair in zip(lead, (q, k, v), strict=True)]
    sums = torch.cat([torch.full((1, 4000, 2), -50.0), g], 1)
    got = fla.parallel_forgetting_attn(*long, sums, cu_seqlens=torch.tensor([0, 4000, 4020]))
    torch.testing.assert_close(got[:, 4000:], alone, rtol=1e-5, atol=1e-5)


# ---- MoBA ------------------------------------------------------------------------------------------------------


def moba_sees(q: Tensor, k: Tensor, t: int, first: int, chunk: int, topk: int) -> list[int]:
    """Keys of the sequence that begins at ``first`` seen by its query t: k (T, K), q (K,)."""
    if topk == 1:
        return list(range(first, t + 1))
    own = (t - first) // chunk
    means = [k[first + c * chunk : first + (c + 1) * chunk].mean(0) @ q for c in range(own)]
    best = sorted(range(own), key=lambda c: -means[c].item())[: topk - 1]
    chosen = [first + c * chunk + i for c in best for i in range(chunk)]
    return sorted(chosen) + list(range(first + own * chunk, t + 1))


@pytest.mark.parametrize("topk", [1, 2, 3, 99])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_moba_sees_its_own_block_and_the_best_before(topk: int, kv_heads: int) -> None:
    q, k, v = drawn(1, kv_heads=kv_heads)
    share = 4 // kv_heads

    def one(b: int, t: int, h: int) -> Tensor:
        first = max(s for s in OFFSETS[:-1] if s <= t)
        seen = moba_sees(q[b, t, h], k[b, :, h // share], t, first, 3, topk)
        return row(q[b, t, h], k[b, :, h // share], v[b, :, h // share], seen)

    got = fla.parallel_moba(q, k, v, torch.tensor(OFFSETS, dtype=torch.int32), 13, 3, topk)
    wanted = by_rows(one, 1, 29, 4)
    assert_same(got, wanted)
    same_gradients(got, wanted, [q, k, v])


# ---- NSA -------------------------------------------------------------------------------------------------------

BLOCK, WINDOW = 4, 6


def nsa_chooses(q: Tensor, k: Tensor, t: int, count: int, scale: float) -> list[int]:
    """Blocks that queries (R, K) of one group at position t choose together among the keys (T, K) of their sequence."""
    own, whole = t // BLOCK, [c for c in range(len(k) // BLOCK) if (c + 1) * BLOCK <= t + 1]
    score = dict.fromkeys(range(own + 1), 0.0)
    if whole:
        means = torch.stack([k[c * BLOCK : (c + 1) * BLOCK].mean(0) for c in whole])
        weights = (scale * q @ means.T).softmax(-1).mean(0)
        score |= {c: w.item() for c, w in zip(whole, weights, strict=True)}
    for rank, forced in ((2.0, own - 1), (3.0, 0), (4.0, own)):
        score |= {forced: rank} if forced in score else {}
    return sorted(score, key=lambda c: -score[c])[:count]


def nsa_row(
    q: Tensor, k: Tensor, v: Tensor, t: int, gates: list[Tensor | None], blocks: list[int], scale: float
) -> Tensor:
    """One query (K,) at position t of its sequence (T, K), (T, V)."""
    g_cmp, g_slc, g_swa = gates
    chosen = [j for c in sorted(blocks) for j in range(c * BLOCK, (c + 1) * BLOCK) if 0 <= j <= t]
    out = row(q, k, v, chosen, scale=scale) * (1 if g_slc is None else g_slc)
    if g_cmp is not None:
        whole = [c for c in range(len(k) // BLOCK) if (c + 1) * BLOCK <= t + 1]
        if whole:
            means = [torch.stack([x[c * BLOCK : (c + 1) * BLOCK].mean(0) for c in whole]) for x in (k, v)]
            out = out + g_cmp * row(q, *means, list(range(len(whole))), scale=scale)
    return out if g_swa is None else out + g_swa * row(q, k, v, list(range(max(0, t - WINDOW + 1), t + 1)), scale=scale)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [2, 4, 99])
def test_nsa_is_three_gated_attentions(count: int, packed: bool) -> None:
    batch = 1 if packed else 2
    q, k, v = drawn(batch)
    gates = [torch.rand(batch, 29, 4, dtype=torch.float64).requires_grad_() for _ in range(3)]
    spans = list(pairwise(OFFSETS)) if packed else [(0, 29)]
    blocks: dict[tuple[int, int, int], list[int]] = {}

    def one(b: int, t: int, h: int) -> Tensor:
        first, end = next((a, z) for a, z in spans if a <= t < z)
        group, part = h // 2, slice(first, end)
        keys, values = k[b, part, group], v[b, part, group]
        both = q[b, t, 2 * group : 2 * group + 2]
        blocks[b, t, group] = nsa_chooses(both.detach(), keys.detach(), t - first, count, 0.4)
        return nsa_row(q[b, t, h], keys, values, t - first, [g[b, t, h] for g in gates], blocks[b, t, group], 0.4)

    more = {"cu_seqlens": torch.tensor(OFFSETS)} if packed else {}
    options = {"block_counts": count, "block_size": BLOCK, "window_size": WINDOW, "scale": 0.4} | more
    got = fla.parallel_nsa(q, k, v, *gates, **options)
    wanted = by_rows(one, batch, 29, 4)
    assert_same(got, wanted)
    same_gradients(got, wanted, [q, k, v, *gates])
    again, chosen = fla.naive_nsa(q, k, v, *gates, **options, return_block_indices=True)
    assert torch.equal(again, got) and chosen.shape == (batch, 29, 2, count)
    for (b, t, group), wanted_blocks in blocks.items():
        own = chosen[b, t, group].tolist()
        assert own == wanted_blocks + [-1] * (count - len(wanted_blocks))


def test_nsa_reads_the_blocks_it_is_given() -> None:
    q, k, v = drawn()
    indices = torch.stack([torch.randperm(8) for _ in range(2 * 29 * 2)]).view(2, 29, 2, 8)[..., :3] - 1
    counts = torch.randint(0, 4, (2, 29, 2))
    asked = indices.masked_fill(torch.arange(3) >= counts.unsqueeze(-1), -1)

    def one(b: int, t: int, h: int) -> Tensor:
        return nsa_row(
            q[b, t, h], k[b, :, h // 2], v[b, :, h // 2], t, [None] * 3, asked[b, t, h // 2].tolist(), 6**-0.5
        )

    wanted = by_rows(one, 2, 29, 4)
    assert_same(fla.parallel_nsa(q, k, v, block_indices=asked, block_size=BLOCK), wanted)
    assert_same(fla.parallel_nsa(q, k, v, block_indices=indices, block_counts=counts, block_size=BLOCK), wanted)
    with pytest.warns(UserWarning, match="override"):
        got = fla.parallel_nsa(q, k, v, torch.zeros(2, 29, 4).double(), block_indices=asked, block_size=BLOCK)
    assert_same(got, wanted)


def test_nsa_may_ask_for_other_counts_of_blocks_query_by_query() -> None:
    q, k, v = drawn(1)
    gate, counts = torch.rand(1, 29, 4, dtype=torch.float64), torch.randint(0, 6, (1, 29, 2))
    options = {"block_size": BLOCK, "cu_seqlens": torch.tensor(OFFSETS), "return_block_indices": True}
    _, chosen = fla.naive_nsa(q, k, v, gate, block_counts=counts, **options)
    _, all_of_them = fla.naive_nsa(q, k, v, gate, block_counts=int(counts.max()), **options)
    assert torch.equal(chosen, all_of_them.masked_fill(torch.arange(chosen.shape[-1]) >= counts.unsqueeze(-1), -1))


@pytest.mark.parametrize("packed", [False, True])
def test_queries_of_nsa_may_be_the_last_of_the_tokens(packed: bool) -> None:
    q, k, v = drawn(1)
    gates = [torch.rand(1, 29, 4, dtype=torch.float64) for _ in range(3)]
    options: dict[str, Any] = {"block_counts": 3, "block_size": BLOCK, "window_size": WINDOW}
    offsets, last = (OFFSETS, [0, 2, 2, 3, 9]) if packed else ([0, 29], [0, 3])
    kept = [
        t for (_, end), (a, z) in zip(pairwise(offsets), pairwise(last), strict=True) for t in range(end - z + a, end)
    ]
    whole = fla.parallel_nsa(q, k, v, *gates, **options, **({"cu_seqlens": torch.tensor(OFFSETS)} if packed else {}))
    pair = {"cu_seqlens": (torch.tensor(last), torch.tensor(offsets))} if packed else {}
    got = fla.parallel_nsa(q[:, kept], k, v, *(g[:, kept] for g in gates), **options, **pair)
    assert_same(got, whole[:, kept])


# ---- dtypes and emptiness --------------------------------------------------------------------------------------


def calls() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    return {
        "fox": lambda q, k, v: fla.parallel_forgetting_attn(q, k, v, -torch.ones_like(q[..., 0])),
        "moba": lambda q, k, v: fla.parallel_moba(q, k, v, torch.tensor([0, q.shape[1]]), q.shape[1], 4, 99),
        "nsa": lambda q, k, v: fla.parallel_nsa(
            q, k, v, *(torch.ones_like(q[..., 0]) for _ in range(3)), block_counts=99, block_size=4, window_size=3
        ),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", calls())
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """All blocks are chosen, so that a rounded score chooses nothing else."""
    call, (q, k, v) = calls()[name], (x.detach().to(dtype) for x in drawn(1))
    got, exact = call(q, k, v), call(q.double(), k.double(), v.double())
    assert got.dtype == dtype and got.shape == exact.shape
    assert (got.double() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("name", calls())
def test_no_tokens_at_all(name: str) -> None:
    q, k, v = drawn(1, length=0)
    assert calls()[name](q, k, v).shape == (1, 0, 4, 5)


# ---- refusals --------------------------------------------------------------------------------------------------

Q, G, OFF = torch.randn(1, 12, 2, 4), -torch.rand(1, 12, 2), torch.tensor([0, 12])
ODD, FEW = torch.randn(1, 12, 3, 4), torch.zeros(1, 12, 2, 1, dtype=torch.long)


def nsa(**changes: Any) -> Any:
    return fla.parallel_nsa(**{"q": Q, "k": Q, "v": Q, "g_cmp": -G, "block_size": 4} | changes)


REFUSED: list[tuple[str, Callable[[], Any], type[Exception]]] = [
    ("g must be", lambda: fla.parallel_forgetting_attn(Q, Q, Q, Q), ValueError),
    ("heads of q must be a multiple", lambda: fla.parallel_forgetting_attn(Q, ODD, ODD, G), ValueError),
    ("window_size counts", lambda: fla.parallel_forgetting_attn(Q, Q, Q, G, window_size=0), ValueError),
    ("whole numbers", lambda: fla.parallel_forgetting_attn(Q, Q, Q, G, cu_seqlens=OFF.float()), TypeError),
    ("whole numbers", lambda: fla.parallel_forgetting_attn(Q, Q, Q, G, cu_seqlens=OFF.bool()), TypeError),
    ("at least 1, got 0", lambda: fla.parallel_moba(Q, Q, Q, OFF, 12, 0, 2), ValueError),
    ("v \\[B, T, H, V\\]", lambda: fla.parallel_moba(Q, Q, Q[:, :4], OFF, 12, 4, 2), ValueError),
    ("rise from 0", lambda: fla.parallel_moba(Q, Q, Q, OFF + 1, 12, 4, 2), ValueError),
    ("g_cmp must be", lambda: nsa(g_cmp=Q), ValueError),
    ("pass g_swa", lambda: nsa(window_size=4), ValueError),
    ("pass g_cmp, or block_indices", lambda: nsa(g_cmp=None), ValueError),
    ("block_indices must be whole", lambda: nsa(g_cmp=None, block_indices=FEW.float()), ValueError),
    ("block_indices must be whole", lambda: nsa(g_cmp=None, block_indices=FEW[:, :4]), ValueError),
    ("name a block twice", lambda: nsa(g_cmp=None, block_indices=FEW.expand(-1, -1, -1, 2)), ValueError),
    ("block_counts must be whole", lambda: nsa(block_counts=G), ValueError),
    ("block_counts is at least 0", lambda: nsa(block_counts=-1), ValueError),
    ("block_size is at least 1", lambda: nsa(block_size=0), ValueError),
    ("last tokens of their sequences", lambda: nsa(k=Q[:, :4], v=Q[:, :4]), ValueError),
]


@pytest.mark.parametrize(("words", "call", "kind"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_honoured_is_refused_in_words(words: str, call: Callable[[], Any], kind: type) -> None:
    with pytest.raises(kind, match=words):
        call()
