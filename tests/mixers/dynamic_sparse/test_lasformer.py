"""Lasformer: keys by narrow scores written out, for itself and for a context, and a selector that learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from foveate.catalogue.registry import mixer

DIM, HEADS, GROUPS, WIDTH, NARROW = 24, 4, 2, 6, 3


def model(*, random: bool = True, **options: object) -> torch.nn.Module:
    made = mixer("lasformer", DIM, heads=HEADS, kv_heads=GROUPS, select_dim=NARROW, **options).double()
    if random:
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return made


def logits(layer_q: torch.nn.Module, layer_k: torch.nn.Module, x: Tensor, source: Tensor, head: int) -> Tensor:
    """Products of one head, (N, M), of one text."""
    width = layer_q.weight.shape[0] // HEADS
    of_q, of_k = head * width, head // (HEADS // GROUPS) * width
    q, k = x @ layer_q.weight[of_q : of_q + width].T, source @ layer_k.weight[of_k : of_k + width].T
    return q @ k.T / math.sqrt(width)


def formula(made: torch.nn.Module, x: Tensor, source: Tensor, keep: int, is_causal: bool) -> Tensor:
    outs = []
    for own, other in zip(x, source, strict=True):
        heads = []
        for head in range(HEADS):
            narrow = logits(made.select_q, made.select_k, own, other, head).tolist()
            mask = torch.zeros(len(own), len(other), dtype=torch.bool)
            for i, row in enumerate(narrow):
                seen = range(i + 1) if is_causal else range(len(other))
                mask[i, sorted(seen, key=lambda j: -row[j])[:keep]] = True
            weights = logits(made.to_q, made.to_k, own, other, head).masked_fill(~mask, float("-inf")).softmax(1)
            group = head // (HEADS // GROUPS) * WIDTH
            heads.append(weights @ (other @ made.to_v.weight[group : group + WIDTH].T))
        outs.append(torch.cat(heads, 1))
    return torch.stack(outs) @ made.to_out.weight.T


@pytest.mark.paper("Lasformer", "definition")
@pytest.mark.paper("Lasformer", "works_when")
@pytest.mark.parametrize(("kind", "random"), [("causal", True), ("both ways", True), ("cross", True), ("cross", False)])
@pytest.mark.parametrize("keep", [4, 50])
def test_each_query_attends_to_the_keys_that_the_selector_scores_best(kind: str, random: bool, keep: int) -> None:
    made = model(keep=keep, causal=kind == "causal", random=random)
    x, other = (torch.randn(2, length, DIM, dtype=torch.float64, requires_grad=True) for length in (21, 34))
    source = other if kind == "cross" else x
    expected = formula(made, x, source, keep, kind == "causal")
    out = made(x, context=other) if kind == "cross" else made(x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    leaves = [x, *(layer.weight for layer in (made.to_q, made.to_k, made.to_v, made.to_out))]
    leaves += [other] if kind == "cross" else []
    towards = torch.randn_like(out)
    for one, theirs in zip(*(torch.autograd.grad(y, leaves, towards) for y in (out, expected)), strict=True):
        torch.testing.assert_close(one, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.paper("Lasformer", "definition")
@pytest.mark.paper("Lasformer", "works_when")
@pytest.mark.parametrize("kind", ["causal", "cross"])
def test_the_selector_learns_by_its_divergence_from_full_attention(kind: str) -> None:
    made = model(causal=kind == "causal")
    x, other = (torch.randn(2, length, DIM, dtype=torch.float64) for length in (9, 13))
    source, total = (other, 0.0) if kind == "cross" else (x, 0.0)
    for own, theirs in zip(x, source, strict=True):
        for head in range(HEADS):
            full, narrow = (
                logits(*layers, own, theirs, head)
                for layers in ((made.to_q, made.to_k), (made.select_q, made.select_k))
            )
            for i in range(9):
                seen = slice(0, i + 1) if kind == "causal" else slice(None)
                wanted = full[i, seen].detach().softmax(0)
                total = total + (wanted * (wanted.log() - narrow[i, seen].log_softmax(0))).sum() / (2 * HEADS * 9)
    loss = made.selection_loss(x, context=other) if kind == "cross" else made.selection_loss(x)
    torch.testing.assert_close(loss, total, rtol=1e-9, atol=1e-9)
    selector = [made.select_q.weight, made.select_k.weight]
    for one, theirs in zip(*(torch.autograd.grad(y, selector) for y in (loss, total)), strict=True):
        torch.testing.assert_close(one, theirs, rtol=1e-8, atol=1e-8)
    x.requires_grad_()
    (made.selection_loss(x, context=other) if kind == "cross" else made.selection_loss(x)).backward()
    assert x.grad is None
    assert all((p.grad is not None) == name.startswith("select") for name, p in made.named_parameters())


@pytest.mark.paper("Lasformer", "works_when")
def test_an_aligned_selector_chooses_what_full_attention_reads() -> None:
    """On texts that it was not trained on, by the share of full attention that 4 of 48 keys hold."""
    torch.manual_seed(0)
    made = mixer("lasformer", 16, heads=2, keep=4, select_dim=4, causal=False)
    with torch.no_grad():
        for layer in (made.to_q, made.to_k):
            layer.weight *= 3

    def chosen_share(test: Tensor) -> float:
        with torch.no_grad():
            q, k, _ = made.project(test, test)
            weights, narrow = made.logits(q, k).softmax(-1), made.logits(*made.selectors(test, test))
            return float(weights.gather(3, narrow.topk(4, dim=3).indices).sum(-1).mean())

    test = torch.randn(8, 48, 16)
    before = chosen_share(test)
    optimizer = torch.optim.Adam([made.select_q.weight, made.select_k.weight], lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        made.selection_loss(torch.randn(8, 48, 16)).backward()
        optimizer.step()
    assert chosen_share(test) > 1.5 * before


@pytest.mark.paper("Lasformer", "works_when")
@pytest.mark.parametrize("kind", ["causal", "both ways", "cross"])
def test_of_full_attention_only_the_chosen_keys_are_computed(kind: str) -> None:
    """Products counted as they run: narrow ones of all pairs, wide ones of the gathered keys, projections."""
    queries, keys, keep, wide = 96, 160 if kind == "cross" else 96, 5, 32
    made = mixer("lasformer", 2 * wide, heads=2, keep=keep, select_dim=4, causal=kind == "causal")
    x, source = torch.randn(1, queries, 2 * wide), torch.randn(1, keys, 2 * wide)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(x, context=source) if kind == "cross" else made(x)
    projections = 2 * 2 * wide * (2 * wide * (2 * queries + 2 * keys) + 2 * 4 * (queries + keys))
    chosen = 2 * 2 * queries * (4 * keys + 2 * keep * wide)
    assert counter.get_total_flops() == projections + chosen


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="got 0 and 3"):
        model(keep=0)
