"""What the calls of mamba_ssm and causal_conv1d have in common."""

from __future__ import annotations

import torch
from torch import Tensor


def run_lengths(seq_idx: Tensor, batch: int, num_tokens: int) -> list[list[int]]:
    """Lengths of the runs of equal numbers in each row of seq_idx (B, L).

    >>> run_lengths(torch.tensor([[0, 0, 1], [0, 1, 1]]), 2, 3)
    [[2, 1], [1, 2]]
    """
    if tuple(seq_idx.shape) != (batch, num_tokens):
        raise ValueError(f"seq_idx must be (batch, tokens) = {(batch, num_tokens)}, got {tuple(seq_idx.shape)}")
    if seq_idx.is_floating_point() or seq_idx.is_complex():
        raise TypeError(f"seq_idx must hold whole numbers, one for each sequence, got {seq_idx.dtype}")
    if num_tokens == 0:
        return [[0]] * batch
    return [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in seq_idx]


def refuse(**options: tuple[object, str]) -> None:
    """Refuse each option that was given: name=(value, what to do instead)."""
    for name, (value, instead) in options.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{name} is not supported by foveate.compat.mamba: {instead}")


def check(name: str, x: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if x is not None and tuple(x.shape) not in shapes:
        raise ValueError(f"{name} must be {' or '.join(map(str, shapes))}, got {tuple(x.shape)}")
