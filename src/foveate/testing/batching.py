"""Properties of batches: padding and neighbours change nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.testing.case import Subject
from foveate.testing.closeness import assert_same, assert_zero

GARBAGE = 1e3
LENGTHS = (37, 20, 1)


def padding(subject: Subject) -> None:
    """Sequences padded with garbage come out as they do alone, padding as zeros; holes hide what is in them."""
    place = subject.places(LENGTHS[0])[0]
    for side in ("right", "left", "inner"):
        real = real_tokens(place.length, side)
        x = subject.tokens(place.length, len(real)).masked_fill(~real.unsqueeze(-1), 0)
        dirty = (x + GARBAGE * torch.randn_like(x) * ~real.unsqueeze(-1)).requires_grad_()
        mixer = subject.mixer()
        out = mixer(dirty, layout=place.layout, padding=real)
        assert_zero(f"outputs at {side} padding", out[~real])
        if side == "inner":
            (gradient,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), dirty)
            assert_zero(f"gradient at {side} padding", gradient[~real])
        if side == "inner" or subject.on_grids:
            clean = mixer(x, layout=place.layout, padding=real)
            assert_same(f"outputs beside {side} padding full of garbage", out, clean)
            continue
        for row, keep in enumerate(real):
            alone = mixer(x[row : row + 1, keep])[0]
            assert_same(f"{int(keep.sum())} tokens, padded on the {side}", out[row, keep], alone)


def real_tokens(length: int, side: str) -> Tensor:
    """Boolean (3, N): True at the tokens that are not padding."""
    if side == "inner":
        return torch.rand(len(LENGTHS), length) < 0.7
    kept = torch.tensor([min(length, each) for each in LENGTHS]).unsqueeze(1)
    position = torch.arange(length)
    return position < kept if side == "right" else position >= length - kept


def neighbours(subject: Subject) -> None:
    """A sequence comes out of a batch as it does alone."""
    place = subject.places(37)[0]
    mixer, x = subject.mixer(), subject.tokens(place.length)
    out = mixer(x, layout=place.layout)
    for row in range(2):
        alone = mixer(x[row : row + 1], layout=place.layout)
        assert_same(f"sequence {row} of a batch of 2", out[row : row + 1], alone)


def fully_masked_rows(subject: Subject) -> None:
    """Rows that see no key are zero, and leave no gradient that is not finite."""
    place = subject.places(37)[0]
    mixer, x = subject.mixer(), subject.tokens(place.length).requires_grad_()
    real = torch.ones(2, place.length, dtype=torch.bool)
    real[0] = False
    out = mixer(x, layout=place.layout, padding=real)
    assert_zero("outputs of a sequence that is all padding", out[0])
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert gradient.isfinite().all(), "the gradient of a sequence that is all padding is not finite"
