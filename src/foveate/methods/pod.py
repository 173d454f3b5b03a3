"""Groups of layers that keep the keys of distant tokens once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from foveate.cache.memory import LayerMemory
from foveate.cache.pod import PodMemory, SharedKeysMemory
from foveate.catalogue.contracts import Method
from foveate.catalogue.tiers import method
from foveate.counts import whole_numbers
from foveate.methods.cached import CachedMethod

if TYPE_CHECKING:
    from foveate.adapt.hf.layers import Layers
    from foveate.adapt.hf.memory import LayerFacts


@method(
    "pod",
    papers=("PoD",),
    tiny={"groups": [[0, 1]], "sinks": 2, "window": 7},
    full_budget={"groups": []},
)
def pod(
    groups: Sequence[Sequence[int]] = (),
    sinks: int = 16,
    window: int = 4096,
    scores: bool = True,
    layers: Layers | None = None,
) -> Method:
    """PoD, proximal over distant: layers of a group share the keys of distant tokens, and keep their own values.

    ``groups`` are numbers of layers that attend alike; the keys of distant tokens are those of each group's lowest
    layer, for its own queries (``scores``: distant scores are shared) or for each layer's. The first ``sinks`` tokens
    and the latest ``window`` are attended to by a layer's own keys; one softmax runs over both. Nothing is evicted.
    The authors find groups by comparing scores on sample texts, and then train the model on for a while. A model that
    was not trained for it may do worse than without distant tokens: of the built-in one, the last layer alone uses
    them, and with the keys of a lower one it does. Ma et al., arXiv 2412.02252.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(small).eval()
    >>> change = pod([[0, 1]], sinks=4, window=60).install(model)
    >>> with torch.no_grad():
    ...     cache = model(torch.arange(200).view(1, 200) % 64).past_key_values
    >>> [layer.keys.shape[2] for layer in cache.layers]
    [200, 63]
    >>> change.undo()
    """
    sinks, window = whole_numbers("sinks and window", (sinks, window))
    found = [whole_numbers("groups", group) for group in groups]
    numbers = [number for group in found for number in group]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"a layer is in one group at most; got {found}")
    if not window:
        raise ValueError("window counts the query's own token: it is 1 or more; got 0")
    lowest = {number: min(group) for group in found for number in group}

    def memory(facts: LayerFacts) -> LayerMemory:
        if numbers and max(numbers) >= facts.total:
            raise ValueError(f"the model has layers 0 to {facts.total - 1}; got groups {found}")
        anchor = facts.below.get(lowest.get(facts.number, facts.number))
        return PodMemory(sinks, window, anchor, scores) if isinstance(anchor, SharedKeysMemory) else SharedKeysMemory()

    return CachedMethod(memory, layers=layers)
