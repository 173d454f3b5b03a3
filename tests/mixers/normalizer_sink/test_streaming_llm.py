"""StreamingLLM's mixer: positions inside the cache, and memory that does not grow."""

from __future__ import annotations

import pytest
import torch
from tests.support.heads import agree, heads, plain, turned

from foveate.catalogue.registry import mixer
from foveate.counting import count_operations
from foveate.mixers.base import split_heads


@pytest.mark.paper("StreamingLLM", "definition")
def test_streaming_positions_count_inside_the_cache() -> None:
    sinks, window, n = 2, 5, 19
    model = mixer("streaming_llm", 32, heads=4, sinks=sinks, window=window, rotary=20.0).double()
    x = heads(1, n, 32)
    q, k, v = (split_heads(layer(x), 4) for layer in (model.to_q, model.to_k, model.to_v))
    rows = []
    for i in range(n):
        kept = torch.tensor([j for j in range(i + 1) if j < sinks or j > i - window])
        at = torch.arange(len(kept))
        query, keys = turned(q[:, :, i : i + 1], at[-1:], 20.0), turned(k[:, :, kept], at, 20.0)
        rows.append(plain(query, keys, v[:, :, kept], torch.ones(1, len(kept)).bool()))
    expected = model.to_out(torch.cat(rows, 2).transpose(1, 2).flatten(2))
    agree(model(x), expected, x)


def test_streaming_decodes_at_constant_memory() -> None:
    """What a step keeps, down to the storage its tensors are views of, and the largest tensor that it makes."""
    model = mixer("streaming_llm", 32, heads=4, sinks=2, window=6)
    state, kept, made = model.init_state(1), [], []
    for _ in range(60):
        with torch.no_grad():
            with count_operations(inside=True) as counted:
                model.decode(torch.randn(1, 1, 32), state)
            state = model.decode(torch.randn(1, 1, 32), state).state
        leaves = state.tokens.tensors
        kept.append(
            sum({leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in leaves}.values())
        )
        made.append(counted.largest)
    assert max(kept[50:]) == max(kept[:50]) == kept[-1] == model.state_bytes(60) == model.state_bytes(10**6)
    assert max(made[50:]) <= max(made[:50])
    assert {0, 1, 55, 56, 57, 58, 59} <= set(state.positions().tolist())
