"""CoCA: keys collinear with queries in every rotary plane, so that logits fall with distance from the first step."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from foveate.catalogue.registry import register
from foveate.layers.rotary import rotate
from foveate.mixers.attention import AttentionMixer

Scaling = Literal["linear", "ntk"]


@register(
    "coca",
    papers=("CoCA",),
    formula="o_m = Σ_n softmax_n(Σ_j t_nj ‖q_mj‖² cos((m - n) θ_j) / √d) v_n, t = relu(W x), j: the rotary planes",
    supports={"causal", "noncausal", "padding", "packed", "decode", "gqa"},
)
class CollinearAttention(AttentionMixer):
    """Rotary attention whose key for query m is k_mn = q_m ⊙ t_n, with t_n ≥ 0 and alike in both halves of a plane.

    Query and key then lie on one line in each plane before they are turned, and a plane's logit,
    t_nj ‖q_mj‖² cos((m - n) θ_j), is greatest where both stand at one place. It is the product of (‖q_mj‖², 0) turned
    by m and (t_nj, 0) turned by n, so that keys depend on no query and plain attention computes it, with an ordinary
    cache and no (N, M, D) tensor.

    ``rotary`` is the base of the angles. To go beyond the trained length, ``scaling="linear"`` divides positions by
    ``factor`` (position interpolation), ``"ntk"`` multiplies the base by factor^(d / (d - 2)).

    Zhu, Ye, Jiang, Xue, Zhang et al., Cure the Headache of Transformers via Collinear Constrained Attention,
    arXiv 2309.08646. As in the authors' published code, t is the ReLU of the mean of a projection's halves; that code
    multiplies q by t turned, entry by entry, which is not the product turned that the paper defines and is here.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        rotary: float = 10_000.0,
        scaling: Scaling | None = None,
        factor: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, **options)
        if self.head_dim % 2:
            raise ValueError(f"rotary planes take two channels each; got heads of {self.head_dim}")
        if scaling not in (None, "linear", "ntk"):
            raise ValueError(f'scaling is "linear", "ntk" or None; got {scaling!r}')
        if not factor >= 1 or (factor != 1 and scaling is None):
            raise ValueError(f"factor is how much longer texts may be, at least 1, beside a scaling; got {factor}")
        self.base = rotary * factor ** (self.head_dim / max(self.head_dim - 2, 1)) if scaling == "ntk" else rotary
        self.stretch = factor if scaling == "linear" else 1.0

    def heads_of(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(‖q_j‖², 0) and (t_j, 0) of every plane j, and values."""
        q, t, v = super().heads_of(x, context)
        half = self.head_dim // 2
        squares = q[..., :half].square() + q[..., half:].square()
        lengths = torch.relu((t[..., :half] + t[..., half:]) / 2)
        return *(torch.cat([y, torch.zeros_like(y)], -1) for y in (squares, lengths)), v  # type: ignore[return-value]

    def rotated(self, q: Tensor, k: Tensor, v: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        last = first + k.shape[2]
        at = torch.arange(first, last, dtype=torch.float64, device=k.device) / self.stretch
        return rotate(q, at[len(at) - q.shape[2] :], self.base), rotate(k, at, self.base), v
