"""LeanAttention: split-KV decoding with equal work for every worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from foveate.cache.lean import LeanMemory
from foveate.catalogue.contracts import Method
from foveate.catalogue.tiers import method
from foveate.counts import whole_numbers
from foveate.methods.cached import CachedMethod

if TYPE_CHECKING:
    from foveate.adapt.hf.layers import Layers


@method("lean_attention", papers=("LeanAttention",), tiny={"workers": 3, "tile": 4}, full_budget={})
def lean_attention(workers: int | None = None, tile: int = 256, layers: Layers | None = None) -> Method:
    """LeanAttention: exact decoding whose tiles of keys, of all texts and heads, are divided evenly among workers.

    The keys of all heads of a batch lie in one row of tiles, of which every worker takes an equal run, across the
    borders of texts and heads; partial results of one head are merged by their log-sums. So workers stay busy where
    one text is long and others are short, and where there are fewer heads than workers. ``workers`` are torch's threads
    by default, and each runs on one; prompts are attended to as ever. Sanovar et al., arXiv 2405.10480, whose fused
    kernel for GPUs this is not.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(small).eval()
    >>> change = lean_attention(workers=4, tile=16).install(model)
    >>> model.generate(torch.arange(90).view(1, 90) % 64, max_new_tokens=5, min_new_tokens=5).shape
    torch.Size([1, 95])
    >>> change.undo()
    """
    workers, tile = whole_numbers("workers and tile", (torch.get_num_threads() if workers is None else workers, tile))
    if not workers or not tile:
        raise ValueError(f"workers and tile are 1 or more; got {workers}, {tile}")
    return CachedMethod(lambda _: LeanMemory(workers, tile), layers=layers)
