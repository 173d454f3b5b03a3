"""StreamingLLM: a cache of sinks and recent tokens, with positions counted among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.cache.streaming import StreamingMemory
from foveate.catalogue.contracts import Method
from foveate.catalogue.tiers import method
from foveate.counts import whole_numbers
from foveate.methods.cached import CachedMethod

if TYPE_CHECKING:
    from foveate.adapt.hf.layers import Layers


@method(
    "attention_sinks",
    papers=("StreamingLLM",),
    tiny={"sinks": 2, "window": 9},
    full_budget={"window": 1 << 20},
    budget="window",
    keeps=lambda n: min(n, 2 + 9),
)
def attention_sinks(sinks: int = 4, window: int = 1020, in_cache: bool = True, layers: Layers | None = None) -> Method:
    """StreamingLLM's cache: the first ``sinks`` tokens and a ring of the latest ``window``, the rest is evicted.

    Positions are counted in the cache (``in_cache``), so texts may be as long as one likes while no distance exceeds
    ``sinks + window``; memory and time a token stay constant. Xiao et al., Efficient Streaming Language Models with
    Attention Sinks, arXiv 2309.17453.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(small).eval()
    >>> change = attention_sinks(sinks=4, window=60).install(model)
    >>> cache = model(torch.arange(200).view(1, 200) % 64).past_key_values
    >>> cache.layers[0].keys.shape, cache.get_seq_length()
    (torch.Size([1, 2, 63, 16]), 200)
    >>> change.undo()
    """
    sinks, window = whole_numbers("sinks and window", (sinks, window))
    if not window:
        raise ValueError("window counts the query's own token: it is 1 or more; got 0")
    return CachedMethod(lambda _: StreamingMemory(sinks, window, in_cache), layers=layers)
