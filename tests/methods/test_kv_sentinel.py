"""KV-Sentinel: who sees whom pair by pair, the model by hand under that mask, and a cache that spans have left."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.support.llama_by_hand import logits, turned
from tests.support.small_models import small_model
from torch import Tensor

from foveate.catalogue import tiers
from foveate.methods.kv_sentinel import sentinel_inputs

pytest.importorskip("transformers")
CL, CR = 48, 49
# where spans are in a text of 40 tokens: first and last sentinel
SPANS = [(2, 5), (6, 7), (11, 20), (30, 38)]
LENGTH = 40


def text(spans: list[tuple[int, int]] = SPANS, length: int = LENGTH) -> Tensor:
    tokens = torch.randint(1, 40, (length,))
    for first, last in spans:
        tokens[first], tokens[last] = CL, CR
    return tokens


def by_pairs(spans: list[tuple[int, int]] = SPANS, length: int = LENGTH) -> tuple[Tensor, Tensor, list[int]]:
    """The mask of the authors' code, positions that sentinels do not move, and labels, token by token."""
    begins, ends = {first for first, _ in spans}, {last for _, last in spans}
    inside = {at: number for number, (first, last) in enumerate(spans) for at in range(first + 1, last)}
    mask = torch.zeros(length, length, dtype=torch.bool)
    for j in range(length):
        for k in range(j + 1):
            if j == k:
                mask[j, k] = True
            elif j in ends:
                mask[j, k] = any(first <= k <= last == j for first, last in spans)
            elif j not in begins:
                mask[j, k] = k in ends or (k not in begins and (k not in inside or inside.get(j) == inside[k]))
    places, count = [], 0
    for j in range(length):
        if j in begins | ends:
            places.append(max(count - 1, 0))
        else:
            places.append(count)
            count += 1
    learns = []
    for j in range(length):  # the token that the one before position j learns, -1 for none
        if j - 1 in begins | ends:
            learns.append(-1)
            continue
        after = [t for t in range(j, length) if t not in begins | ends]
        learns.append(after[0] if after else -1)
    return mask, torch.tensor(places), learns


