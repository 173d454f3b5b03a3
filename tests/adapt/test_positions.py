"""Inside models, however a text is given, it is answered as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from foveate.adapt import replace_attention

pytest.importorskip("transformers")
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

PATTERNS = [
    "causal",
    "window(5) & causal",
    "window(15) & causal | sinks(2)",
    "blocks(8) & causal",
    "streaming_llm(window=16)",
    "power_attention(window=4, block=2)",
    "prefix(9) & causal | window(3)",
    "per_head([window(3), blocks(5), sinks(2) | window(1), full]) & causal",
    "topk_keys(6)",
    "topk_blocks(4, k=3)",
    "mass_blocks(4, 0.8)",
    "moba(block=8, k=2)",
]
AHEAD = ["vertical_slash(6, 4)", 'topk_blocks(4, k=3, per="block")', "delta_attention(window=8, sinks=2, stride=4)"]
LENGTH, PROMPT, PADDING = 46, 40, 7
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@cache
def model(name: str) -> torch.nn.Module:
    torch.manual_seed(5)
    if name == "llama":
        made = LlamaForCausalLM(LlamaConfig(**SIZES))
    elif name == "mistral":
        made = MistralForCausalLM(MistralConfig(sliding_window=16, **SIZES))
    else:
        layers = ["sliding_attention", "full_attention"]
        made = Gemma3ForCausalLM(Gemma3TextConfig(sliding_window=16, head_dim=8, layer_types=layers, **SIZES))
    return made.double().eval()


def padded(text: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """A batch of the text beside padding, and another text that needs none."""
    nothing, other = torch.zeros(1, PADDING, dtype=torch.long), torch.randint(1, 50, (1, LENGTH + PADDING))
    row = torch.cat([nothing, text] if side == "left" else [text, nothing], 1)
    ids = torch.cat([row, other])
    return ids, torch.cat([(row > 0).long(), torch.ones_like(other)])


def left(model, text: Tensor) -> Tensor:
    ids, mask = padded(text, "left")
    return model(ids, attention_mask=mask, use_cache=False).logits[:1, PADDING:]


def right(model, text: Tensor) -> Tensor:
    ids, mask = padded(text, "right")
    return model(ids, attention_mask=mask, use_cache=False).logits[:1, :LENGTH]


def packed(model, text: Tensor) -> Tensor:
    """Told by positions that begin again at 0."""
    ids = torch.cat([text[:, 5:25], text, text[:, :3]], 1)
    position = torch.cat([torch.arange(n) for n in (20, LENGTH, 3)]).unsqueeze(0)
    return model(ids, position_ids=position, use_cache=False).logits[:, 20 : 20 + LENGTH]


def packed_by_lengths(model, text: Tensor) -> Tensor:
    """Told as DataCollatorWithFlattening does."""
    ids = torch.cat([text[:, 5:25], text, text[:, :3]], 1)
    position = torch.cat([torch.arange(n) for n in (20, LENGTH, 3)]).unsqueeze(0)
    ends = torch.tensor([0, 20, 20 + LENGTH, 23 + LENGTH], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": LENGTH, "max_length_k": LENGTH}
    return model(ids, position_ids=position, use_cache=False, **lengths).logits[:, 20 : 20 + LENGTH]


def in_steps(model, ids: Tensor, steps: Iterator[int], state, mask: Tensor | None = None) -> Tensor:
    outs, start = [], 0
    for count in steps:
        end = start + count
        told = {} if mask is None else {"attention_mask": mask[:, :end]}
        out = model(ids[:, start:end], past_key_values=state, use_cache=True, **told)
        state, start = out.past_key_values, end
        outs.append(out.logits)
    return torch.cat(outs, 1)


STEPS = (PROMPT, 1, 1, 1, 1, 1, 1)


def own_cache(model, text: Tensor) -> Tensor:
    """Sliding where the model's attention is."""
    return in_steps(model, text, STEPS, DynamicCache(config=model.config))


def full_cache(model, text: Tensor) -> Tensor:
    return in_steps(model, text, STEPS, DynamicCache())


def static_cache(model, text: Tensor) -> Tensor:
    return in_steps(model, text, STEPS, StaticCache(config=model.config, max_cache_len=64))


def chunked_prefill(model, text: Tensor) -> Tensor:
    return in_steps(model, text, (11, 17, 12, 6), DynamicCache(config=model.config))


def left_with_cache(model, text: Tensor) -> Tensor:
    ids, mask = padded(text, "left")
    return in_steps(model, ids, (PROMPT, *(1,) * (LENGTH + PADDING - PROMPT)), None, mask)[:1, PADDING:]


AT_ONCE = (left, right, packed, packed_by_lengths)
WAYS = (*AT_ONCE, own_cache, full_cache, static_cache, chunked_prefill, left_with_cache)
every_model = pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])


@every_model
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_text_is_answered_as_if_it_were_alone(name: str, pattern: str, way: Callable) -> None:
    assert_alone(name, pattern, way)


@every_model
@pytest.mark.parametrize("pattern", AHEAD)
@pytest.mark.parametrize("way", AT_ONCE, ids=lambda way: way.__name__)
def test_mechanisms_that_look_ahead_at_whole_texts(name: str, pattern: str, way: Callable) -> None:
    assert_alone(name, pattern, way)


def assert_alone(name: str, pattern: str, way: Callable) -> None:
    text = torch.randint(1, 50, (1, LENGTH))
    with torch.no_grad(), replace_attention(model(name), pattern):
        alone = model(name)(text, use_cache=False).logits
        torch.testing.assert_close(way(model(name), text), alone, atol=1e-6, rtol=1e-6)


@every_model
def test_generation_in_a_padded_batch(name: str) -> None:
    text = torch.randint(1, 50, (1, LENGTH))
    ids, mask = padded(text, "left")
    with replace_attention(model(name), "window(6) & causal | sinks(2)"):
        how = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        alone = model(name).generate(text, attention_mask=torch.ones_like(text), **how)
        both = model(name).generate(ids, attention_mask=mask, **how)
    assert both[0, PADDING:].tolist() == alone[0].tolist()


# ---- masks that say which pairs, and not where texts are ------------------------------------------------------


def table_of(lengths: list[int]) -> Tensor:
    """A causal mask (1, 1, N, N) inside documents."""
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ((number == number.unsqueeze(1)) & torch.ones(len(number), len(number), dtype=torch.bool).tril())[None, None]


@pytest.mark.parametrize("mechanism", ["sinks(2) | window(3)", "blocks(8)", "topk_keys(4)", "streaming_llm(window=9)"])
@torch.no_grad()
def test_a_table_of_documents_is_refused_by_what_counts_positions(mechanism: str) -> None:
    whole, ids = model("llama"), torch.arange(18).view(1, -1)
    positions = torch.cat([torch.arange(7), torch.arange(11)]).unsqueeze(0)
    with replace_attention(whole, mechanism):
        with pytest.raises(ValueError, match="keeps several documents apart"):
            whole(ids, attention_mask=table_of([7, 11]), position_ids=positions)
        alone = whole(ids, attention_mask=table_of([18])).logits
        torch.testing.assert_close(alone, whole(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_table_of_documents_serves_what_counts_distances() -> None:
    whole, ids = model("llama"), torch.arange(18).view(1, -1)
    positions = torch.cat([torch.arange(7), torch.arange(11)]).unsqueeze(0)
    with replace_attention(whole, "window(3) & causal"):
        packed = whole(ids, attention_mask=table_of([7, 11]), position_ids=positions).logits
        alone = torch.cat([whole(ids[:, :7]).logits, whole(ids[:, 7:]).logits], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
