"""Properties that tie a mechanism to attention: its full budget, shared keys, another context."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.mixers.attention import AttentionMixer
from foveate.mixers.base import Mixer, join_heads
from foveate.mixers.core import PatternCore
from foveate.patterns import Layout
from foveate.testing.case import HEADS, Subject
from foveate.testing.closeness import assert_same, reference_only
from foveate.testing.report import Skip

KV_HEADS = 2


def full_budget(subject: Subject) -> None:
    """With nothing left out, it is plain attention."""
    options = subject.row.mixer.full_budget  # type: ignore[attr-defined]
    if options is None:
        raise Skip("no options make it plain attention")
    for place in subject.places(37):
        mixer, x = subject.with_options(**options).mixer(), subject.tokens(place.length)
        assert_same(f"{place.length} tokens", mixer(x, layout=place.layout), exact(mixer, x, place.layout), 1e-8)


def exact(mixer: Mixer, x: Tensor, layout: Layout | None) -> Tensor:
    """Attention to everything that causality allows, with the mixer's own projections."""
    own: Callable[[Tensor, Layout | None], Tensor] | None = getattr(mixer, "exact", None)
    if own is not None:
        return own(x, layout)
    if not isinstance(mixer, AttentionMixer):
        raise Skip("it is no AttentionMixer and has no exact(x, layout), its formula with nothing left out")
    q, k, v = mixer.project(x, x)
    allowed, weights = mixer.within(None), mixer.weights(x.shape[1])
    with reference_only():
        heads = PatternCore()(q, k, v, within=allowed, bias=mixer.bias(), weights=weights, layout=layout)
    return mixer.to_out(join_heads(heads))


def shared_keys(subject: Subject) -> None:
    """Key and value heads shared by several query heads equal the same heads repeated."""
    place = subject.places(37)[0]
    few = subject.with_options(kv_heads=KV_HEADS).mixer()
    many = subject.with_options(kv_heads=HEADS).mixer()
    theirs = few.state_dict()
    many.load_state_dict({name: repeated(name, theirs[name], into) for name, into in many.state_dict().items()})
    x = subject.tokens(place.length)
    assert_same("outputs", few(x, layout=place.layout), many(x, layout=place.layout))


def repeated(name: str, parameter: Tensor, into: Tensor) -> Tensor:
    """A parameter of few key heads as it is for as many key heads as query heads."""
    grown = [axis for axis in range(into.dim()) if into.shape[axis] != parameter.shape[axis]]
    if not grown:
        return parameter
    assert len(grown) == 1, f"{name} goes from {tuple(parameter.shape)} to {tuple(into.shape)} with its key heads"
    by_head = parameter.unflatten(grown[0], (KV_HEADS, -1))
    return by_head.repeat_interleave(HEADS // KV_HEADS, dim=grown[0]).flatten(grown[0], grown[0] + 1)


def cross(subject: Subject) -> None:
    """A context of another length is read as the definition says, and only its real tokens."""
    mixer, x, context = subject.mixer(), subject.tokens(23), subject.tokens(37)
    with reference_only():
        expected = mixer(x, context=context)
    assert_same("outputs", mixer(x, context=context), expected)
    if not subject.can("padding"):
        return
    real = torch.arange(37).expand(2, -1) < 19
    dirty = context + 1e3 * torch.randn_like(context) * ~real.unsqueeze(-1)
    padded = mixer(x, context=dirty, padding=real)
    assert_same("outputs beside padding in the context", padded, mixer(x, context=context[:, :19]))
    nothing = mixer(x, context=dirty, padding=torch.zeros_like(real))
    assert nothing.isfinite().all(), "a context that is all padding gives outputs that are not finite"
