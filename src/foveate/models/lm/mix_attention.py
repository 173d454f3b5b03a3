"""MixAttention: sliding windows in most layers, and keys and values that several layers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foveate.catalogue.tiers import Preset, model
from foveate.models.lm.decoder import Decoder, LayerKind


@model(
    "mix_attention",
    papers=("MixAttention",),
    inputs="tokens",
    presets={"1B": Preset({})},
    tiny={"vocabulary": 16, "dim": 16, "periods": 1, "heads": 4, "kv_heads": 2, "hidden": 24, "window": 5},
    supports={"decode"},
    notes="The order of layers is that of the authors' configuration of Character.AI's model; sizes are ours.",
)
def mix_attention(
    vocabulary: int = 32_000,
    *,
    dim: int = 2048,
    periods: int = 2,
    heads: int = 16,
    kv_heads: int = 4,
    hidden: int = 5632,
    window: int = 1024,
    rotary: float = 10_000.0,
    kinds: Sequence[LayerKind] | None = None,
) -> Decoder:
    """MixAttention: most layers see a window, and groups of layers read the keys and values of one of them.

    By default the first layer sees everything; then come ``periods`` times six layers: a window, one that reads its
    keys, a window, two that read those, and one that sees everything through the keys of the first layer. So there are
    2 ``periods`` + 1 caches for 6 ``periods`` + 1 layers, and only the first grows with the text. ``kinds`` says of
    each layer instead what it sees (``LayerKind.window``) and whose keys it reads (``reuses``). A cache holds what the
    widest of its readers needs.

    Rajput, Sheng, Owen, Chiley, Inference-Friendly Models With MixAttention, arXiv 2409.15012, who compare such orders;
    the default is the one that their code's documentation gives.

    >>> import torch
    >>> model = mix_attention(50, dim=32, periods=1, heads=4, kv_heads=2, hidden=48, window=8)
    >>> model(torch.randint(50, (2, 19))).shape, len(model.layers), len(model.init_state(2))
    (torch.Size([2, 19, 50]), 7, 3)
    """
    if periods < 1:
        raise ValueError(f"periods of six layers follow the first one, at least 1; got {periods}")
    chosen = interleaved(periods, window, rotary) if kinds is None else list(kinds)
    sizes: dict[str, Any] = {"dim": dim, "heads": heads, "kv_heads": kv_heads, "hidden": hidden}
    return Decoder(vocabulary, chosen, **sizes)


def interleaved(periods: int, window: int, rotary: float) -> list[LayerKind]:
    """Kinds of a first layer and of ``periods`` times six more.

    >>> [kind.reuses for kind in interleaved(1, 8, 1e4)]
    [None, None, 1, None, 3, 3, 0]
    """
    chosen = [LayerKind(None, rotary)]
    for first in range(1, 6 * periods + 1, 6):
        reused = [None, first, None, first + 2, first + 2]
        chosen += [LayerKind(window, rotary, None, one) for one in reused] + [LayerKind(None, rotary, None, 0)]
    return chosen
