"""Streaming inside transformers models: endless texts at constant memory, however they are given."""

from __future__ import annotations

import pytest
import torch
from tests.support.llama_by_hand import logits, turned
from tests.support.small_models import SIX, small_model
from torch import Tensor

from foveate.adapt import use
from foveate.catalogue import tiers

pytest.importorskip("transformers")
SINKS, WINDOW = 2, 9


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def installed(model, **options):
    return tiers.row("attention_sinks").make(**({"sinks": SINKS, "window": WINDOW} | options)).install(model)


@pytest.mark.paper("StreamingLLM", "definition")
def test_a_llama_computes_what_a_llama_by_hand_with_that_cache_computes() -> None:
    model, tokens = small_model("llama"), torch.randint(1, 50, (61,))

    def heads_out(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        out = torch.zeros_like(q)
        for i in range(q.shape[1]):
            kept = [j for j in range(i + 1) if j < SINKS or i - j < WINDOW]
            places = torch.arange(len(kept))
            scores = turned(k[:, kept], places) @ turned(q[:, i], places[-1]).unsqueeze(-1) * 8**-0.5
            out[:, i] = (scores.softmax(1) * v[:, kept]).sum(1)
        return out

    want = logits(model, tokens, heads_out)
    change = installed(model)
    try:
        prompt = model(tokens[None, :23])
        got = [prompt.logits[0]]
        for token in tokens[23:]:
            got.append(model(token.view(1, 1), past_key_values=prompt.past_key_values).logits[0])
    finally:
        change.undo()
    torch.testing.assert_close(torch.cat(got), want, atol=1e-5, rtol=1e-5)  # transformers' angles are float32


@pytest.mark.paper("StreamingLLM", "works_when")
def test_until_something_is_dropped_it_is_the_dense_mask_of_sinks_and_window() -> None:
    from foveate.adapt import replace_attention

    model, tokens = small_model("llama"), torch.randint(1, 50, (2, SINKS + WINDOW))
    change = installed(model)
    cut = model(tokens).logits
    change.undo()
    mask = f"sinks({SINKS}) | window({WINDOW - 1}) & causal"
    with replace_attention(model, mask):
        torch.testing.assert_close(cut, model(tokens).logits)
    longer = torch.randint(1, 50, (2, 41))
    change = installed(model, in_cache=False)  # nothing is ever placed anew
    apart = model(longer).logits
    change.undo()
    with replace_attention(model, mask):
        torch.testing.assert_close(apart, model(longer).logits)
    assert (apart - model(longer).logits).abs().max() > 0.1


@pytest.mark.paper("StreamingLLM", "works_when")
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt_oss", "bloom"])
def test_it_decodes_far_past_the_trained_length_as_if_the_text_were_short(name: str) -> None:
    """Positions in the cache: after many tokens the answer depends on what is kept alone, as a text of just these."""
    model = small_model(name)
    start, middle, end = (
        torch.randint(1, 50, (1, SINKS)),
        torch.randint(1, 50, (1, 700)),
        torch.randint(1, 50, (1, 4 * WINDOW)),
    )
    change = installed(model, window=5)
    try:
        long = model(torch.cat([start, middle, end], 1)).past_key_values
        assert long.get_seq_length() == SINKS + 700 + 4 * WINDOW > 256
        assert long.layers[0].keys.shape[2] == SINKS + 5 - 1
        next_token = torch.tensor([[7]])
        far = model(next_token, past_key_values=long).logits
        near = model(torch.cat([start, middle[:, -8:], end, next_token], 1)).logits[:, -1:]
    finally:
        change.undo()
    torch.testing.assert_close(far, near, atol=2e-4, rtol=2e-4)  # transformers' angles are float32


@pytest.mark.parametrize("name", SIX)
def test_generation_is_the_same_however_it_is_asked_for(name: str) -> None:
    """Sampling, beams, pieces of a prompt, guesses that are checked: each as the plain way has it."""
    model = small_model(name)
    prompt = torch.randint(1, 50, (2, 31))
    mask = torch.ones_like(prompt)
    options = {"attention_mask": mask, "max_new_tokens": 12}
    change = installed(model)
    try:
        greedy = model.generate(prompt, do_sample=False, **options)
        assert torch.equal(greedy, model.generate(prompt, do_sample=False, prefill_chunk_size=7, **options))
        guessed = model.generate(
            prompt[:1], attention_mask=mask[:1], max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4
        )
        assert torch.equal(guessed, greedy[:1])
        beams = model.generate(prompt, do_sample=False, num_beams=3, **options)
        slow = model.generate(prompt, do_sample=False, num_beams=3, use_cache=False, **options)
        assert torch.equal(beams, slow)
        torch.manual_seed(3)
        drawn = model.generate(prompt, do_sample=True, **options)
        torch.manual_seed(3)
        assert torch.equal(drawn, model.generate(prompt, do_sample=True, use_cache=False, **options))
    finally:
        change.undo()


def test_some_layers_alone() -> None:
    model, tokens = small_model("llama"), torch.randint(1, 50, (2, 45))
    change = use(model, f"attention_sinks(sinks={SINKS})", window=WINDOW, layers=[1])
    try:
        cache = model(tokens).past_key_values
        whole = model(tokens).logits
        assert [layer.keys.shape[2] for layer in cache.layers] == [45, SINKS + WINDOW - 1]
        cut = model(tokens[:, :30])
        rest = model(tokens[:, 30:], past_key_values=cut.past_key_values).logits
        torch.testing.assert_close(rest, whole[:, 30:])
    finally:
        change.undo()


def test_what_it_cannot_do_it_refuses() -> None:
    from transformers import DynamicCache, StaticCache

    model, tokens = small_model("llama"), torch.randint(1, 50, (2, 20))
    filled = model(tokens).past_key_values
    change = installed(model)
    try:
        with pytest.raises(ValueError, match="filled before the method was installed"):
            model(tokens, past_key_values=filled)
        with pytest.raises(ValueError, match="leave the cache out"):
            model(tokens, past_key_values=StaticCache(config=model.config, max_cache_len=64))
        with pytest.raises(ValueError, match="2-D mask"):
            model(tokens, attention_mask=torch.ones(2, 1, 20, 20, dtype=torch.bool))
        with pytest.raises(ValueError, match="packed"):
            model(tokens[:1], position_ids=torch.tensor([[*range(12), *range(8)]]))
        with pytest.raises(ValueError, match="no weights"):
            model(tokens, output_attentions=True)
        with pytest.raises(ValueError, match="inference"):
            model.train()(tokens)
        model.eval()
        with pytest.raises(ValueError, match="already"):
            installed(model)
        ours = model(tokens, past_key_values=DynamicCache()).past_key_values
    finally:
        model.eval()
        change.undo()
    with pytest.raises(ValueError, match="not at work"):
        model(tokens[:, :1], past_key_values=ours)
    with pytest.raises(ValueError, match="whole layers"):
        use(model, "attention_sinks", heads=[0])
    with pytest.raises(ValueError, match="1 or more"):
        installed(model, window=0)
