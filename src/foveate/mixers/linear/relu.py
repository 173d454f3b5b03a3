"""Linear attention with ReLU features."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import pad

from foveate.mixers.base import Mixer, divided, split_heads
from foveate.precision import to_accum
from foveate.recurrence import recur


def relu_attention(q: Tensor, k: Tensor, v: Tensor, *, least: float) -> Tensor:
    """Σ_j w_ij v_j / max(Σ_j w_ij, least) with w_ij = relu(q_i) · relu(k_j), in time linear in the tokens.

    q (B, H, N, D), k (B, H, M, D), v (B, H, M, Dv); out (B, H, N, Dv) in v's dtype. Sums are float32 at least, so
    that half precision does not overflow however many tokens there are.

    >>> import torch
    >>> q, k, v = torch.randn(3, 1, 2, 35, 8).unbind(0)
    >>> weights = q.relu() @ k.relu().transpose(2, 3)
    >>> expected = weights @ v / weights.sum(-1, keepdim=True).clamp_min(100)
    >>> torch.allclose(relu_attention(q, k, v, least=100), expected, atol=1e-5)
    True
    """
    out = recur(q.relu(), k.relu(), pad(to_accum(v), (0, 1), value=1.0), scale=1.0, causal=False).out
    return (out[..., :-1] / out[..., -1:].clamp_min(least)).to(v.dtype)


class ReluMixer(Mixer):
    """Projections around :func:`relu_attention`."""

    exempt: ClassVar[dict[str, str]] = {
        "differences": "a small move takes some of thousands of ReLUs across their kink"
    }

    def __init__(self, dim: int, heads: int, *, causal: bool) -> None:
        super().__init__(dim, causal=causal)
        self.heads, self.head_dim = heads, divided(dim, heads)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = split_heads(self.to_qkv(x), 3 * self.heads).chunk(3, 1)
        return q, k, v
