"""Weights that no function of one logit gives, nor its row sum: entmax of rows, doubly stochastic tables.

Everything here takes logits (B, H, N, M) and which pairs are visible, and returns weights, zeros where hidden, by
torch's own operators: derivatives of every order and mode follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.plain import traced
from foveate.precision import accum_dtype, to_accum

Normalise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Entmax:
    """alpha-entmax of each row: ``[(alpha - 1) logit - tau]_+ ** (1 / (alpha - 1))`` with tau such that it sums to 1.

    Peters et al., Sparse Sequence-to-Sequence Models, arXiv 1905.05702. The threshold tau is found by halving an
    interval; two differentiable steps of Newton's method then give it its last digits, and its derivatives: the
    Jacobian diag(s) - s s^T / sum(s), s = weights ** (2 - alpha).
    """

    alpha: float | Tensor  # or (H,)

    def __call__(self, logits: Tensor, visible: Tensor) -> Tensor:
        precise = accum_dtype(logits)
        seen = visible & ~logits.isneginf()
        spoiled = seen & (seen & ~logits.isfinite()).any(-1, keepdim=True)
        seen = seen & ~spoiled
        alpha = self._of_heads(logits.device, precise)
        scores = torch.where(seen, logits, 0).to(precise) * (alpha - 1)
        top = scores.detach().masked_fill(~seen, float("-inf")).amax(-1, keepdim=True)
        scores = torch.where(seen, scores - torch.where(top.isneginf(), 0, top), BELOW)
        weights = _above_threshold(scores, 1 / (alpha - 1)).to(logits.dtype)
        return torch.where(spoiled, torch.where(spoiled, logits, 0) * float("nan"), weights)

    def _of_heads(self, device: torch.device, dtype: torch.dtype) -> float | Tensor:
        """alpha as it broadcasts to (B, H, N, M)."""
        return self.alpha.to(device, dtype).view(1, -1, 1, 1) if isinstance(self.alpha, Tensor) else self.alpha


BELOW = -2.0  # a score that no threshold reaches: they lie between -1 and 0, the greatest score


def _above_threshold(scores: Tensor, power: float | Tensor) -> Tensor:
    """``[scores - tau]_+ ** power`` of rows whose greatest score is 0."""
    tau = _threshold(scores.detach(), power.detach() if isinstance(power, Tensor) else power)
    for _ in range(2):
        above = scores > tau
        height = torch.where(above, scores - tau, 1)
        total = torch.where(above, height**power, 0).sum(-1, keepdim=True)
        slope = torch.where(above, power * height ** (power - 1), 0).sum(-1, keepdim=True)
        tau = tau + torch.where(slope > 0, (total - 1) / torch.where(slope > 0, slope, 1), 0)
    above = scores > tau
    return torch.where(above, torch.where(above, scores - tau, 1) ** power, 0)


def _threshold(scores: Tensor, power: float | Tensor) -> Tensor:
    """A number just below tau, (B, H, N, 1): from there Newton's method rises to it."""
    low, step = torch.full_like(scores[..., :1], -1), 0.5
    for _ in range(54 if scores.dtype == torch.float64 else 26):
        total = ((scores - low - step).clamp_min(0) ** power).sum(-1, keepdim=True)
        low, step = torch.where(total > 1, low + step, low), step / 2
    return low


@dataclass(frozen=True, eq=False)
class Sinkhorn:
    """exp(logits), normalised by rows, by columns, by rows, ..., so many times; see :func:`sinkhorn`."""

    iterations: int

    def __call__(self, logits: Tensor, visible: Tensor) -> Tensor:
        logs = to_accum(logits)
        visible = visible & ~logits.isneginf()
        visible = visible & visible.any(-2).unsqueeze(-1)  # what is no key is padding, and no query
        for step in range(self.iterations):
            axis = -1 - step % 2
            logs = torch.where(visible, logs, float("-inf"))
            logs = torch.where(visible.any(axis, keepdim=True), logs, 0)
            logs = logs - torch.logsumexp(logs, axis, keepdim=True)
        return torch.where(visible, logs.exp(), 0).to(logits.dtype)


@dataclass(frozen=True, eq=False)
class QRSquared:
    """The squares of the entries of the orthogonal factor of the logits; see :func:`qr_squared`."""

    def __call__(self, logits: Tensor, visible: Tensor) -> Tensor:
        visible = (visible & visible.any(-2).unsqueeze(-1)).expand(logits.shape)  # what is no key is no query
        _check_documents(visible)
        odd = (visible & ~logits.isfinite()).any(-1)
        spoiled = (visible & odd.unsqueeze(-2)).any(-1, keepdim=True)  # documents with a number that is not finite
        own = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        alone = spoiled | ~visible.any(-1, keepdim=True)
        blocks = torch.where(alone | ~visible, own * alone, to_accum(logits))
        squares = torch.linalg.qr(blocks).Q.square()  # of diagonal blocks, block by block
        weights = torch.where(visible, squares, 0).to(logits.dtype)
        return torch.where(spoiled & visible, float("nan"), weights)


def _check_documents(visible: Tensor) -> None:
    """Tokens see their own document whole, and nothing else."""
    if traced(visible):
        return
    seen = visible.to(torch.float32)
    if not (torch.equal(visible, visible.mT) and torch.equal(seen @ seen > 0, visible)):
        raise ValueError("qr_squared takes tokens that see all of their own document: full, padding or packs alone")
