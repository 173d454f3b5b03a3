"""ReKV: sliding-window reading of a stream, with retrieval of stored blocks for questions."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from foveate.cache.rekv import ReKVMemory
from foveate.catalogue.contracts import Method
from foveate.catalogue.tiers import method
from foveate.counts import whole_numbers
from foveate.methods.cached import CachedMethod

if TYPE_CHECKING:
    from foveate.adapt.hf.layers import Layers


@method(
    "rekv",
    papers=("ReKV",),
    tiny={"sinks": 2, "window": 9, "block": 4, "blocks": 2, "question": 3},
    full_budget={"window": 1 << 20},
    budget="window",
    keeps=lambda n: min(n, 2 + 9),
    exempt={"decoding": "a text read at once is a stream; its last tokens, read one by one, are questions about it"},
)
def rekv(
    sinks: int = 16,
    window: int = 4096,
    block: int = 256,
    blocks: int = 16,
    question: int = 128,
    folder: str | os.PathLike[str] | None = None,
    layers: Layers | None = None,
) -> Method:
    """ReKV: a stream is read through a sliding window and stored; a question brings back the blocks that answer it.

    Calls of more than ``question`` tokens are of the stream (a video's frames, each of them a block, or a text): they
    see the first ``sinks`` and the latest ``window`` tokens, which alone stay on the device. A call of at most
    ``question`` tokens asks: in each layer it also sees the ``blocks`` blocks whose mean key is most like its mean
    query, fetched from the host's memory or from files of ``folder``, and so do the tokens generated after it, until
    the stream goes on. Di et al., arXiv 2503.00540: retrieval by the model's own attention; here on causal language
    models, without a video model at hand, and tokens that come back keep their places in the text. On the built-in
    model they tell more than as many blocks at random, and less than a window that is longer by as many tokens
    (`benchmarks/kv_questions.py`).

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(small).eval()
    >>> change = rekv(window=60, block=10, blocks=3, question=8).install(model)
    >>> with torch.no_grad():
    ...     cache = model(torch.arange(200).view(1, 200) % 64).past_key_values
    ...     out = model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    >>> cache.layers[0].keys.shape[2], cache.layers[0].memory.back[2].shape[2]
    (75, 30)
    >>> change.undo()
    """
    names = "sinks, window, block, blocks and question"
    sinks, window, block, blocks, question = whole_numbers(names, (sinks, window, block, blocks, question))
    if not (block and blocks and question) or window < block:
        raise ValueError(
            f"block, blocks and question are 1 or more, and a block fits the window; got {block}, {blocks}, {question} "
            f"and a window of {window}"
        )
    return CachedMethod(lambda _: ReKVMemory(sinks, window, block, blocks, question, folder), layers=layers)
