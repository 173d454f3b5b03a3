"""How logits become weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveate.attention.normalise import Entmax, Normalise, QRSquared, Sinkhorn
from foveate.plain import traced

Kind = Literal["softmax", "sigmoid", "relu", "sparsemax", "entmax15", "entmax", "sinkhorn", "qr_squared"]
NAMED: tuple[Kind, ...] = ("softmax", "sigmoid", "relu", "sparsemax", "entmax15")


@dataclass(frozen=True, eq=False)
class Weights:
    """A kind of weights; ``sink`` belongs to softmax, ``bias`` to sigmoid and ReLU; each a scalar or (H,).

    ``normalise`` makes weights of logits and visibility where a function of one logit, or its row sum, does not.
    """

    kind: Kind = "softmax"
    sink: Tensor | None = None
    bias: Tensor | None = None
    normalise: Normalise | None = None


def softmax(*, sink: float | Tensor | None = None) -> Weights:
    """Softmax weights; ``sink`` is an extra logit (a number, or one per head) that takes weight but has no value.

    Agarwal et al., gpt-oss model card, arXiv 2508.10925; Xiao et al., arXiv 2309.17453.

    >>> softmax(sink=0.0).kind
    'softmax'
    """
    return Weights("softmax", sink=_per_head("sink", sink))


def sigmoid(*, bias: float | Tensor = 0.0) -> Weights:
    """Elementwise sigmoid weights, ``sigmoid(logit + bias)``, without a row sum; the paper sets bias to -log M.

    Ramapuram et al., Theory, Analysis, and Best Practices for Sigmoid Self-Attention, arXiv 2409.04431.

    >>> sigmoid(bias=-5.0).kind
    'sigmoid'
    """
    return Weights("sigmoid", bias=_per_head("bias", bias))


def relu(*, bias: float | Tensor = 0.0) -> Weights:
    """Elementwise ReLU weights, ``max(0, logit + bias)``, without a row sum; divide v by M for the paper's scale.

    Wortsman et al., Replacing softmax with ReLU in Vision Transformers, arXiv 2309.08586.

    >>> relu().kind
    'relu'
    """
    return Weights("relu", bias=_per_head("bias", bias))


def sparsemax() -> Weights:
    """The point of the simplex nearest to the logits: weights that sum to 1, most of them exactly 0.

    Martins and Astudillo, From Softmax to Sparsemax, arXiv 1602.02068. Runs on "reference"; it has no row sums by
    which parts merge.

    >>> import torch
    >>> from foveate import attend
    >>> q, k = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 0.5, -3.0]).view(1, 1, 3, 1)
    >>> attend(q, k, torch.eye(3).view(1, 1, 3, 3), weights=sparsemax())
    tensor([[[[0.7500, 0.2500, 0.0000]]]])
    """
    return Weights("sparsemax", normalise=Entmax(2.0))


def entmax15() -> Weights:
    """1.5-entmax, half-way between softmax and sparsemax; see :func:`entmax`.

    >>> entmax15().kind
    'entmax15'
    """
    return Weights("entmax15", normalise=Entmax(1.5))


def entmax(alpha: float | Tensor) -> Weights:
    """alpha-entmax: ``[(alpha - 1) logit - tau]_+ ** (1 / (alpha - 1))``, whose threshold tau makes a row sum to 1.

    Peters, Niculae, Martins, Sparse Sequence-to-Sequence Models, arXiv 1905.05702. ``alpha`` lies above 1 (softmax) and
    is at most 2 (sparsemax): a number or one per head, (H,), which may be learned (Correia et al., Adaptively Sparse
    Transformers, arXiv 1909.00015). Near 1 float32 loses digits, at 1.01 two. Runs on "reference"; it has no row sums
    by which parts merge.

    >>> entmax(1.3).kind
    'entmax'

    Raises ValueError for an alpha beyond these bounds.
    """
    if isinstance(alpha, Tensor):
        alpha = alpha.reshape(1) if alpha.dim() == 0 else alpha
        if alpha.dim() != 1 or not alpha.is_floating_point():
            raise ValueError(f"alpha is a number or floats per head, (H,); got {alpha.dtype} {tuple(alpha.shape)}")
    least, most = _bounds(alpha)
    if not (least > 1 and most <= 2):
        raise ValueError(f"alpha lies above 1 (softmax) and is at most 2 (sparsemax); got {least} to {most}")
    return Weights("entmax", normalise=Entmax(alpha))


def _bounds(alpha: float | Tensor) -> tuple[float, float]:
    """The least and the greatest; of numbers that nobody can read yet, some that are allowed."""
    if not isinstance(alpha, Tensor):
        return alpha, alpha
    if traced(alpha) or not alpha.numel():
        return 1.5, 1.5
    return float(alpha.detach().min()), float(alpha.detach().max())


def sinkhorn(iterations: int = 3) -> Weights:
    """Doubly stochastic weights: exp(logits), normalised by rows, by columns, by rows, ..., ``iterations`` times.

    Sander, Ablin, Blondel, Peyré, Sinkformers, arXiv 2110.11773; once is softmax. Columns run over all queries, so it
    takes as many queries as keys, of the same tokens, and no causal pattern: a token hidden from all queries is
    padding, and gives zeros as a query. Runs on "reference"; it has no row sums by which parts merge.

    >>> import torch
    >>> from foveate import attend
    >>> q, k = torch.randn(2, 1, 1, 5, 4)
    >>> attend(q, k, torch.eye(5).view(1, 1, 5, 5), weights=sinkhorn(31)).sum(2).round(decimals=3)
    tensor([[[1., 1., 1., 1., 1.]]])

    Raises ValueError for fewer iterations than 1.
    """
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations is how often weights are normalised, at least 1; got {iterations!r}")
    return Weights("sinkhorn", normalise=Sinkhorn(iterations))


def qr_squared() -> Weights:
    """Doubly stochastic weights without iterations: squared entries of the orthogonal factor of the logits' QR.

    Born, Skogh, Rhrissorrakrai, Utro, Wagner, Sobczyk, Quantum Doubly Stochastic Transformers, arXiv 2504.16275: its
    classical variant. Rows and columns of an orthogonal matrix have length 1, so squares sum to 1 by both; they do not
    depend on the signs that an orthogonal factor is free in. Tokens see all of their own document. There are as many
    queries as keys, and, unless a bias is added, no more than channels: logits of lower rank have many orthogonal
    factors. Runs on "reference"; it has no row sums by which parts merge.

    >>> import torch
    >>> from foveate import attend
    >>> q, k = torch.randn(2, 1, 1, 3, 4)
    >>> attend(q, k, torch.eye(3).view(1, 1, 3, 3), weights=qr_squared()).sum(2).round(decimals=3)
    tensor([[[1., 1., 1.]]])
    """
    return Weights("qr_squared", normalise=QRSquared())


def as_weights(weights: Weights | str) -> Weights:
    """A kind given by name, or weights as they are."""
    if isinstance(weights, Weights):
        return weights
    if weights not in NAMED:
        raise ValueError(
            f"weights are one of {', '.join(NAMED)}, or softmax(sink=...), entmax(alpha), sinkhorn(iterations),"
            f" qr_squared() and the like; got {weights!r}"
        )
    if weights in ("sparsemax", "entmax15"):
        return sparsemax() if weights == "sparsemax" else entmax15()
    return Weights(weights)  # type: ignore[arg-type]


def _per_head(name: str, value: float | Tensor | None) -> Tensor | None:
    if value is None:
        return None
    tensor = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
    if tensor.dim() > 1:
        raise ValueError(f"{name} is a number or one per head, (H,); got shape {tuple(tensor.shape)}")
    return tensor.reshape(-1)
