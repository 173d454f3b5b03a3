"""Linear attention: a sum of outer products of keys and values, divided by a sum of keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.catalogue.registry import register
from foveate.mixers.recurrent import Inputs, RecurOptions, RecurrentMixer
from foveate.precision import to_accum


def elu_plus_one(x: Tensor) -> Tensor:
    """``elu(x) + 1``, positive; as an exponential below 0, where the sum would cancel.

    >>> elu_plus_one(torch.tensor([-1.0, 0.0, 2.0]))
    tensor([0.3679, 1.0000, 3.0000])
    """
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


FeatureMap = Callable[[Tensor], Tensor]


class LinearOptions(RecurOptions, total=False):
    """What :class:`LinearTransformer` takes beside the width and the number of heads."""

    feature_map: FeatureMap


@register(
    "linear_transformer",
    papers=("Linear Transformer",),
    formula="o_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j φ(k_j)",
)
class LinearTransformer(RecurrentMixer):
    """Attention whose weights are inner products of positive features, so that sums over keys become a state.

    ``feature_map`` turns queries and keys (..., D) into positive features (..., F).
    """

    usual_supports = RecurrentMixer.usual_supports | {"noncausal", "cross"}

    def __init__(
        self, dim: int, heads: int = 8, *, feature_map: FeatureMap = elu_plus_one, **options: Unpack[RecurOptions]
    ) -> None:
        super().__init__(dim, heads, **options)
        self.feature_map = feature_map
        self.num_features = feature_map(torch.zeros(1, self.head_dim)).shape[-1]

    def inputs(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        return self.summed(self.feature_map(q), self.feature_map(k), v)

    def summed(self, q: Tensor, k: Tensor, v: Tensor) -> Inputs:
        """Features and values, with a column of ones beside v, by which ``recur`` sums the keys."""
        return Inputs(q, k, pad(to_accum(v), (0, 1), value=1.0))  # the sum overflows float16 where outputs would not

    def read_out(self, x: Tensor, heads: Tensor) -> Tensor:
        return super().read_out(x, averaged(heads).to(x.dtype))


def averaged(heads: Tensor) -> Tensor:
    """Sums over keys (..., Dv), divided by the sum of the weights that their last channel holds; 0 where it is 0."""
    total, weight = heads[..., :-1], heads[..., -1:]
    blind = weight == 0  # no key, or all its features underflowed
    return torch.where(blind, 0, total / torch.where(blind, 1, weight))
