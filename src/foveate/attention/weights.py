"""How logits become weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["softmax", "sigmoid", "relu"]
KINDS: tuple[Kind, ...] = ("softmax", "sigmoid", "relu")


@dataclass(frozen=True, eq=False)
class Weights:
    """A kind of weights; ``sink`` belongs to softmax, ``bias`` to sigmoid and ReLU; each a scalar or (H,)."""

    kind: Kind = "softmax"
    sink: Tensor | None = None
    bias: Tensor | None = None


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


def as_weights(weights: Weights | str) -> Weights:
    """A kind given by name, or weights as they are."""
    if isinstance(weights, Weights):
        return weights
    if weights not in KINDS:
        raise ValueError(f"weights are one of {', '.join(KINDS)}, or softmax(sink=...) and the like; got {weights!r}")
    return Weights(weights)  # type: ignore[arg-type]


def _per_head(name: str, value: float | Tensor | None) -> Tensor | None:
    if value is None:
        return None
    tensor = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
    if tensor.dim() > 1:
        raise ValueError(f"{name} is a number or one per head, (H,); got shape {tuple(tensor.shape)}")
    return tensor.reshape(-1)
