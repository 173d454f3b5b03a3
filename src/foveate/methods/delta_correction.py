"""Delta Attention: prompts are read sparsely, and set right by full attention on a few queries; decoding is exact."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.adapt.named import as_core
from foveate.catalogue.budget import Budget
from foveate.catalogue.tiers import method
from foveate.methods.core import CoreMethod
from foveate.mixers.normalizer_sink.streaming_llm import streaming_core
from foveate.mixers.static_sparse.delta_attention import DeltaCore
from foveate.patterns import Pattern

if TYPE_CHECKING:
    from foveate.adapt.hf.layers import Layers
    from foveate.catalogue.contracts import Method
    from foveate.mixers.core import Core


@method(
    "delta_correction",
    papers=("Delta Attention",),
    tiny={"base": "streaming_llm(sinks=1, window=4)", "stride": 5, "tail": 3},
    full_budget={"stride": 1},
    budget=Budget("stride", levels=(128, 64, 32, 16, 8)),
    exempt={"decoding": "it is for prompts: a token decoded sees everything"},
)
def delta_correction(
    base: Core | Pattern | str | None = None, stride: int = 64, tail: int = 128, layers: Layers | None = None
) -> Method:
    """Delta Attention: any sparse prefill, moved at each query by the error it makes at the last ``stride``-th one.

    ``base`` is the sparse attention: a core, a pattern or a name, by default sinks and a window of 2048. Every
    ``stride``-th query is fully attended, o_i = sparse_i + (full_j - sparse_j) with j = γ ⌊i / γ⌋, and so are the last
    ones of a prompt: as many as the stride leaves over, and max(``tail``, ``stride``) more, as in the authors' code.
    Willette, Lee, Hwang, Delta Attention: Fast and Accurate Sparse Attention Inference by Delta Correction, arXiv
    2505.11254.

    It helps where queries of a stride look for the same, so that one's error is the next one's; else the correction is
    an error of its own, up to 1.4 times the one it mends. In the heads of Foveate's small built-in model errors 64
    queries apart have a cosine of 0.2 at most, and there it does not help at any stride above 1.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(small)
    >>> change = delta_correction("streaming_llm(window=256)", stride=16).install(model)
    >>> change.undo()

    Raises ValueError for a stride below 1 and a tail below 0.
    """
    sparse = streaming_core(sinks=4, window=2048) if base is None else as_core(base)
    return CoreMethod(DeltaCore(sparse, stride, tail), layers)
