"""Attention as the formula says, over all pairs: the definition that ``attend`` is held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import foveate as fv


@dataclass
class Dense:
    """All of a call but its tensors; ``bias`` and ``weights`` say what the further tensors mean."""

    mask: Tensor  # (B, H, N, M), or 1 in place of B and H
    scale: float
    softcap: float | None = None
    bias: str = "none"
    weights: str = "softmax"
    dims: tuple[int, ...] = ()
    positions: Tensor | None = None  # (B or 1, M): of each key's token in its text, where padding lies in between
    in_order: bool = False  # sum the products of q and k one after the other, as kernels of large tiles do

    def logits(self, q: Tensor, k: Tensor, parameter: Tensor | None) -> Tensor:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = self.scale * (summed_in_order(q, k) if self.in_order else q @ k.mT)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if parameter is None or self.bias == "none":
            return logits
        return logits + self.biases(parameter, q.shape[2], k.shape[2])

    def biases(self, parameter: Tensor, n: int, m: int) -> Tensor:
        if self.bias == "dense":
            return parameter
        if self.bias == "decay":  # the gates of the tokens behind the key, up to the query
            gates = parameter.unsqueeze(2) * torch.ones(n, m, dtype=parameter.dtype).tril(m - n)
            return gates.flip(-1).cumsum(-1).flip(-1) - gates
        if not self.dims:
            return self.by_distance(parameter, n, m)
        places = torch.cartesian_prod(*(torch.arange(size) for size in self.dims)).view(m, -1)
        steps = places[m - n :].unsqueeze(1) - places
        reaches = torch.tensor(parameter.shape[1:]) // 2
        index = steps.clamp(-reaches, reaches) + reaches
        sizes = torch.tensor(parameter.shape[1:])
        strides = torch.tensor([int(sizes[axis + 1 :].prod()) for axis in range(len(sizes))])
        return parameter.flatten(1)[:, (index * strides).sum(-1)]

    def by_distance(self, parameter: Tensor, n: int, m: int) -> Tensor:
        """(B or 1, H, N, M): by how far apart tokens are in their text."""
        at = torch.arange(m).unsqueeze(0) if self.positions is None else self.positions
        slot = torch.arange(m - n, m)
        q = at[:, slot.clamp_min(0)] if m and self.positions is not None else slot.unsqueeze(0)
        distance = q.unsqueeze(2) - at.unsqueeze(1)
        if self.bias == "alibi":
            return -parameter.view(-1, 1, 1) * distance.unsqueeze(1).abs().to(parameter.dtype)
        reach = parameter.shape[1] // 2
        return parameter[:, distance.clamp(-reach, reach) + reach].transpose(0, 1)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """Out, and the log of the sum of weights for softmax."""
        given = list(more)
        parameter = given.pop(0) if self.bias != "none" else None
        logits = self.logits(q, k, parameter)
        offset = given.pop(0).view(-1, 1, 1) if self.weights != "softmax" else None
        if self.weights in ("sigmoid", "relu"):
            assert offset is not None
            weights = (torch.sigmoid if self.weights == "sigmoid" else torch.relu)(logits + offset)
            return (summed(torch.where(self.mask, weights, 0), v, self.mask),)
        logits = torch.where(self.mask, logits, float("-inf"))
        seen = self.mask
        if offset is not None:
            logits = torch.cat([logits, offset.expand(*logits.shape[:3], 1)], -1)
            seen = torch.nn.functional.pad(self.mask.expand(logits.shape[:3] + self.mask.shape[3:]), (0, 1), value=True)
        if not logits.shape[-1]:
            return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], float("-inf"))
        empty = ~(seen & ~logits.isneginf()).any(-1, keepdim=True)
        logits = torch.where(empty, 0, logits)
        lse = torch.where(empty, float("-inf"), torch.logsumexp(logits, -1, keepdim=True)).squeeze(-1)
        weights = torch.where(empty, 0, torch.softmax(logits, -1))[..., : k.shape[2]]
        return summed(weights, v, self.mask), lse

    def sizes(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        out, *lse = self(q, k, v.abs(), *more)
        if self.weights in ("sigmoid", "sink"):  # as exact as logits: several roundings even where a cap hides q and k
            logits = self.logits(q, k, more[0] if self.bias != "none" else None)
            out = out * (1 + torch.where(self.mask, logits, 0).nan_to_num(0, 0, 0).abs().amax((2, 3), keepdim=True) / 2)
        return out, *(x.abs() + 1 for x in lse)


def summed_in_order(q: Tensor, k: Tensor) -> Tensor:
    """q @ k.mT, one channel after the other."""
    logits = q.new_zeros(*q.shape[:3], k.shape[2])
    for channel in range(q.shape[3]):
        logits = logits + q[..., channel, None] * k[..., None, :, channel]
    return logits


def summed(weights: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """weights @ v over the pairs of the mask: a value nobody sees may be anything."""
    v = v.repeat_interleave(weights.shape[1] // v.shape[1], 1)
    if bool(v.isfinite().all()):
        return weights @ v
    hit = mask.to(v.dtype) @ (~v.isfinite()).to(v.dtype) > 0
    return torch.where(hit, float("nan"), weights @ torch.nan_to_num(v, 0, 0, 0))


def mask_of(pattern: fv.Pattern, scene: fv.patterns.Scene) -> Tensor:
    """What each pair of positions answers, one by one."""
    if scene.q is not None and not scene.q.shape[0]:
        return torch.zeros(1, 1, scene.num_queries, scene.num_keys, dtype=torch.bool)
    resolved = fv.patterns.resolve(pattern, scene)
    q = torch.arange(scene.num_queries).view(1, 1, -1, 1) + scene.offset
    batch, head = torch.arange(resolved.batches).view(-1, 1, 1, 1), torch.arange(resolved.heads).view(1, -1, 1, 1)
    shape = resolved.batches, resolved.heads, scene.num_queries, scene.num_keys
    return resolved.visible(batch, head, q, torch.arange(scene.num_keys).view(1, 1, 1, -1)).expand(shape)