def by_hand(spans: list[tuple[int, int]] = SPANS, length: int = LENGTH):
    mask, at, _ = by_pairs(spans, length)

    def heads_out(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        scores = turned(q, at) @ turned(k, at).mT * q.shape[-1] ** -0.5
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v

    return heads_out


@pytest.mark.paper("KV-Sentinel", "definition")
@pytest.mark.paper("KV-Sentinel", "works_when")
def test_the_mask_positions_and_labels_are_those_of_the_authors_code() -> None:
    tokens, (mask, places, learns) = text(), by_pairs()
    inputs = sentinel_inputs(tokens[None], CL, CR)
    assert torch.equal(inputs.attention_mask, mask[None, None])
    assert torch.equal(inputs.position_ids, places[None])
    assert inputs.labels[0].tolist() == [-100 if at < 0 else tokens[at].item() for at in learns]


@pytest.mark.paper("KV-Sentinel", "definition")
@pytest.mark.paper("KV-Sentinel", "works_when")
@pytest.mark.parametrize(
    "cuts",
    [[LENGTH], [1] * LENGTH, [4, 9, 1, 1, 20, 5], [21] + [1] * 19],
    ids=["whole", "steps", "parts", "prompt"],
)
def test_training_and_a_cache_without_the_spans_give_the_same_logits(cuts: list[int]) -> None:
    """The model written out, transformers under the training mask, and the method in any parts."""
    model, tokens = small_model("llama"), text()
    want = logits(model, tokens, by_hand())
    inputs = sentinel_inputs(tokens[None], CL, CR)
    close = {"atol": 1e-5, "rtol": 1e-5}  # transformers' angles are float32
    with torch.no_grad():
        trained = model(tokens[None], attention_mask=inputs.attention_mask, position_ids=inputs.position_ids).logits
        torch.testing.assert_close(trained[0], want, **close)
        change = tiers.row("kv_sentinel").make(begin=CL, end=CR).install(model)
        try:
            cache, got, seen = None, [], 0
            for part in tokens.split(cuts):
                out = model(part[None], past_key_values=cache)
                cache = out.past_key_values
                got.append(out.logits[0])
                seen += len(part)
                assert {layer.keys.shape[2] for layer in cache.layers} == {kept(seen)}
        finally:
            change.undo()
    torch.testing.assert_close(torch.cat(got), want, **close)
    torch.testing.assert_close(torch.cat(got), trained[0], atol=1e-10, rtol=1e-10)


def kept(seen: int) -> int:
    """Tokens that a later one may see, of the first ``seen``: closed spans are their ends alone."""
    return seen - sum(last - first for first, last in SPANS if last < seen)


@pytest.mark.paper("KV-Sentinel", "works_when")
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma3"])
def test_other_models_and_texts_of_a_batch_with_spans_of_their_own(name: str) -> None:
    """Learned positions, norms of heads, windows; spans end at other places in each text, one of which is padded."""
    model, short = small_model(name), 31
    plans = [(SPANS, LENGTH), ([(0, 3), (9, 25)], short)]
    tokens, mask = torch.zeros(2, LENGTH, dtype=torch.long), torch.zeros(2, LENGTH, dtype=torch.long)
    for row, (spans, length) in enumerate(plans):
        tokens[row, LENGTH - length :], mask[row, LENGTH - length :] = text(spans, length), 1
    inputs = sentinel_inputs(tokens, CL, CR, mask)
    if name == "gemma3":  # whose windows count distances in the text
        apart = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        near = inputs.attention_mask & (apart < 16)
        given: object = {"full_attention": inputs.attention_mask, "sliding_attention": near}
    else:
        given = inputs.attention_mask
    with torch.no_grad():
        want = model(tokens, attention_mask=given, position_ids=inputs.position_ids).logits
        change = tiers.row("kv_sentinel").make(begin=CL, end=CR).install(model)
        try:
            cache, got = None, []
            for end in (22, *range(23, LENGTH + 1)):
                done = sum(part.shape[1] for part in got)
                out = model(tokens[:, done:end], attention_mask=mask[:, :end], past_key_values=cache)
                cache = out.past_key_values
                got.append(out.logits)
            held = cache.layers[-1].keys.shape[2]
        finally:
            change.undo()
    real = mask.bool()
    torch.testing.assert_close(torch.cat(got, 1)[real], want[real], atol=1e-10, rtol=1e-10)
    assert held == max(kept(LENGTH), short - 3 - 16)


@pytest.mark.paper("KV-Sentinel", "works_when")
def test_a_model_learns_under_the_mask_to_use_what_ends_hold() -> None:
    """One pass a step: what was in a span comes again after it, which only its end can tell."""
    model = copy.deepcopy(small_model("llama")).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        word = torch.randint(1, 6, (16, 1))
        filler = torch.randint(10, 13, (16, 3))
        tokens = torch.cat([torch.full_like(word, CL), word, word, torch.full_like(word, CR), filler, word], 1)
        inputs = sentinel_inputs(tokens, CL, CR)
        found = model(tokens, attention_mask=inputs.attention_mask, position_ids=inputs.position_ids).logits
        loss = torch.nn.functional.cross_entropy(found[:, -2], tokens[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 1.0 < torch.tensor(5.0).log() < losses[0]


def test_rejected_drafts_and_beams() -> None:
    """Tokens taken back, a closed span among them, and entries chosen anew leave what was before."""
    model, tokens = small_model("llama"), text()[None].repeat(2, 1)
    tokens[1, 15] = 7
    with torch.no_grad():
        change = tiers.row("kv_sentinel").make(begin=CL, end=CR).install(model)
        try:
            want = model(tokens).logits
            cache = model(tokens[:, :13]).past_key_values
            for layer in cache.layers:
                layer.activate_past_recording()
            draft = torch.cat([tokens[:, 13:15], torch.full((2, 1), CR), tokens[:, :3]], 1)
            cache = model(draft, past_key_values=cache).past_key_values
            cache.crop(-4)
            cache.reorder_cache(torch.tensor([1, 0]))
            got = model(tokens[:, 15:].flip(0), past_key_values=cache).logits
        finally:
            change.undo()
    torch.testing.assert_close(got.flip(0), want[:, 15:])


def test_refusals_in_words() -> None:
    with pytest.raises(ValueError, match="ids of different tokens"):
        tiers.row("kv_sentinel").make(begin=3, end=3)
    model = small_model("llama")
    change = tiers.row("kv_sentinel").make(begin=3, end=4).install(model)
    try:
        with pytest.raises(ValueError, match="call the model with input_ids"):
            model(inputs_embeds=torch.zeros(1, 3, 32, dtype=torch.float64))
    finally:
        change.undo()
