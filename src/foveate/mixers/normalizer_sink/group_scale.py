"""DARA: each head has a learned factor for the logits of each group of tokens, such as an image's."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.cache import KVCache
from foveate.catalogue.registry import register
from foveate.mixers.attention import AttentionMixer
from foveate.patterns import Layout, Pattern

Spans = tuple[tuple[int, int], ...]


@register(
    "group_scaled_attention",
    papers=("DARA",),
    formula="o_i = Σ_j softmax_j(f_hg(j) q_i·k_j / √d) v_j, f a learned factor of each head and group, 1 elsewhere",
    supports={"causal", "noncausal", "decode", "gqa"},
)
class GroupScaledAttention(AttentionMixer):
    """Softmax attention whose logits of marked groups of keys are multiplied by learned factors, one for each head.

    ``groups`` are spans of positions, [first, end), that do not overlap: the images of a prompt, say. Factors are 1 at
    first, where it is plain attention; a head of its own scale takes no new kernel, as keys are scaled instead. Chen
    et al., True Multimodal In-Context Learning Needs Attention to the Visual Context (DARA), arXiv 2507.15807.
    """

    tiny: ClassVar[dict[str, Any]] = {"groups": ((2, 9), (9, 14))}
    full_budget: ClassVar[dict[str, Any] | None] = {"groups": ()}

    def __init__(self, dim: int, heads: int = 8, *, groups: Spans = (), **options: Any) -> None:
        super().__init__(dim, heads, **options)
        edges = [edge for span in sorted(groups) for edge in span]
        if edges != sorted(edges) or any(first >= end or first < 0 for first, end in groups):
            raise ValueError(f"groups are spans [first, end) of positions that do not overlap; got {groups}")
        self.groups = groups
        self.factors = nn.Parameter(torch.ones(self.heads, len(groups))) if groups else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, within: Pattern, layout: Layout | None) -> Tensor:
        if self.factors is None:
            return super().attend(q, k, v, within, layout)
        scales = torch.ones(k.shape[2], self.heads, dtype=k.dtype, device=k.device)
        number = torch.full((k.shape[2],), -1, device=k.device)
        for group, (first, end) in enumerate(self.groups):
            number[first:end] = group
        chosen = self.factors.mT.to(k.dtype)[number.clamp_min(0)]
        scales = torch.where((number >= 0).unsqueeze(1), chosen, scales).mT.unsqueeze(-1)  # (H, M, 1)
        own = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
        return super().attend(q, own * scales, v, within, layout)

    def attend_kept(self, q: Tensor, cache: KVCache) -> Tensor:
        return self.attend(q, cache.k, cache.v, cache.within, None)
