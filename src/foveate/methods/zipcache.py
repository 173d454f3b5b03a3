"""ZipCache: a quantised cache, in more bits where tokens are salient."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.cache.zipped import Precision, ZipMemory
from foveate.catalogue.budget import Budget
from foveate.catalogue.contracts import Method
from foveate.catalogue.tiers import method
from foveate.counts import whole_numbers
from foveate.methods.alisa import WHOLE_PROMPT
from foveate.methods.cached import CachedMethod

if TYPE_CHECKING:
    from foveate.adapt.hf.layers import Layers


@method(
    "zipcache",
    papers=("ZipCache",),
    tiny={"gap": 12, "probes": 0.2},
    full_budget={"gap": 1 << 20},
    budget=Budget("salient", levels=(0.1, 0.3, 0.6, 0.9)),
    exempt={"decoding": WHOLE_PROMPT},
)
def zipcache(
    salient: float = 0.6,
    high: int = 4,
    low: int = 2,
    gap: int = 100,
    probes: float = 0.05,
    layers: Layers | None = None,
) -> Method:
    """ZipCache: all tokens are kept, packed in ``high`` bits if salient and in ``low`` if not, values scaled twice.

    A share ``salient`` of the tokens counts as such: those that get most attention from the probe queries (the latest
    5 % and as many at random), divided by how many of these can see them. Keys have a scale a channel, values one
    a channel (the root of its largest magnitude) and one a token. Prompts are attended to as they are and packed then;
    of the tokens after that, ``gap`` at a time. He et al., ZipCache, arXiv 2405.14256; as in the authors' code, whose
    shares (60 % in 4 bits) and gap these are; there the text's salient tokens are those of all its heads together.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = LlamaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(small).eval()
    >>> change = zipcache().install(model)
    >>> with torch.no_grad():
    ...     cache = model(torch.arange(200).view(1, 200) % 64).past_key_values
    >>> whole = 2 * 2 * 200 * 32 * 4  # bytes of a layer in float32
    >>> whole / cache.layers[0].memory.nbytes > 4
    True
    >>> change.undo()
    """
    (gap,) = whole_numbers("gap", (gap,))
    if high not in (2, 4) or low not in (2, 4):
        raise ValueError(f"tokens are packed in 2 or 4 bits; got {high} and {low}")
    if not 0 <= salient <= 1 or not 0 < probes <= 1:
        raise ValueError(f"salient and probes are shares of the tokens, from 0 to 1; got {salient}, {probes}")
    if not gap:
        raise ValueError("gap is 1 token or more; got 0")
    how = Precision(float(salient), high, low, gap, float(probes))
    return CachedMethod(lambda _: ZipMemory(how), layers=layers)
