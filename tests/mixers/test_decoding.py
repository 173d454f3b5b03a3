"""What a decoding step reads: the keys that its query sees, at any place in a text, and no others."""

from __future__ import annotations

import pytest
import torch

from foveate import causal, per_head, window
from foveate.cache import BlockCache, HeadsCache, KVCache
from foveate.catalogue.registry import mixer
from foveate.counting import count_operations
from foveate.mixers.attention import AttentionMixer
from foveate.mixers.core import PatternCore

DIM, HEADS = 32, 4


def powers(t: int) -> int:
    """Keys of a window of 3, one sink, and blocks of 2 keys that are 1, 2, 4, ... blocks back."""
    seen = {j for j in range(t + 1) if j > t - 3 or j < 1}
    seen |= {j for j in range(t + 1) if (d := t // 2 - j // 2) > 0 and d & (d - 1) == 0}
    return len(seen)


READ = {  # keys over all heads that the query at t sees, of which there are many more
    "streaming_llm": ({"sinks": 2, "window": 6}, lambda t: HEADS * 8),
    "swat": ({"window": 6}, lambda t: HEADS * 6),
    "minference_a_shape": ({"sinks": 3, "window": 6}, lambda t: HEADS * 9),
    "shared_key_window": ({"window": 6}, lambda t: HEADS * 6),
    "mswa": ({"window": 8}, lambda t: 2 + 4 + 8 + 16),
    "power_attention": ({"window": 3, "block": 2, "sinks": 1}, lambda t: HEADS * powers(t)),
    "moba": ({"block": 5, "k": 3}, lambda t: HEADS * (2 * 5 + t % 5 + 1)),
    "flash_attention": ({}, lambda t: HEADS * (t + 1)),
}


@pytest.mark.parametrize("name", READ)
@torch.no_grad()
def test_a_step_reads_the_keys_that_it_sees(name: str) -> None:
    options, read = READ[name]
    model = mixer(name, DIM, heads=HEADS, **options)
    for prompt in (61, 400):
        _, state = model.prefill(torch.randn(1, prompt, DIM), model.init_state(1))
        for t in (prompt, prompt + 1):
            with count_operations() as counted:
                _, state = model.decode(torch.randn(1, 1, DIM), state)
            assert counted.pairs == read(t)


def test_states_are_what_the_pattern_asks_for() -> None:
    heads = per_head([window(2 + h, 0) for h in range(HEADS)])
    kinds = [
        (mixer("moba", DIM, heads=HEADS), BlockCache),
        (mixer("mswa", DIM, heads=HEADS), HeadsCache),
        (mixer("power_attention", DIM, heads=HEADS), KVCache),
    ]
    for model, kind in kinds:
        assert type(model.init_state(1)) is kind
    own = mixer("flash_attention", DIM, heads=HEADS, pattern=heads & causal)
    assert isinstance(own, AttentionMixer) and isinstance(own.core, PatternCore)
    assert [len(share.pattern.text) > 0 for share in own.init_state(1).shares] == [True] * HEADS


def test_what_is_no_token_is_refused() -> None:
    model = mixer("streaming_llm", DIM, heads=HEADS)
    state = model.init_state(2)
    for x in (torch.randn(2, 2, DIM), torch.randn(2, 0, DIM), torch.randn(2, DIM), torch.randn(2, 1, DIM + 1)):
        with pytest.raises(ValueError, match="decodes one token"):
            model.decode(x, state)
    with pytest.raises(ValueError, match="streaming_llm takes x"):
        model.prefill(torch.randn(2, 5, DIM + 1), state)
    with pytest.raises(ValueError, match="batch size 2; got tokens of 3"):
        model.decode(torch.randn(3, 1, DIM), state)
    with pytest.raises(NotImplementedError, match="unless causal"):
        mixer("moba", DIM, heads=HEADS, causal=False).init_state(1)
    with pytest.raises(NotImplementedError, match="does not decode"):
        mixer("minference_block_sparse", DIM, heads=HEADS).init_state(1)
