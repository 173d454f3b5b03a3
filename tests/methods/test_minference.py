"""MInference against dense formulas: its three patterns, its search under a budget, and a model that it reads for."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tests.support.llama_by_hand import logits
from tests.support.small_models import small_model
from torch import Tensor

from foveate import attend, causal
from foveate.catalogue import tiers
from foveate.layers.rotary import rotate
from foveate.methods.minference import load_configuration, search_model
from foveate.mixers.dynamic_sparse.minference_search import (
    PUBLISHED,
    HeadPattern,
    as_pattern,
    search_heads,
    space_under,
)
from foveate.models import builtin

pytest.importorskip("transformers")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
BLOCK, LAST, FIRST, NEAR = 4, 6, 2, 3
SIZES = {"block": BLOCK, "last": LAST, "first": FIRST, "near": NEAR}
KINDS = (("stream_llm", 3, 7), ("vertical_and_slash", 5, 6), ("block_sparse", 3, 1))


def lines(q: Tensor, k: Tensor, vertical: int, slash: int) -> Tensor:
    """Keys and distances that the last queries of one head (N, D) attend to most, the first and the nearest always."""
    length = len(k)
    last = range(length - min(LAST, length), length)
    keys, distances = torch.zeros(length), torch.zeros(length)
    for i in last:
        weights = torch.softmax(k[: i + 1] @ q[i] / math.sqrt(q.shape[1]), 0)
        for j in range(i + 1):
            keys[j] += weights[j]
            distances[i - j] += weights[j]
    keys[:FIRST], distances[:NEAR] = math.inf, math.inf
    chosen_keys, chosen_distances = keys.topk(min(vertical, length)).indices, distances.topk(min(slash, length)).indices
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
    seen = torch.isin(distance, chosen_distances)
    seen[:, chosen_keys] = True
    return seen & (distance >= 0)


def tiles(q: Tensor, k: Tensor, count: int) -> Tensor:
    """The own block of each block of queries, and the earlier ones whose mean key suits the mean query best."""
    length = len(k)
    seen = torch.zeros(length, length, dtype=torch.bool)
    for own in range(-(-length // BLOCK)):
        rows = slice(own * BLOCK, own * BLOCK + BLOCK)
        means = [float(q[rows].mean(0) @ k[c * BLOCK : c * BLOCK + BLOCK].mean(0)) for c in range(own)]
        for c in (own, *sorted(range(own), key=lambda c: -means[c])[: count - 1]):
            seen[rows, c * BLOCK : c * BLOCK + BLOCK] = True
    return seen.tril()


def seen_by(q: Tensor, k: Tensor, one: tuple[str, int, int]) -> Tensor:
    """What one head (N, D) sees with its pattern."""
    kind, vertical, slash = one
    place = torch.arange(len(k))
    if kind == "stream_llm":
        distance = place.unsqueeze(1) - place
        return ((distance < slash) | (place < vertical)) & (distance >= 0)
    return lines(q, k, vertical, slash) if kind == "vertical_and_slash" else tiles(q, k, vertical)


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf), -1) @ v


@pytest.mark.paper("MInference", "definition")
@pytest.mark.paper("MInference", "works_when")
@pytest.mark.parametrize("length", [5, 43])
def test_each_pattern_is_its_dense_mask_with_indices_found_for_the_input(length: int) -> None:
    """And causal: however early queries' patterns are chosen, no output holds anything of a later value."""
    q, k, v = torch.randn(3, 2, 4, length, 8, dtype=torch.float64).unbind(0)
    v.requires_grad_()
    for one in KINDS:
        out = attend(q, k, v, as_pattern(HeadPattern.of(one), **SIZES) & causal)
        for b in range(2):
            for h in range(4):
                seen = seen_by(q[b, h], k[b, h], one)
                torch.testing.assert_close(out[b, h], dense(q[b, h], k[b, h], v[b, h], seen), rtol=1e-9, atol=1e-9)
        for i in (0, length // 2):
            (grad,) = torch.autograd.grad(out[:, :, i].sum(), v, retain_graph=True)
            assert not grad[:, :, i + 1 :].any() and grad[:, :, i].any()


@pytest.mark.paper("MInference", "definition")
@torch.no_grad()
def test_a_model_reads_its_prompt_by_the_patterns_of_its_heads_and_decodes_densely() -> None:
    model, tokens, prompt = small_model("llama"), torch.randint(1, 50, (47,)), 41
    assignment: list[dict[int, tuple[str, int, int]]] = [{0: KINDS[0], 3: KINDS[2]}, {1: KINDS[2]}]
    default = KINDS[1]

    def heads_out(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        from tests.support.llama_by_hand import turned

        place = torch.arange(q.shape[1])
        q, k = turned(q, place), turned(k, place)
        outs = []
        for h in range(len(q)):
            one = assignment[layer].get(h, default)
            seen = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
            seen[:prompt, :prompt] = seen_by(q[h, :prompt], k[h, :prompt], one)
            outs.append(dense(q[h], k[h], v[h], seen))
        return torch.stack(outs)

    want = logits(model, tokens, heads_out)
    change = tiers.row("minference").make(assignment=assignment, default=default, **SIZES).install(model)
    try:
        read = model(tokens[None, :prompt])
        got = [read.logits[0]]
        for token in tokens[prompt:]:
            got.append(model(token.view(1, 1), past_key_values=read.past_key_values).logits[0])
    finally:
        change.undo()
    torch.testing.assert_close(torch.cat(got), want, atol=1e-5, rtol=1e-5)  # transformers' angles are float32


@pytest.mark.paper("MInference", "works_when")
@pytest.mark.parametrize("budget", [0.1, 0.4, 1.0])
def test_every_pattern_searched_keeps_to_the_budget_and_a_full_one_is_attention(budget: float) -> None:
    length = 150
    q, k, v = torch.randn(3, 1, 2, length, 8, dtype=torch.float64).unbind(0)
    space = space_under(budget, length, block=BLOCK)
    assert {one.kind for one in space} == {one[0] for one in KINDS}
    for one in space:
        pattern = as_pattern(one, **SIZES) & causal
        chosen = pattern.select(q, k, tile=8).to_dense()
        for h in range(2):
            seen = seen_by(q[0, h], k[0, h], one)
            assert torch.equal(chosen[0, min(h, chosen.shape[1] - 1)], seen)
            assert seen.sum() <= budget * length * (length + 1) / 2
        if budget == 1:
            torch.testing.assert_close(attend(q, k, v, pattern), attend(q, k, v, causal))
    assert sum(one.kind == "vertical_and_slash" for one in PUBLISHED) == 6


@pytest.mark.paper("MInference", "works_when")
def test_the_search_takes_for_each_head_the_pattern_nearest_to_exact_attention() -> None:
    length, dim, budget = 160, 16, 0.15
    q, k, v = torch.randn(3, 1, 3, length, dim, dtype=torch.float64).unbind(0)
    near = rotate(torch.ones(1, 1, length, dim, dtype=torch.float64), torch.arange(length), 100.0)[0, 0]
    q[0, 0], k[0, 0] = 4 * near, near  # the first head looks at near keys
    q[0, 1, :, 0], k[0, 1, :, 0] = 30.0, -1.0
    k[0, 1, torch.tensor([0, 31, 77, 90]), 0] = 4.0  # the second at four keys
    found = search_heads(q, k, v, budget=budget, **SIZES)
    space = space_under(budget, length, block=BLOCK)
    everything = torch.ones(length, length, dtype=torch.bool).tril()
    for h in range(3):
        exact = dense(q[0, h], k[0, h], v[0, h], everything)
        errors = [
            float((dense(q[0, h], k[0, h], v[0, h], seen_by(q[0, h], k[0, h], one)) - exact).norm() / exact.norm())
            for one in space
        ]
        torch.testing.assert_close(found.errors[h].tolist(), errors, rtol=1e-6, atol=1e-9)
        assert found.assignment[h] == space[errors.index(min(errors))]
    assert found.assignment[1].kind == "vertical_and_slash"


@pytest.mark.paper("MInference", "works_when")
@torch.no_grad()
def test_heads_searched_offline_serve_a_text_they_have_not_seen() -> None:
    """Searched on one text, used on another: as near to the model's predictions as the best pattern for all heads.

    Not nearer: most heads of this small model look at near tokens, which the A-shape has.
    """
    model, tokenizer = builtin.load()
    text = tokenizer(builtin.heldout_text(10_000), return_tensors="pt").input_ids
    sample, other, budget = text[:, :1024], text[:, 1400:2424], 0.2
    assignment = search_model(model, sample, budget=budget)
    assert [len(layer) for layer in assignment] == [4, 4, 4, 4] and len(
        {one for a in assignment for one in a.values()}
    ) > 1
    exact, row, apart = model(other).logits.log_softmax(-1), tiers.row("minference"), []
    for given in ({"assignment": assignment}, *({"default": one} for one in space_under(budget, 1024))):
        change = row.make(**given).install(model)
        ours = model(other).logits.log_softmax(-1)
        change.undo()
        apart.append(float((exact.exp() * (exact - ours)).sum(-1).mean()))  # Kullback-Leibler, in nats a token
    searched, *alone = apart
    assert searched < 1.1 * min(alone) and searched < 0.8 * sorted(alone)[len(alone) // 2]


@pytest.mark.paper("MInference", "works_when")
def test_it_was_measured_faster_than_dense_attention_at_long_lengths() -> None:
    cases = json.loads((RESULTS / "minference_cpu.json").read_text(encoding="utf-8"))["cases"]
    longest = [case for case in cases if case["tokens"] == max(one["tokens"] for one in cases)]
    assert {case["kind"] for case in longest} == {"stream_llm", "vertical_and_slash", "block_sparse"}
    assert all(case["tokens"] >= 2**15 and case["seconds"]["dense"] > case["seconds"]["sparse"] for case in longest)


def test_the_authors_configurations_are_read(tmp_path: Path) -> None:
    theirs = [{"0": ["vertical_and_slash", 1000, 6096, 336379.0]}, {"7": ["stream_llm", 100, 800, 1.5]}]
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    assert load_configuration(tmp_path / "theirs.json") == [
        {0: HeadPattern("vertical_and_slash", 1000, 6096)},
        {7: HeadPattern("stream_llm", 100, 800)},
    ]
    assert tiers.row("minference").make(assignment=tmp_path / "theirs.json").assignment[1][7].vertical == 100


def test_wrong_assignments_are_refused_in_words() -> None:
    make, model = tiers.row("minference").make, small_model("llama")
    for wrong, message in (
        ({"default": ("b_shape", 1, 2)}, "one of stream_llm, vertical_and_slash, block_sparse"),
        ({"default": ("stream_llm", 0, 2)}, "sizes of at least 1"),
        ({"default": "stream_llm"}, "kind and two sizes"),
        ({"assignment": [{0: ("stream_llm", 4)}]}, "kind and two sizes"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**wrong)
    with pytest.raises(ValueError, match="is of 1 layers; the model has 2"):
        make(assignment=[{}]).install(model)
    with pytest.raises(ValueError, match=r"heads \[9\] are assigned"):
        make(assignment=[{}, {9: KINDS[0]}]).install(model)
    with pytest.raises(ValueError, match="budget"):
        space_under(1.5, 100)
    assert model.config._attn_implementation != "foveate"
