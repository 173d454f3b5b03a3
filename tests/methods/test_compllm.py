"""CompLLM: segments through Llama with adapters written out, the loss, training, and a cache of segments."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tests.support.llama_by_hand import turned
from tests.support.small_models import small_model
from torch import Tensor, nn

from foveate.catalogue import tiers
from foveate.methods.compllm import SegmentCompressor, compress_loss

pytest.importorskip("transformers")
SEGMENT, RATE, END = 6, 2, 49


def states_by_hand(model: Any, x: Tensor, compressor: SegmentCompressor | None = None) -> list[Tensor]:
    """What each layer makes of embeddings (N, C), the last behind the final norm, with adapters or without."""

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    states, at = [], torch.arange(len(x))
    for number, layer in enumerate(model.model.layers):

        def through(y: Tensor, part: str, number: int = number, layer: Any = layer) -> Tensor:
            out = y @ layer.get_submodule(part).weight.T
            if compressor is None:
                return out
            low = compressor.adapters.beside[f"model/layers/{number}/{part.replace('.', '/')}"]
            return out + (y @ low.down.T) @ low.up.T / math.sqrt(3)

        y = rms(x, layer.input_layernorm.weight)
        q = turned(through(y, "self_attn.q_proj").view(len(x), 4, 8).transpose(0, 1), at)
        k = turned(through(y, "self_attn.k_proj").view(len(x), 2, 8).transpose(0, 1), at).repeat_interleave(2, 0)
        v = through(y, "self_attn.v_proj").view(len(x), 2, 8).transpose(0, 1).repeat_interleave(2, 0)
        scores = (q @ k.mT / math.sqrt(8)).masked_fill(at[:, None] < at, -math.inf)
        x = x + through((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), "self_attn.o_proj")
        y = rms(x, layer.post_attention_layernorm.weight)
        gate = torch.nn.functional.silu(through(y, "mlp.gate_proj"))
        x = x + through(gate * through(y, "mlp.up_proj"), "mlp.down_proj")
        states.append(x)
    return [*states[:-1], rms(x, model.model.norm.weight)]


def concepts_by_hand(model: Any, compressor: SegmentCompressor, context: Tensor) -> Tensor:
    parts = []
    for segment in context.split(SEGMENT):
        count = math.ceil(len(segment) / RATE)
        tokens = torch.cat([segment, torch.full((count,), END)])
        last = states_by_hand(model, model.model.embed_tokens.weight[tokens], compressor)[-1][-count:]
        parts.append(last @ compressor.to_concepts.weight.T + compressor.to_concepts.bias)
    return torch.cat(parts)


def a_compressor(model: nn.Module) -> SegmentCompressor:
    compressor = SegmentCompressor(model, segment=SEGMENT, rate=RATE, rank=3, end=END)
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.normal_(std=0.2)
    return compressor


@pytest.mark.paper("CompLLM", "definition")
def test_each_segment_becomes_half_as_many_embeddings_by_itself() -> None:
    """Values and gradients, the last segment shorter and of odd length."""
    model = small_model("llama")
    compressor, context = a_compressor(model), torch.randint(1, 49, (2 * SEGMENT + 3,))
    got, want = compressor.embed(model, context), concepts_by_hand(model, compressor, context)
    assert got.shape == (3 + 3 + 2, 32)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)  # transformers' angles are float32
    towards, wanted = torch.randn_like(want), list(compressor.parameters())
    for mine, other in zip(*(torch.autograd.grad(one, wanted, towards) for one in (got, want)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@pytest.mark.paper("CompLLM", "definition")
def test_the_loss_is_of_hidden_states_of_the_answer_in_all_layers() -> None:
    model = small_model("llama")
    compressor, context, tokens = a_compressor(model), torch.randint(1, 49, (2, 12)), torch.randint(1, 49, (2, 7))
    embed = model.model.embed_tokens.weight
    whole = [states_by_hand(model, embed[torch.cat(pair)]) for pair in zip(context, tokens, strict=True)]
    short = [
        states_by_hand(model, torch.cat([concepts_by_hand(model, compressor, one), embed[after]]))
        for one, after in zip(context, tokens, strict=True)
    ]
    losses = []
    for layer in range(2):
        target, found = (torch.stack([states[layer][-3:] for states in both]) for both in (whole, short))
        apart = ((found - target) / target.std()).abs()
        losses.append(torch.where(apart < 1, apart**2 / 2, apart - 0.5).mean())
    got = compress_loss(model, compressor, context, tokens, answer=3)
    torch.testing.assert_close(got, sum(losses) / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.paper("CompLLM", "works_when")
def test_the_frozen_model_reads_concepts_and_segments_are_compressed_once() -> None:
    """Questions about overlapping contexts of other lengths, in one batch; the cache is half as long there."""
    model = small_model("llama")
    compressor = a_compressor(model)
    shared, own = torch.randint(1, 49, (2 * SEGMENT,)), torch.randint(1, 49, (SEGMENT + 3,))
    contexts, question = [torch.cat([shared, own]), shared], torch.randint(1, 49, (2, 4))
    method = tiers.row("compllm").make(compressor=compressor)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    counts: list[int] = []
    inner = compressor.compress
    compressor.compress = lambda model, parts: (counts.append(len(parts)), inner(model, parts))[1]
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    change = method.install(model)
    try:
        written = model.generate(question, context=contexts, **options)
        assert sum(counts) == len(method.known) == 4  # segments, of six in both contexts
        again = model.generate(question.flip(0), context=contexts[::-1], return_dict_in_generate=True, **options)
        assert sum(counts) == 4
        plain = model.generate(question, attention_mask=torch.ones_like(question), **options)
    finally:
        change.undo()
    assert torch.equal(again.sequences, written.flip(0))
    assert again.past_key_values.get_seq_length() == (2 * SEGMENT + SEGMENT) // RATE + 2 + 4 + 4
    assert torch.equal(plain, model.generate(question, attention_mask=torch.ones_like(question), **options))
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    for row, context in enumerate(contexts):
        x = torch.cat([concepts_by_hand(model, compressor, context), model.model.embed_tokens.weight[question[row]]])
        for token in written[row]:
            logits = states_by_hand(model, x)[-1][-1] @ model.lm_head.weight.T
            assert token == logits.argmax()
            x = torch.cat([x, model.model.embed_tokens.weight[token][None]])


@pytest.mark.paper("CompLLM", "works_when")
def test_a_compressor_learns_by_distillation_what_a_frozen_model_needs() -> None:
    """The loss of some contexts falls; only the compressor gets gradients."""
    model = copy.deepcopy(small_model("llama")).float().requires_grad_(False)
    compressor = SegmentCompressor(model, segment=SEGMENT, rate=RATE, rank=8, end=END)
    parts = torch.randint(1, 49, (8, 2 * SEGMENT + 6)).split([2 * SEGMENT, 6], 1)
    optimizer, losses = torch.optim.Adam(compressor.parameters(), lr=5e-3), []
    for _ in range(25):
        loss = compress_loss(model, compressor, *parts, answer=4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is not None for parameter in compressor.parameters())


def test_refusals_in_words() -> None:
    row, model = tiers.row("compllm"), small_model("llama")
    for make in (row.make, lambda **options: SegmentCompressor(model, **options)):
        with pytest.raises(ValueError, match="at least rate tokens"):
            make(segment=2, rate=3)
    with pytest.raises(TypeError, match="compressor is a SegmentCompressor"):
        row.make(compressor=nn.Linear(2, 2))
    change = row.make(segment=4).install(model)
    try:
        with pytest.raises(ValueError, match="as many contexts"):
            model.generate(torch.tensor([[1, 2]]), context=[])
        with pytest.raises(ValueError, match="undo it first"):
            row.make(segment=4).install(model)
    finally:
        change.undo()


def test_models_do_not_share_what_is_known_of_segments() -> None:
    """One method object in two models: each reads what its own compressor makes of a context."""
    method = tiers.row("compllm").make(segment=6, rate=2)
    contexts, question = [torch.arange(1, 13)], torch.arange(3, 6).view(1, 3)
    first, second = small_model("llama"), small_model("qwen3")
    changes = [method.install(model) for model in (first, second)]
    writes = [
        model.generate(question, context=contexts, max_new_tokens=5, min_new_tokens=5) for model in (second, first)
    ]
    assert all(out.shape == (1, 5) for out in writes)
    for model in (first, second):
        model.__dict__["generate"].args[2].clear()
    again = [
        model.generate(question, context=contexts, max_new_tokens=5, min_new_tokens=5) for model in (second, first)
    ]
    for one, other, change in zip(writes, again, changes, strict=True):
        assert torch.equal(one, other)
        change.undo()
