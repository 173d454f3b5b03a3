"""QDSFormer's classical forms: attention whose weights sum to 1 by queries and by keys."""

from __future__ import annotations

from typing import Any, Literal

from foveate.attention import Weights, qr_squared, sinkhorn
from foveate.catalogue.registry import register
from foveate.mixers.attention import AttentionMixer

Normaliser = Literal["sinkhorn", "qr"]


@register(
    "doubly_stochastic_attention",
    papers=("QDSFormer",),
    formula="o_i = Σ_j P_ij v_j, P = Sinkhorn(e^{q kᵀ / √d}) or Q ⊙ Q with Q R = q kᵀ / √d",
    supports={"noncausal", "padding", "packed", "gqa"},
    notes="No quantum circuit is simulated; the paper's QDSFormer proper is not here.",
)
class DoublyStochasticAttention(AttentionMixer):
    """Attention whose weights sum to 1 by queries and by keys: Sinkhorn's normalisation, or squares of a QR factor.

    ``normaliser="sinkhorn"`` divides exp(logits) by rows, by columns, by rows, ..., ``iterations`` times (an odd number
    ends with rows, as in Sinkformers); ``"qr"`` squares the entries of the orthogonal factor of the logits, which is
    exact at once and takes no more tokens than a head has channels.

    Born, Skogh, Rhrissorrakrai, Utro, Wagner, Sobczyk, Quantum Doubly Stochastic Transformers, arXiv 2504.16275: the
    two classical normalisers that the paper sets beside its variational quantum circuit, which is not here.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        normaliser: Normaliser = "sinkhorn",
        iterations: int = 3,
        causal: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, causal=causal, **options)
        if normaliser not in ("sinkhorn", "qr"):
            raise ValueError(f'normaliser is "sinkhorn" or "qr"; got {normaliser!r}')
        self.normaliser = sinkhorn(iterations) if normaliser == "sinkhorn" else qr_squared()

    def weights(self, num_keys: int) -> Weights:
        return self.normaliser
