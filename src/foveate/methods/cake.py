"""CAKE: cache eviction with one budget for all layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.cache.cake import CakeMemory, Preference, Shared
from foveate.catalogue.contracts import Method
from foveate.catalogue.tiers import method
from foveate.counts import whole_numbers
from foveate.methods.alisa import WHOLE_PROMPT
from foveate.methods.cached import CachedMethod

if TYPE_CHECKING:
    from foveate.adapt.hf.layers import Layers
    from foveate.adapt.hf.memory import LayerFacts


@method(
    "cake",
    papers=("CAKE",),
    tiny={"budget": 12, "window": 4},
    full_budget={"budget": 1 << 20},
    budget="budget",
    keeps=lambda n: min(n, 2 * 12 - 4 + 1),
    exempt={"decoding": WHOLE_PROMPT},
)
def cake(
    budget: int = 1024,
    window: int = 32,
    tau1: float = 1.0,
    tau2: float = 1.0,
    gamma: float = 200.0,
    layers: Layers | None = None,
) -> Method:
    """CAKE: ``budget`` tokens a layer on average, shared among layers by entropy and variance of their attention.

    Each layer's share grows with ``entropy ** (1 / tau1) * variance ** (1 / tau2)`` of the attention of the last
    ``window`` queries of a prompt; within a layer the tokens of the largest ``mean + gamma * variance`` stay, averaged
    over 5 neighbours, beside the window itself. Layers are cut down while the prompt still passes through those above.
    The authors fit tau1, tau2 and gamma to each model; here they are options. Qin et al., CAKE: Cascading and
    Adaptive KV Cache Eviction with Layer Preferences, arXiv 2503.12491.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(small).eval()
    >>> change = cake(budget=50, window=8).install(model)
    >>> with torch.no_grad():
    ...     cache = model(torch.arange(200).view(1, 200) % 64).past_key_values
    >>> sum(layer.keys.shape[2] for layer in cache.layers) <= 2 * 50
    True
    >>> change.undo()
    """
    budget, window = whole_numbers("budget and window", (budget, window))
    if not 2 <= window < budget:
        raise ValueError(f"window is 2 queries or more and below the budget; got {window} of {budget}")
    if tau1 <= 0 or tau2 <= 0:
        raise ValueError(f"tau1 and tau2 are temperatures above 0; got {tau1}, {tau2}")
    how = Preference(window, float(tau1), float(tau2), float(gamma))

    def memory(facts: LayerFacts) -> CakeMemory:
        lower = next(iter(facts.below.values()), None)
        shared = lower.shared if isinstance(lower, CakeMemory) else Shared(budget * facts.served, facts.served, window)
        return CakeMemory(how, shared)

    return CachedMethod(memory, layers=layers)
