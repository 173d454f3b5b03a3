"""Delta correction: what it computes inside a model and around any sparse attention, and when it helps."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.llama_by_hand import logits, turned
from tests.support.small_models import small_model
from torch import Tensor

from foveate import attend, causal, sinks, vertical_slash, window
from foveate.catalogue import tiers
from foveate.mixers.core import PatternCore
from foveate.mixers.static_sparse.delta_attention import DeltaCore
from foveate.models import builtin
from foveate.patterns import Pattern, full

pytest.importorskip("transformers")


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf), -1) @ v


def spread(sparse: Tensor, exact: Tensor, stride: int, tail: int) -> Tensor:
    """Row by row: the error of the last query at the stride is taken back; the tail is exact."""
    length = sparse.shape[-2]
    end = length - length % stride - max(tail, stride) if tail else length
    rows = []
    for i in range(length):
        j = i // stride * stride
        rows.append(exact[..., i, :] if i >= end else sparse[..., i, :] + exact[..., j, :] - sparse[..., j, :])
    return torch.stack(rows, -2)


@pytest.mark.paper("Delta Attention", "definition")
@pytest.mark.parametrize(("stride", "tail"), [(5, 3), (4, 11), (7, 0), (60, 1)])
@torch.no_grad()
def test_a_model_reads_its_prompt_corrected_and_decodes_densely(stride: int, tail: int) -> None:
    model, tokens, prompt = small_model("llama"), torch.randint(1, 50, (49,)), 43
    place = torch.arange(49)
    distance = place.unsqueeze(1) - place
    allowed = distance >= 0
    near = allowed & ((distance < 6) | (place < 2))

    def heads_out(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        q, k = turned(q, place), turned(k, place)
        exact, sparse = dense(q, k, v, allowed), dense(q, k, v, near)
        return torch.cat([spread(sparse[:, :prompt], exact[:, :prompt], stride, tail), exact[:, prompt:]], 1)

    want = logits(model, tokens, heads_out)
    base = sinks(2) | window(5, 0)
    change = tiers.row("delta_correction").make(base=base, stride=stride, tail=tail).install(model)
    try:
        read = model(tokens[None, :prompt])
        got = [read.logits[0]]
        for token in tokens[prompt:]:
            got.append(model(token.view(1, 1), past_key_values=read.past_key_values).logits[0])
    finally:
        change.undo()
    torch.testing.assert_close(torch.cat(got), want, atol=1e-5, rtol=1e-5)  # transformers' angles are float32


class Halves:
    """A sparse attention that is no pattern: the mean of two windows' outputs."""

    pattern: Pattern = window(8, 0)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, within: Pattern = full, **options: object) -> Tensor:
        return (attend(q, k, v, window(8, 0) & within) + attend(q, k, v, window(3, 0) & within)) / 2


@pytest.mark.paper("Delta Attention", "works_when")
@pytest.mark.parametrize("base", [Halves(), PatternCore(vertical_slash(4, 5, last=6)), PatternCore(window(3, 0))])
def test_it_wraps_any_sparse_attention_and_is_exact_at_a_stride_of_one(base: object) -> None:
    q, k, v = torch.randn(3, 2, 4, 61, 8, dtype=torch.float64).unbind(0)
    everything = torch.ones(61, 61, dtype=torch.bool).tril()
    exact, sparse = dense(q, k, v, everything), base(q, k, v, within=causal)  # type: ignore[operator]
    for stride, tail in ((1, 0), (1, 9), (8, 0), (8, 5)):
        got = DeltaCore(base, stride, tail)(q, k, v, within=causal)  # type: ignore[arg-type]
        wanted = exact if stride == 1 else spread(sparse, exact, stride, tail)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def wandering(length: int, alike: float) -> Tensor:
    """Queries of a common direction and a part of their own, of unit variance: any two have the cosine ``alike``."""
    common = torch.randn(1, 4, 1, 32)
    return alike**0.5 * common + (1 - alike) ** 0.5 * torch.randn(1, 4, length, 32)


def ratio(q: Tensor, k: Tensor, v: Tensor, *, stride: int = 64, near: int = 512) -> float:
    """The error with the correction over the error without it, before the tail, in norm over all outputs."""
    base = PatternCore(sinks(4) | window(near - 1, 0))
    end = q.shape[2] - q.shape[2] % stride - 128
    exact = attend(q, k, v, causal)[:, :, :end]
    corrected, sparse = (core(q, k, v, within=causal)[:, :, :end] for core in (DeltaCore(base, stride, 128), base))
    return float((corrected - exact).norm() / (sparse - exact).norm())


@pytest.mark.paper("Delta Attention", "works_when")
@pytest.mark.parametrize("seed", range(4))
def test_it_comes_nearer_to_full_attention_on_long_inputs_whose_queries_are_alike(seed: int) -> None:
    """4096 random tokens, keys and values all independent: errors shrink where queries are alike, else they grow.

    Softmax weights of queries with the cosine a and logits of variance 1 overlap by exp(a - 1): the correction leaves
    about sqrt(2 (1 - exp(a - 1))) of the error, and a little more for the window's way between.
    """
    torch.manual_seed(seed)
    k, v = torch.randn(2, 1, 4, 4096, 32).unbind(0)
    for alike, least, most in ((0.9, 0.3, 0.65), (0.7, 0.6, 0.9), (0.0, 1.05, 1.3)):
        assert least < ratio(wandering(4096, alike), k, v) < most


@torch.no_grad()
def test_it_does_not_help_the_small_built_in_model() -> None:
    """Real text, real heads: errors of neighbours are unlike, and the row's docstring says so."""
    model, tokenizer = builtin.load()
    tokens = tokenizer(builtin.heldout_text(6_000), return_tensors="pt").input_ids[:, :1500]
    exact, apart = model(tokens).logits.log_softmax(-1), {}
    for name, made in (
        ("sparse", tiers.row("delta_correction").make(base="streaming_llm(window=128)", stride=1500, tail=0)),
        ("corrected", tiers.row("delta_correction").make(base="streaming_llm(window=128)", stride=16, tail=1)),
    ):
        change = made.install(model)
        ours = model(tokens).logits.log_softmax(-1)[:, :1450]
        change.undo()
        apart[name] = float((exact[:, :1450].exp() * (exact[:, :1450] - ours)).sum(-1).mean())
    assert apart["corrected"] > 0.9 * apart["sparse"]


def test_pairs_seen_are_those_of_the_base_and_of_every_query_at_the_stride() -> None:
    length, stride = 90, 8
    place = torch.arange(length)
    distance = place.unsqueeze(1) - place
    seen = (distance >= 0) & ((distance < 4) | (place < 1) | (place % stride == 0).unsqueeze(1))
    pattern = DeltaCore(PatternCore(sinks(1) | window(3, 0)), stride).pattern & causal
    q = torch.randn(1, 1, length, 4)
    assert torch.equal(pattern.select(q, q, tile=8).to_dense()[0, 0], seen)


def test_unless_told_otherwise_it_corrects_streaming_of_four_sinks_and_a_window_of_2048() -> None:
    core = tiers.row("delta_correction").make().core
    assert (str(core.base.pattern), core.stride, core.tail) == ("sinks(4) | window(2047, 0)", 64, 128)
