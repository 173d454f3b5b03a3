"""Mixers: forward against the definition, decoding, padding and packing against sequences alone, empty batches."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import foveate as fv
from foveate.catalogue.registry import Row, rows
from foveate.mixers.base import Mixer
from foveate.testing.case import DIM, Place, Subject
from foveate.testing.closeness import reference_only
from fuzz.cases import Refused, kind
from fuzz.draw import Draw
from fuzz.judge import Judge, demand
from fuzz.settings import anything

PARAMETERS = 3  # sets of weights of each mixer
ULPS = 64.0  # sums of many kinds, in another order
GARBAGE = 1e3


@dataclass(frozen=True)
class Built:
    """A mixer in float32, and the same weights in float64."""

    subject: Subject
    low: Mixer
    exact: Mixer

    def judge(self, x: Tensor, place: Place) -> Judge:
        """Against forward of the definition."""

        def definition(x: Tensor) -> list[Tensor]:
            mixer = self.exact if x.dtype == torch.float64 else self.low
            with reference_only(), torch.no_grad():
                return [mixer(x, layout=place.layout)]

        def sizes(x: Tensor) -> list[Tensor]:
            out = definition(x)[0]
            return [out.abs() + out.abs().amax(-1, keepdim=True) + x.abs().mean()]

        return Judge(definition, [x], torch.float32, sizes, ulps=ULPS)


@lru_cache(maxsize=256)
def built(name: str, causal: bool, weights: int) -> Built:
    """From a seed of its own, so that a case is a function of its seed whatever was built before."""
    found = next(row for row in rows() if row.name == name)
    subject = Subject(found, getattr(found.mixer, "tiny", {}), causal)
    with torch.random.fork_rng():
        torch.manual_seed(weights)
        low = subject.mixer(torch.float32)
    return Built(subject, low, copy.deepcopy(low).double())


@lru_cache(maxsize=32)
def candidates(*features: str) -> tuple[str, ...]:
    return tuple(row.name for row in rows() if set(features) <= row.supports)


def drawn(draw: Draw, *features: str) -> Built:
    name = draw.one(candidates(*features))
    found = next(row for row in rows() if row.name == name)
    forms = [form == "causal" for form in ("causal", "noncausal") if form in found.supports]
    causal = True if "decode" in features else draw.one(forms)
    return built(name, causal, draw.whole(1, PARAMETERS))


def place_of(draw: Draw, subject: Subject, most: int = 40) -> Place:
    if subject.on_grids:
        return draw.one(subject.places(1))
    return Place(draw.length(most), None)


def exempt(row: Row, *properties: str) -> None:
    if set(properties) & set(getattr(row.mixer, "exempt", {})):
        raise Refused(f"{row.name} is exempt from {properties}, and says why")


def tokens(draw: Draw, batch: int, length: int) -> Tensor:
    return draw.tensor(batch, length, DIM, dtype=torch.float32, contents=draw.one(("normal",) * 6 + ("sparse",)))


@kind("mixer", 2)
def forward(draw: Draw) -> None:
    found = drawn(draw)
    place = place_of(draw, found.subject)
    x = tokens(draw, draw.batch(), place.length)
    with torch.no_grad(), anything(draw, devices=False):
        out = found.low(draw.placed(x), layout=place.layout)
    demand(out.dtype == x.dtype, f"{found.low.row.name} gives {out.dtype}")
    demand(out.shape == x.shape, f"{found.low.row.name} gives {tuple(out.shape)} for {tuple(x.shape)}")
    if x.numel():
        found.judge(x, place)([f"{found.low.row.name} (causal={found.low.causal})"], [out])


@kind("mixer_backward", 0.6)
def backward(draw: Draw) -> None:
    """Gradients of the input, in float64: those of the definition."""
    found = drawn(draw)
    place = place_of(draw, found.subject, 17)
    x = tokens(draw, draw.one((1, 1, 2)), max(1, place.length)).double()
    towards = draw.normal(*x.shape)

    def gradient(of: Mixer, x: Tensor, towards: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(of(x, layout=place.layout), x, towards)
        return grad

    def definition(x: Tensor, towards: Tensor) -> list[Tensor]:
        with reference_only():
            return [gradient(found.exact if x.dtype == torch.float64 else found.low, x, towards)]

    with anything(draw, devices=False):
        grad = gradient(found.low, x.float(), towards.float())
    size = lambda x, towards: [definition(x, towards)[0].abs().amax().expand(x.shape)]  # noqa: E731
    judge = Judge(definition, [x.float(), towards.float()], torch.float32, size, ulps=4 * ULPS)
    judge([f"gradient of {found.low.row.name}'s input"], [grad])


@kind("mixer_decode", 1)
def decode(draw: Draw) -> None:
    """Token by token, after a prompt where the mixer takes one at once."""
    found = drawn(draw, "decode")
    exempt(found.low.row, "decode", "prefill in chunks")
    length = draw.whole(1, 12)
    x = tokens(draw, draw.one((1, 2, 3)), length)
    mixer: Any = found.low
    with torch.no_grad(), anything(draw, devices=False):
        state, outs, first = mixer.init_state(x.shape[0], draw.one((None, draw.whole(0, length)))), [], 0
        if draw.chance(0.5):
            first = draw.whole(0, length - 1)
            out, state = mixer.prefill(x[:, :first], state)
            outs.append(out)
        for t in range(first, length):
            out, state = mixer.decode(draw.placed(x[:, t : t + 1]), state)
            outs.append(out)
    found.judge(x, Place(length, None))([f"{mixer.row.name} step by step"], [torch.cat(outs, 1)])


@kind("mixer_padding", 1)
def padding(draw: Draw) -> None:
    """Each sequence of a padded batch, as it comes out alone."""
    found = drawn(draw, "padding")
    place = place_of(draw, found.subject, 33)
    batch, name = draw.one((1, 2, 3)), found.low.row.name
    x = tokens(draw, batch, place.length)
    position, side = torch.arange(place.length), draw.one(("right", "left"))
    kept = torch.tensor([draw.whole(0, place.length) for _ in range(batch)]).unsqueeze(1)
    real = position < kept if side == "right" else position >= place.length - kept
    dirty = torch.where(real.unsqueeze(-1), x, draw.one((GARBAGE, float("nan"))))
    with torch.no_grad(), anything(draw, devices=False):
        out = found.low(draw.placed(dirty), layout=place.layout, padding=draw.placed(real))
    demand(bool((out[~real] == 0).all()), f"{name}: rows of padding are not zeros")
    if found.subject.on_grids:
        demand(bool(out.isfinite().all()), f"{name}: padding on the {side} makes others not finite")
        return
    for row, keep in enumerate(real):
        if bool(keep.any()):
            alone = x[row : row + 1, keep]
            judge = found.judge(alone, Place(alone.shape[1], None))
            judge(
                [f"{name}, {alone.shape[1]} of {place.length} tokens, padded on the {side}"], [out[row : row + 1, keep]]
            )


@kind("mixer_packed", 1)
def packed(draw: Draw) -> None:
    """Each document of a pack, as it comes out alone."""
    found = drawn(draw, "packed")
    length = draw.length(33)
    lengths = draw.split(length)
    x = tokens(draw, 1, length)
    with torch.no_grad(), anything(draw, devices=False):
        out = found.low(draw.placed(x), layout=fv.Packed(lengths))
    pieces = zip(x.split(lengths, 1), out.split(lengths, 1), strict=True)
    for number, (document, got) in enumerate(pieces):
        if document.shape[1]:
            judge = found.judge(document, Place(document.shape[1], None))
            judge([f"{found.low.row.name}, document {number} of {lengths}"], [got])
