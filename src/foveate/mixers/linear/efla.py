"""EFLA: the delta rule solved exactly in time."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.catalogue.registry import register
from foveate.mixers.linear.deltanet import DeltaNet, unit
from foveate.mixers.recurrent import Inputs
from foveate.precision import to_accum


@register(
    "efla",
    papers=("EFLA",),
    formula="S_t = (I - a_t k_t k_tᵀ) S_{t-1} + a_t k_t v_tᵀ, a_t = (1 - exp(-β_t λ_t)) / λ_t, λ_t = |k_t|^2",
    notes="Keys keep their length, which decides how far the state moves; unit queries and the rest are DeltaNet's.",
)
class EFLA(DeltaNet):
    """The delta rule followed for a time beta instead of one step: dS/dt = -k k^T S + k v^T, solved exactly."""

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        return Inputs(unit(q), k, v, beta=exact_strength(self.strength(x).transpose(1, 2), to_accum(k)))


def exact_strength(beta: Tensor, k: Tensor) -> Tensor:
    """(1 - exp(-beta |k|^2)) / |k|^2, (B, G, N): the delta rule's strength that is exact for any k (B, G, N, D).

    It tends to beta as k tends to 0, without a loss of digits in it or its gradient.

    >>> exact_strength(torch.tensor(0.5), torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    tensor([0.5000, 0.0400])
    """
    time = beta * k.square().sum(-1)
    near = time < 1e-2
    far = torch.where(near, 1, time)
    series = 1 - time / 2 * (1 - time / 3 * (1 - time / 4 * (1 - time / 5 * (1 - time / 6))))
    return beta * torch.where(near, series, -torch.expm1(-far) / far)
