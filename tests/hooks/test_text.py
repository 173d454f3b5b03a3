"""Applications to text: their operators inside the models that they are of."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import MistralConfig, MistralForCausalLM

from foveate.adapt import as_core, use
from foveate.catalogue import tiers
from foveate.catalogue.contracts import Hook


def hook(name: str, **sizes: int) -> Hook:
    row = tiers.row(name)
    assert isinstance(row, tiers.HookRow)
    return row.make(**sizes)


def mistral(window: int | None) -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
        initializer_range=0.25,
        attn_implementation="sdpa",
    )
    return MistralForCausalLM(config).double().eval()


def test_its_sizes_are_mistrals() -> None:
    found, config = hook("vi_mistral_x"), MistralConfig()
    assert (found.heads, found.kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert found.head_dim == config.hidden_size // config.num_attention_heads
    assert found.operator == f"window({config.sliding_window - 1}) & causal"


@pytest.mark.paper("Vi-Mistral-X", "definition")
def test_each_query_attends_to_the_window_of_its_heads_group() -> None:
    q, k, v = (torch.randn(2, heads, 23, 6, dtype=torch.float64, requires_grad=True) for heads in (8, 2, 2))

    def one_by_one() -> Tensor:
        rows = []
        for head in range(8):
            keys, values = k[:, head // 4], v[:, head // 4]
            for at in range(23):
                seen = slice(max(0, at - 6), at + 1)
                logits = torch.einsum("bd,bmd->bm", q[:, head, at], keys[:, seen]) / math.sqrt(6)
                rows.append(torch.einsum("bm,bmd->bd", logits.softmax(-1), values[:, seen]))
        return torch.stack(rows, 1).unflatten(1, (8, 23))

    found, expected = as_core(hook("vi_mistral_x", window=7).operator)(q, k, v), one_by_one()
    assert_close(found, expected)
    cotangent = torch.randn_like(expected)
    gradients = (torch.autograd.grad(out, (q, k, v), cotangent) for out in (found, expected))
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other)


@pytest.mark.paper("Vi-Mistral-X", "works_when")
@torch.no_grad()
def test_mistrals_own_window_and_groups_run() -> None:
    """In a model without the window it gives what Mistral with its own window gives, and generates so."""
    theirs, ours = mistral(7), mistral(None)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(1, 40, (2, 31))
    expected = theirs(tokens).logits
    assert (ours(tokens).logits - expected).abs().max() > 1e-3
    swap = use(ours, hook("vi_mistral_x", window=7).operator)
    assert_close(ours(tokens).logits, expected)
    assert swap.calls == 2
    written = [model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0) for model in (ours, theirs)]
    assert torch.equal(*written)
