"""How good a model's predictions are, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.lab.compare.results import Quality

RESAMPLES = 2000
MOST_TOKENS_A_CHUNK = 512


@dataclass(frozen=True)
class Predictions:
    """Of each token to predict in W windows: its cost in nats, and the token thought likeliest; (W, P)."""

    nats: Tensor
    best: Tensor


def judge(found: Predictions, exact: Predictions, num_bytes: int, *, seed: int = 0) -> Quality:
    """Bits per byte of the text, and how they and the best guesses change against exact attention.

    The interval of the relative change is a bootstrap over chunks of consecutive tokens, each chunk paired with
    the same chunk under exact attention.
    """
    if not bool(found.nats.isfinite().all()):
        raise ValueError("it gives predictions that are not finite numbers")
    bits, exact_bits = (_chunk_sums(p.nats) / math.log(2) for p in (found, exact))
    low, high = bootstrap_change(bits, exact_bits, seed=seed)
    return Quality(
        loss=float(bits.sum()) / num_bytes,
        change=float(bits.sum() / exact_bits.sum()) - 1,
        change_low=low,
        change_high=high,
        agreement=float((found.best == exact.best).double().mean()),
        chunks=[round(value, 4) for value in bits.tolist()],
    )


def judge_states(found: Tensor, exact: Tensor, *, seed: int = 0) -> Quality:
    """How far last hidden states (W, L, C) lie from those under exact attention, over the length of these.

    >>> judge_states(torch.tensor([[[3.0, 4.5]]]), torch.tensor([[[3.0, 4.0]]])).loss
    0.1
    """
    if not bool(found.isfinite().all()):
        raise ValueError("it gives hidden states that are not finite numbers")
    ours, theirs = found.double(), exact.double()
    distance = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(1e-12)  # (W, L)
    chunks = _chunks(distance)
    far = torch.stack([chunk.mean() for chunk in chunks])
    size = torch.tensor([float(chunk.numel()) for chunk in chunks], dtype=torch.double)
    low, high = bootstrap_change(size * (1 + far), size, seed=seed)
    mean = float(distance.mean())
    cosine = float(torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).mean())
    return Quality(mean, mean, low, high, cosine, [round(value, 6) for value in far.tolist()])


def bootstrap_change(bits: Tensor, exact_bits: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of ``sum(bits) / sum(exact_bits) - 1`` when the paired chunks (C,) are drawn anew.

    >>> bootstrap_change(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 2.0]))
    (1.0, 1.0)
    """
    draw = torch.randint(len(bits), (RESAMPLES, len(bits)), generator=torch.Generator().manual_seed(seed))
    change = bits[draw].sum(1) / exact_bits[draw].sum(1) - 1
    low, high = torch.quantile(change.double(), torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return low, high


def _chunk_sums(nats: Tensor) -> Tensor:
    return torch.stack([chunk.sum() for chunk in _chunks(nats.double())])


def _chunks(values: Tensor) -> list[Tensor]:
    """Chunks of consecutive tokens of one window (W, P); all of about one size, eight a window where it has as many."""
    tokens = values.shape[1]
    number = min(tokens, max(8, -(-tokens // MOST_TOKENS_A_CHUNK)))
    return [chunk for window in values for chunk in window.tensor_split(number)]
