"""Spiking self-attention: queries, keys and values are spikes, and attention counts coincidences."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from foveate.catalogue.registry import register
from foveate.mixers.base import Mixer, divided
from foveate.patterns import Layout
from foveate.precision import to_accum
from foveate.recurrence import recur

ALPHA = 4.0  # slope of the surrogate, times four


def spike(x: Tensor) -> Tensor:
    """1 where x >= 0, else 0; backward it is a sigmoid of slope ``ALPHA`` / 4 at 0.

    >>> spike(torch.tensor([-0.5, 0.0]))
    tensor([0., 1.])
    """
    smooth = (ALPHA * x).sigmoid()
    return (x >= 0).to(x.dtype) + (smooth - smooth.detach())


def fire(currents: Tensor, *, threshold: float = 1.0, tau: float = 2.0) -> Tensor:
    """Spikes (T, ...) of leaky integrate-and-fire neurons that these currents (T, ...) run into over T steps.

    The potential moves by (current - potential) / τ in each step; at the threshold the neuron spikes and falls
    back to 0. The fall carries no gradient, the spike a sigmoid's.

    >>> fire(torch.full((4,), 1.5)).tolist()
    [0.0, 1.0, 0.0, 1.0]
    """
    potential, spikes = torch.zeros_like(currents[0]), list[Tensor]()
    for current in currents:
        potential = potential + (current - potential) / tau
        spikes.append(spike(potential - threshold))
        potential = potential * (1 - spikes[-1].detach())
    return torch.stack(spikes)


class SpikingLinear(nn.Module):
    """A linear layer, a batch norm, and neurons that fire: (T, B, N, C) to spikes (T, B, N, C)."""

    def __init__(self, dim: int, *, threshold: float, bias: bool = False) -> None:
        super().__init__()
        self.threshold = threshold
        self.linear = nn.Linear(dim, dim, bias=bias)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return fire(self.norm(self.linear(x).flatten(0, 2)).view_as(x), threshold=self.threshold)


@register(
    "spikformer_v2",
    papers=("Spikformer V2",),
    formula="o = SN(BN(W SN(s q (kᵀ v)))), q, k, v = SN(BN(W x)) ∈ {0, 1}, SN: leaky integrate-and-fire over T steps",
    supports={"noncausal", "grid"},
    notes="Positions do not matter to it: a layout is accepted and changes nothing.",
)
class SpikingSelfAttention(Mixer):
    """Self-attention of binary queries, keys and values without softmax, in whichever order is cheaper: linear.

    ``forward`` shows the same tokens in each of ``time`` steps and gives the mean of the spikes, rates between 0
    and 1; ``spikes`` takes and gives (T, B, N, C), to stack several. ``scale`` is s; neurons fire at ``threshold``,
    those that read the attention at half of it.

    >>> mixer = SpikingSelfAttention(64, heads=4, time=4)
    >>> mixer(torch.randn(2, 49, 64)).shape
    torch.Size([2, 49, 64])
    >>> mixer.spikes(torch.randn(2, 49, 64).expand(4, -1, -1, -1)).unique().tolist()
    [0.0, 1.0]
    """

    exempt: ClassVar[dict[str, str]] = {"differences": "spikes are steps; their gradient is a surrogate"}

    tiny: ClassVar[dict[str, Any]] = {"threshold": 0.05}  # before any training nothing fires at 1

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        time: int = 4,
        scale: float = 0.125,
        threshold: float = 1.0,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, causal=causal)
        if time < 1 or not threshold > 0:
            raise ValueError(f"neurons fire over at least 1 step, at a threshold above 0; got {time}, {threshold}")
        self.heads, self.head_dim, self.time, self.scale = heads, divided(dim, heads), time, scale
        self.to_q, self.to_k, self.to_v = (SpikingLinear(dim, threshold=threshold) for _ in range(3))
        self.to_out = SpikingLinear(dim, threshold=threshold, bias=True)

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        return self.spikes(x.expand(self.time, *x.shape)).mean(0)

    def spikes(self, x: Tensor) -> Tensor:
        """Currents or spikes (T, B, N, C) to spikes (T, B, N, C)."""
        q, k, v = (self.split(spiking(x)) for spiking in (self.to_q, self.to_k, self.to_v))
        counts = recur(q, k, to_accum(v), scale=1.0, causal=False).out  # whole numbers, exact up to 2^24 coincidences
        heads = (counts * self.scale).to(x.dtype).transpose(1, 2).flatten(2)
        return self.to_out(fire(heads.view_as(x), threshold=self.to_out.threshold / 2))

    def split(self, x: Tensor) -> Tensor:
        """(T, B, N, C) to (T * B, H, N, D)."""
        return x.flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(1, 2)
