"""Applications to text."""

from __future__ import annotations

from foveate.catalogue.contracts import Hook
from foveate.catalogue.tiers import hook


@hook("vi_mistral_x", papers=("Vi-Mistral-X",), tiny={"length": 45, "window": 7})
def vi_mistral_x(length: int = 8192, window: int = 4096) -> Hook:
    """Mistral's attention: a sliding window of 4,096 keys, a key head for every four query heads.

    Vo, Vi-Mistral-X: Building a Vietnamese Language Model with Advanced Continual Pre-training, arXiv 2403.15470.
    """
    return Hook(f"window({window - 1}) & causal", heads=32, kv_heads=8, head_dim=128, length=length)
