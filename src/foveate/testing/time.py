"""Properties of time: no future, one token at a time, piece by piece, document by document."""

from __future__ import annotations

import torch

from foveate.patterns import Packed
from foveate.testing.case import Subject
from foveate.testing.closeness import assert_same, assert_zero
from foveate.testing.report import Skip


def causality(subject: Subject) -> None:
    """Outputs before token t do not change with it."""
    place = subject.places(65)[0]
    mixer, x = subject.mixer(), subject.tokens(place.length)
    out = mixer(x, layout=place.layout)
    for cut in cuts(place.length):
        changed = torch.cat([x[:, :cut], 3 * torch.randn_like(x[:, cut:])], dim=1)
        moved = mixer(changed, layout=place.layout)[:, :cut]
        assert_same(f"outputs before token {cut}, which changed", moved, out[:, :cut])


def blind_gradients(subject: Subject) -> None:
    """Outputs before token t have no gradient to it."""
    place = subject.places(65)[0]
    mixer, x = subject.mixer(), subject.tokens(place.length).requires_grad_()
    out = mixer(x, layout=place.layout)
    for cut in cuts(place.length):
        (gradient,) = torch.autograd.grad(out[:, :cut].square().sum(), x, retain_graph=True)
        assert_zero(f"gradient from outputs before token {cut} to it and later ones", gradient[:, cut:])


def cuts(length: int) -> list[int]:
    """Three places to cut a sequence in two."""
    return torch.randint(1, length, (3,)).tolist()


def stepping(subject: Subject) -> None:
    """Token by token equals the whole sequence."""
    place = subject.places(37)[0]
    mixer, x = subject.mixer(), subject.tokens(place.length)
    whole, state = mixer(x, layout=place.layout), mixer.start(x.shape[0])
    for t in range(place.length):
        out, state = mixer.step(x[:, t : t + 1], state)
        assert_same(f"step {t}", out, whole[:, t : t + 1], 1e-8)


def chunks(subject: Subject) -> None:
    """A sequence handed over in pieces, with the state between them, equals the whole."""
    mixer = subject.mixer()
    advance = getattr(mixer, "advance", None)
    if advance is None:
        raise Skip("it has no advance(x, state), step for several tokens at once")
    x, state, outs = subject.tokens(69), mixer.start(2), []
    for piece in x.split([1, 0, 37, 2, 29], dim=1):
        out, state = advance(piece, state)
        outs.append(out)
    assert_same("outputs in pieces", torch.cat(outs, dim=1), mixer(x), 1e-8)


def packed(subject: Subject) -> None:
    """Documents laid end to end equal each document on its own."""
    mixer, lengths = subject.mixer(), [3, 0, 36, 1, 25]
    x = subject.tokens(sum(lengths), batch=1)
    out = mixer(x, layout=Packed(lengths))
    pieces = zip(x.split(lengths, dim=1), out.split(lengths, dim=1), strict=True)
    for number, (document, got) in enumerate(pieces):
        if document.shape[1]:
            assert_same(f"document {number} of {lengths}", got, mixer(document))
