"""S2-Attention: shards of the context for each head, what they cover, what a decoder keeps, and what they save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.formulas import agree
from tests.support.masked import masked_mixer
from torch import Tensor
from torch.testing import assert_close

from foveate.cache.heads import HeadsCache
from foveate.catalogue.registry import mixer
from foveate.counting import count_operations
from foveate.mixers.static_sparse.s2_attention import s2_core

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
BLOCK, LOCAL, STRIDE = 3, 2, 4


def model(**options: Any) -> Any:
    made: Any = mixer("s2_attention", 24, block=BLOCK, local=LOCAL, stride=STRIDE, **options).double()
    return made


def seen_blocks(heads: int, blocks: int, local: int = LOCAL, stride: int = STRIDE) -> Tensor:
    """Which block of keys each block of queries sees, (heads, blocks, blocks): loops over blocks."""
    table = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
    for h in range(heads):
        for i in range(blocks):
            for c in range(i + 1):
                table[h, i, c] = i - c < local or (c + h) % stride == 0
    return table


def seen_tokens(key_heads: int, queries_per_key: int, length: int) -> Tensor:
    table = seen_blocks(key_heads, -(-length // BLOCK))
    tokens = table.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :length, :length]
    return (tokens & torch.ones(length, length, dtype=torch.bool).tril()).repeat_interleave(queries_per_key, 0)


@pytest.mark.paper("S2-Attention", "definition")
@pytest.mark.paper("S2-Attention", "works_when")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 6), (8, 4)])
@pytest.mark.parametrize("moved", [0.0, 0.3])
def test_each_head_attends_to_local_blocks_and_its_own_shard(heads: int, kv_heads: int, moved: float) -> None:
    s2, x = model(heads=heads, kv_heads=kv_heads, head_dim=5), torch.randn(2, 53, 24, dtype=torch.float64)
    with torch.no_grad():
        for parameter in s2.parameters():
            parameter.add_(moved * torch.randn_like(parameter))
    x.requires_grad_()
    agree(s2(x), masked_mixer(s2, x, seen_tokens(kv_heads, heads // kv_heads, 53)), x, s2)


@pytest.mark.paper("S2-Attention", "works_when")
def test_the_heads_together_see_every_earlier_block() -> None:
    mask = s2_core(block=1, local=1, stride=4, heads=4).pattern.mask(31)[0]
    assert torch.equal(mask.any(0), torch.ones(31, 31, dtype=torch.bool).tril())
    assert not mask[0].tril().equal(mask.any(0))
    with pytest.raises(ValueError, match="at least stride=4 heads of keys; got 3"):
        s2_core(block=1, local=1, stride=4, heads=3)
    with pytest.raises(ValueError, match="stride=4 heads of keys; got 2"):
        mixer("s2_attention", 24, heads=8, kv_heads=2, stride=4)


@pytest.mark.paper("S2-Attention", "works_when")
def test_hidden_blocks_are_skipped() -> None:
    """In pairs counted while it runs, and in seconds as benchmarks/static_sparse.py measured them."""
    s2, length = model(heads=8, head_dim=4), 300
    with torch.no_grad(), count_operations() as counted:
        s2(torch.randn(1, length, 24, dtype=torch.float64))
    assert counted.pairs == seen_tokens(8, 1, length).sum()
    cases = json.loads((RESULTS / "static_sparse.json").read_text(encoding="utf-8"))["s2_attention"]
    assert {case["pass"] for case in cases} == {"forward", "forward + backward"}
    assert max(case["tokens"] for case in cases) >= 2**14
    for case in cases:
        assert case["visible"] < 0.25 and case["seconds"]["s2"] < 1.5 * case["visible"] * case["seconds"]["dense"]


@pytest.mark.paper("S2-Attention", "works_when")
def test_no_block_is_read_again_after_it_was_left_out() -> None:
    table = s2_core(block=1, local=LOCAL, stride=STRIDE, heads=4).pattern.mask(31)[0]
    for h, c in torch.cartesian_prod(torch.arange(4), torch.arange(31)).tolist():
        column = table[h, c:, c].tolist()
        assert column == sorted(column, reverse=True), "seen, then hidden for good"


@pytest.mark.paper("S2-Attention", "works_when")
@pytest.mark.parametrize("prompt", [1, 200])
def test_a_decoder_drops_blocks_that_no_later_query_reads(prompt: int) -> None:
    s2, x = model(heads=4), torch.randn(2, 500, 24, dtype=torch.float64)
    seen = seen_tokens(4, 1, 500)
    with torch.no_grad():
        whole = masked_mixer(s2, x, seen)
        out, state = s2.prefill(x[:, :prompt], s2.init_state(2))
        outs = [out]
        for t in range(prompt, 500):
            out, state = s2.decode(x[:, t : t + 1], state)
            outs.append(out)
    assert_close(torch.cat(outs, 1), whole, rtol=1e-9, atol=1e-9)
    assert isinstance(state, HeadsCache)
    needed = [int(seen[h, -BLOCK * LOCAL :].any(0).sum()) for h in range(4)]
    kept = [cache.tokens.length for cache in state.caches]
    assert len(kept) == 4 and max(needed) < 150
    assert all(own <= count <= 2 * own + 8 for own, count in zip(needed, kept, strict=True)), (needed, kept)
    assert state.nbytes <= sum(2 * own for own in kept) * 2 * 2 * 6 * 8, "memory itself, for two texts of 6 channels"


def test_with_a_stride_of_one_it_is_causal_attention() -> None:
    s2, x = mixer("s2_attention", 24, heads=4, stride=1).double(), torch.randn(2, 37, 24, dtype=torch.float64)
    expected = masked_mixer(s2, x, torch.ones(37, 37, dtype=torch.bool).tril())
    assert_close(s2(x), expected, rtol=1e-9, atol=1e-9)
