"""Part Attention of Ultra3D: tokens see those that carry their own label."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.attention import attend
from foveate.catalogue.registry import register
from foveate.mixers.attention import AttentionMixer
from foveate.mixers.base import join_heads
from foveate.patterns import Layout, document_numbers


@register(
    "part_attention",
    papers=("Ultra3D / Part Attention",),
    formula="o_i = Σ_j softmax_j(q_i·k_j / √d) v_j over p_j = p_i",
    supports={"noncausal", "padding", "packed", "gqa"},
    notes="Labels come from elsewhere: pass parts (B, N) to forward. Without them all tokens are one part.",
)
class PartAttention(AttentionMixer):
    """Softmax attention among the tokens of a part: Σ n_p² pairs, for parts of n_p tokens of any number and size.

    Tokens are sorted by label, each part runs as if it were alone, and the result is put back in order.

    Chen et al., Ultra3D: Efficient and High-Fidelity 3D Generation with Part Attention, arXiv 2507.17745. Its labels
    come from a network that segments meshes, which is not here; nor are its rotary positions of voxels.

    >>> mixer = PartAttention(16, heads=2)
    >>> x, parts = torch.randn(1, 5, 16), torch.tensor([[7, 2, 7, 7, 2]])
    >>> together, alone = mixer(x, parts=parts), mixer(x[:, parts[0] == 2])
    >>> torch.testing.assert_close(together[:, parts[0] == 2], alone)
    """

    def __init__(self, dim: int, heads: int = 8, *, causal: bool = False, **options: Any) -> None:
        super().__init__(dim, heads, causal=causal, **options)

    def forward(
        self,
        x: Tensor,
        *,
        parts: Tensor | None = None,
        context: Tensor | None = None,
        layout: Layout | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens x (B, N, C) inside parts: whole numbers (B, N) or (N,), none negative.

        Raises ValueError for parts of another shape or kind, and beside a layout, which has parts of its own.
        """
        if parts is None:
            return super().forward(x, context=context, layout=layout, padding=padding)
        self.check(x, context, layout, padding)
        numbers = self.check_parts(parts, x, layout)
        if padding is not None:
            numbers = numbers.masked_fill(~padding, -1)
            x = x.masked_fill(~padding.unsqueeze(-1), 0)
        numbers, order = numbers.sort(dim=1, stable=True)
        mixed = self.mix_sorted(x.gather(1, order.unsqueeze(-1).expand_as(x)), numbers)
        out = mixed.gather(1, order.argsort(dim=1).unsqueeze(-1).expand_as(mixed))
        return out if padding is None else out.masked_fill(~padding.unsqueeze(-1), 0)

    def mix_sorted(self, x: Tensor, numbers: Tensor) -> Tensor:
        """Tokens x (B, N, C) whose parts' numbers (B, N) never fall."""
        heads = self.project(x, x)
        return self.to_out(join_heads(attend(*heads, document_numbers(numbers))))

    def check_parts(self, parts: Tensor, x: Tensor, layout: Layout | None) -> Tensor:
        if layout is not None:
            raise ValueError(f"part_attention takes parts or a layout, not both; got parts and {layout}")
        whole = not (parts.is_floating_point() or parts.is_complex() or parts.dtype == torch.bool)
        if not whole or parts.shape not in (x.shape[:2], x.shape[1:2]):
            raise ValueError(
                f"parts are whole numbers {tuple(x.shape[:2])}, one for each token;"
                f" got {parts.dtype} {tuple(parts.shape)}"
            )
        if parts.numel() and parts.min() < 0:
            raise ValueError(f"parts are numbered from 0 on; got {int(parts.min())}: mark padding by padding")
        return parts.long().expand(x.shape[:2])
