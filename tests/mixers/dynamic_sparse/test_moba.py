"""MoBA: the model around its pattern, and the work that it saves."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from tests.support.heads import agree, plain, qkv
from torch import Tensor

from foveate import causal, topk_blocks
from foveate.attention.impl.native import KEYS_OF_VISIT
from foveate.catalogue.registry import mixer
from foveate.kernels.cpu.loader import library
from foveate.mixers.dynamic_sparse.moba import MoBA
from foveate.patterns.select import build

HEADS, GROUPS, BLOCK, CHOSEN = 4, 2, 5, 3
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def model(k: int) -> torch.nn.Module:
    made = mixer("moba", 24, heads=HEADS, kv_heads=GROUPS, block=BLOCK, k=k).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def formula(moba: torch.nn.Module, x: Tensor, k: int) -> Tensor:
    """Token by token: softmax over the query's own block and the k - 1 earlier ones of the best mean keys."""
    batch, length, _ = x.shape
    width = x.shape[2] // HEADS
    q = (x @ moba.to_q.weight.T).view(batch, length, HEADS, width)
    keys, values = ((x @ layer.weight.T).view(batch, length, GROUPS, width) for layer in (moba.to_k, moba.to_v))
    rows = []
    for b, i, h in torch.cartesian_prod(torch.arange(batch), torch.arange(length), torch.arange(HEADS)).tolist():
        own, of_group = i // BLOCK, h // (HEADS // GROUPS)
        means = [keys[b, c * BLOCK : (c + 1) * BLOCK, of_group].mean(0) for c in range(own)]
        order = sorted(range(own), key=lambda c: -float(means[c].detach() @ q[b, i, h].detach()))
        seen = [j for c in [own, *order[: k - 1]] for j in range(c * BLOCK, min((c + 1) * BLOCK, i + 1))]
        weights = torch.softmax(keys[b, seen, of_group] @ q[b, i, h] / width**0.5, 0)
        rows.append(weights @ values[b, seen, of_group])
    return torch.stack(rows).view(batch, length, -1) @ moba.to_out.weight.T


@pytest.mark.paper("MoBA", "definition")
@pytest.mark.paper("MoBA", "works_when")
@pytest.mark.parametrize("k", [1, CHOSEN])
def test_the_mixer_is_its_formula_with_shared_keys_whole_and_decoded(k: int) -> None:
    moba, x = model(k), torch.randn(2, 33, 24, dtype=torch.float64, requires_grad=True)
    expected, out = formula(moba, x, k), moba(x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    leaves, towards = [x, *moba.parameters()], torch.randn_like(out)
    wanted, got = (torch.autograd.grad(y, leaves, towards) for y in (expected, out))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    with torch.no_grad():
        first, state = moba.prefill(x[:, :17], moba.init_state(2))
        outs = [first]
        for t in range(17, 33):
            step, state = moba.decode(x[:, t : t + 1], state)
            outs.append(step)
    torch.testing.assert_close(torch.cat(outs, 1), expected.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.paper("MoBA", "works_when")
def test_with_as_many_blocks_as_there_are_it_is_attention() -> None:
    moba, x = model(7), torch.randn(2, 33, 24, dtype=torch.float64)
    dense = mixer("flash_attention", 24, heads=HEADS, kv_heads=GROUPS).double()
    dense.load_state_dict(moba.state_dict())
    torch.testing.assert_close(moba(x), dense(x), rtol=1e-9, atol=1e-9)


@pytest.mark.paper("MoBA", "works_when")
def test_it_was_measured_faster_than_dense_attention_at_long_lengths() -> None:
    cases = json.loads((RESULTS / "choice_cpu.json").read_text(encoding="utf-8"))["cases"]
    long = [case for case in cases if case["tokens"] >= 2**15]
    assert {case["task"] for case in long} == {"forward", "forward + backward"}
    assert all(case["seconds"]["dense"] > 4 * case["seconds"]["gathered"] for case in long)


@pytest.mark.skipif(library() is None, reason="no native kernels")
def test_on_random_queries_kernels_form_a_fraction_of_the_pairs() -> None:
    """Neighbouring queries choose differently, so whole tiles would save nothing; benchmarks/choice_cpu.py times it."""
    length = 8192
    q, k = torch.randn(2, 1, 2, length, 16)
    pattern, causal_pairs = topk_blocks(512, k=3), length * (length + 64) / 2
    formed = {}
    for visit in (0, KEYS_OF_VISIT[torch.float32]):
        selection = build.select(pattern, q, k, None, tile=64, scale=None, keys_of_visit=visit)
        formed[visit] = selection.computed * length**2
    assert formed[0] > 0.9 * causal_pairs
    assert formed[KEYS_OF_VISIT[torch.float32]] < 0.4 * causal_pairs


@pytest.mark.paper("MoBA", "definition")
def test_moba_is_its_formula() -> None:
    block, count, n = 5, 3, 33
    q, k, v = qkv(n)
    means = torch.stack([part.mean(2) for part in k.detach().split(block, 2)], 2).repeat_interleave(2, 1)
    seen = torch.zeros(2, 4, n, n, dtype=torch.bool)
    for b, h, i in itertools.product(range(2), range(4), range(n)):
        own = i // block
        scores = [(float(q[b, h, i].detach() @ means[b, h, c]), c) for c in range(own)]
        for chosen in [own, *(c for _, c in sorted(scores, reverse=True)[: count - 1])]:
            seen[b, h, i, chosen * block : min((chosen + 1) * block, i + 1)] = True
    agree(MoBA.as_core(block=block, k=count)(q, k, v, within=causal), plain(q, k, v, seen), q, k, v)
