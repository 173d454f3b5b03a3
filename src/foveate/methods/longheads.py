"""LongHeads: beyond the trained length each head attends to chunks that it selects, as if adjacent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.cache.longheads import LongHeadsMemory
from foveate.catalogue.budget import Budget
from foveate.catalogue.contracts import Method
from foveate.catalogue.tiers import method
from foveate.counts import whole_numbers
from foveate.methods.cached import CachedMethod

if TYPE_CHECKING:
    from foveate.adapt.hf.layers import Layers


@method(
    "longheads",
    papers=("LongHeads",),
    tiny={"chunk": 4, "count": 4},
    full_budget={"count": 1 << 16},
    budget=Budget("count", each="chunk"),
)
def longheads(chunk: int = 256, count: int = 16, layers: Layers | None = None) -> Method:
    """LongHeads: from the trained length on, each head of each query sees ``count`` chunks that it chooses itself.

    Up to ``chunk * count`` tokens, at most the trained length, nothing changes. From then on a head sees the first
    chunk, the last two, and those whose keys answer best to its query; they are moved together, so that rotary
    positions stay within the trained length. All keys are kept; a query reads ``chunk * count`` of them. What stands
    for a chunk is as in the authors' code: keys at their positions within it, products with queries that are not
    turned. Lu et al., LongHeads, arXiv 2402.10685.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(small).eval()
    >>> change = longheads(chunk=8, count=4).install(model)
    >>> model.generate(torch.arange(90).view(1, 90) % 64, max_new_tokens=5, min_new_tokens=5).shape
    torch.Size([1, 95])
    >>> change.undo()
    """
    chunk, count = whole_numbers("chunk and count", (chunk, count))
    if not chunk or count < 3:
        raise ValueError(
            f"chunk is 1 token or more, count 3 or more, as the first and the last two are always seen; got {chunk}, "
            f"{count}"
        )
    return CachedMethod(lambda _: LongHeadsMemory(chunk, count), layers=layers)
