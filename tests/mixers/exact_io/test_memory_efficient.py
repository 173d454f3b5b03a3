"""Attention without quadratic memory against dense softmax: any chunks, masks, biases, dropout, extreme logits."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from foveate import Packed, alibi, attend, causal, key_padding
from foveate.catalogue.registry import mixer
from foveate.mixers.exact_io.chunked import ChunkedCore

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
CHUNKS = [(11, 7), (64, None), (20, 100)]
N, M, P = 29, 37, 0.3


def inputs(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Two sequences, four query heads on two key heads, fewer queries than keys."""
    made = [torch.randn(2, heads, n, 8, dtype=torch.float64) for heads, n in ((4, N), (2, M), (2, M))]
    made[0] *= scale
    return tuple(x.requires_grad_() for x in made)  # type: ignore[return-value]


def dense(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | float = 0.0, kept: Tensor | float = 1.0
) -> Tensor:
    """Softmax over the pairs seen, weights then dropped; nothing where a row sees no key."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = (q @ k.mT / math.sqrt(q.shape[-1]) + bias).masked_fill(~seen, -math.inf)
    top = logits.amax(-1, keepdim=True).detach().clamp_min(-1e300)
    weights = torch.exp(logits - top)
    return weights * kept / weights.sum(-1, keepdim=True).clamp_min(1e-300) @ v


def agree(got: Tensor, expected: Tensor, leaves: list[Tensor], close: float = 1e-9) -> None:
    torch.testing.assert_close(got, expected, rtol=close, atol=close)
    towards = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(x, leaves, towards) for x in (got, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=10 * close, atol=10 * close)


def visible() -> Tensor:
    return torch.arange(M) <= torch.arange(M - N, M).unsqueeze(1)


@pytest.mark.paper("Memory-efficient attention (Rabe-Staats)", "definition")
@pytest.mark.paper("Memory-efficient attention (Rabe-Staats)", "works_when")
@pytest.mark.parametrize(("query_chunk", "key_chunk"), CHUNKS)
def test_it_is_dense_softmax_under_masks_and_biases_for_any_chunks(query_chunk: int, key_chunk: int | None) -> None:
    core, (q, k, v) = ChunkedCore(query_chunk, key_chunk), inputs()
    slopes, table = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4,), (4, N, M)))
    padding = torch.rand(2, M) < 0.6
    padding[0] = False  # a sequence without a token
    seen = visible() & padding[:, None, None]
    distance = (torch.arange(M - N, M).unsqueeze(1) - torch.arange(M)).abs()
    agree(
        core(q, k, v, within=causal & key_padding(padding), bias=[alibi(slopes), table]),
        dense(q, k, v, seen, table - slopes.view(4, 1, 1) * distance),
        [q, k, v, slopes, table],
    )
    agree(core(q, k, v), dense(q, k, v, torch.ones(N, M, dtype=torch.bool)), [q, k, v])


@pytest.mark.paper("Memory-efficient attention (Rabe-Staats)", "works_when")
@pytest.mark.parametrize(("query_chunk", "key_chunk"), [(11, 7), (1024, 4096)])
def test_extreme_logits_are_those_of_dense_softmax(query_chunk: int, key_chunk: int | None) -> None:
    core, (q, k, v) = ChunkedCore(query_chunk, key_chunk), inputs(scale=1e4)
    assert float((q @ k.repeat_interleave(2, 1).mT).detach().abs().max()) > 3e4
    agree(
        core(q, k, v, within=causal), dense(q, k, v, visible()), [q, k, v], close=1e-7
    )  # logits of 30,000 leave twelve digits


@pytest.mark.paper("Memory-efficient attention (Rabe-Staats)", "works_when")
@pytest.mark.parametrize(("query_chunk", "key_chunk"), CHUNKS)
def test_dropout_drops_the_same_weights_whatever_the_chunks(query_chunk: int, key_chunk: int | None) -> None:
    """What attend drops by that seed, seen in its weights, is dropped of dense softmax, in the backward pass too."""
    q, k, v = inputs()
    with torch.no_grad():
        each = torch.eye(M, dtype=torch.float64).expand(2, 2, M, M)
        whole, left = (attend(q, k, each, causal, dropout=p, seed=11) for p in (0.0, P))
        kept = torch.where(whole > 0, left / whole, 0)
    assert set(kept[:, :, visible()].mul(1 - P).round(decimals=6).unique().tolist()) == {0.0, 1.0}
    got = ChunkedCore(query_chunk, key_chunk)(q, k, v, within=causal, dropout=P, seed=11)
    agree(got, dense(q, k, v, visible(), kept=kept), [q, k, v])


def test_a_mixer_drops_in_training_alone_and_afresh_each_time() -> None:
    torch.manual_seed(3)
    model = mixer("memory_efficient_attention", 32, heads=4, dropout=0.5, query_chunk=7, key_chunk=5)
    plain = mixer("memory_efficient_attention", 32, heads=4)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 19, 32)
    torch.testing.assert_close(model.eval()(x), plain(x))
    model.train()
    assert not torch.allclose(model(x), model(x)) and not torch.allclose(model(x), plain(x))
    with pytest.raises(ValueError, match="probability"):
        mixer("memory_efficient_attention", 32, dropout=1.0)


@pytest.mark.paper("Memory-efficient attention (Rabe-Staats)", "works_when")
def test_peak_memory_was_measured_to_grow_linearly() -> None:
    cases = json.loads((RESULTS / "memory_efficient_cpu.json").read_text(encoding="utf-8"))["cases"]
    for task in ("forward", "forward + backward"):
        own = {case["tokens"]: case for case in cases if case["task"] == task}
        assert max(own) >= 2**14
        least, most = min(own), max(own)
        table = 4 * most**2  # bytes of one head's weights
        assert own[most]["bytes"]["chunked"] < table / 8
        assert own[most]["bytes"]["chunked"] <= 1.3 * most / least * own[least]["bytes"]["chunked"] + 2**22
        assert all(case["error"] < 1e-3 for case in own.values())
        assert own[least]["seconds"]["chunked"] < 1.3 * own[least]["seconds"]["attend"]


def test_documents_of_a_pack_are_kept_apart() -> None:
    q, k, v = torch.randn(3, 1, 2, 23, 8, dtype=torch.float64).unbind(0)
    parts = [dense(*each, torch.ones(n, n, dtype=torch.bool).tril()) for n, *each in _documents(q, k, v, (9, 0, 14))]
    got = ChunkedCore(8, 5)(q, k, v, within=causal, layout=Packed([9, 0, 14]))
    torch.testing.assert_close(got, torch.cat(parts, 2), rtol=1e-9, atol=1e-9)


def _documents(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    cut = zip(lengths, *(x.split(lengths, 2) for x in (q, k, v)), strict=True)
    return [each for each in cut if each[0]]
