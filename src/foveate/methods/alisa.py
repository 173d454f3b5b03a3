"""Recent tokens and those attended to most of late on the device, the rest in the host's memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from foveate.cache.alisa import AlisaMemory
from foveate.catalogue.contracts import Method
from foveate.catalogue.tiers import method
from foveate.counts import whole_numbers
from foveate.methods.cached import CachedMethod

if TYPE_CHECKING:
    from foveate.adapt.hf.layers import Layers

WHOLE_PROMPT = "a prompt is attended to whole before anything of it is evicted, which decoding token by token is not"


@method(
    "alisa",
    papers=("ALISA",),
    tiny={"budget": 10, "history": 4},
    full_budget={"budget": 1 << 20},
    budget="budget",
    keeps=lambda n: min(n, 10 + 1) if n > 29 else 10,
    exempt={"decoding": WHOLE_PROMPT},
)
def alisa(
    budget: int = 1024,
    history: int = 4,
    folder: str | os.PathLike[str] | None = None,
    layers: Layers | None = None,
) -> Method:
    """ALISA's sparse window attention: recent tokens and those with the largest attention sums; the rest offloaded.

    Half of ``budget`` are the latest tokens, half those that got most attention from the last ``history`` queries
    (longer histories did no better on the built-in model, where they choose better than chance, but as many more recent
    tokens do better still: `benchmarks/kv_budget.py`). All keys and values lie in the host's memory too, or in files of
    ``folder``, from where a token that is chosen again comes back: the device holds ``budget`` tokens a head however
    long the text is. Prompts are attended to whole. The paper's schedule of recomputing instead of loading, and its
    8-bit storage, are not part of it. Zhao, Wu, Wang, ALISA, arXiv 2403.17312.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(small).eval()
    >>> change = alisa(budget=50).install(model)
    >>> with torch.no_grad():
    ...     cache = model(torch.arange(200).view(1, 200) % 64).past_key_values
    >>> cache.layers[0].keys.shape, cache.layers[0].memory.store.count
    (torch.Size([1, 2, 50, 16]), 200)
    >>> change.undo()
    """
    budget, history = whole_numbers("budget and history", (budget, history))
    if budget < 2 or not history:
        raise ValueError(
            f"budget is 2 tokens or more (half of them recent), history 1 or more; got {budget}, {history}"
        )
    return CachedMethod(lambda _: AlisaMemory(budget, history, folder), layers=layers)
