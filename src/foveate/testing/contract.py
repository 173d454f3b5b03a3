"""Properties of a good citizen: wrong input is refused in words, costs are told truthfully."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from foveate.mixers.base import Mixer
from foveate.patterns import Grid, Packed
from foveate.testing.case import DIM, Place, Subject

REFUSAL = (ValueError, TypeError, NotImplementedError)


def refusals(subject: Subject) -> None:
    """What it cannot take is refused by ValueError, TypeError or NotImplementedError, with a message."""
    wrongs = []
    for what, call in wrong_calls(subject):
        try:
            call()
            wrongs.append(f"{what} is accepted")
        except REFUSAL as refusal:
            if not str(refusal):
                wrongs.append(f"{what} is refused without a word")
        except Exception as crash:
            wrongs.append(f"{what} raises {type(crash).__name__}: {crash}")
    assert not wrongs, "; ".join(wrongs)


def wrong_calls(subject: Subject) -> Iterator[tuple[str, Callable[[], Any]]]:
    place = subject.places(37)[0]
    mixer, x, layout = subject.mixer(), subject.tokens(place.length), place.layout
    yield "a width of 0", lambda: subject.row.mixer(0, **subject.arguments)
    yield "x of another width", lambda: mixer(x[..., 1:], layout=layout)
    yield "x without a batch", lambda: mixer(x[0], layout=layout)
    yield "padding of floats", lambda: mixer(x, layout=layout, padding=torch.ones(x.shape[:2]))
    short = torch.ones(2, place.length - 1, dtype=torch.bool)
    yield "padding of another length", lambda: mixer(x, layout=layout, padding=short)
    yield "a layout of another length", lambda: mixer(x, layout=Packed([place.length + 1]))
    if not subject.can("padding"):
        yield "padding", lambda: mixer(x, layout=layout, padding=torch.ones(x.shape[:2], dtype=torch.bool))
    if not subject.can("packed"):
        yield "a packed layout", lambda: mixer(x, layout=Packed([place.length]))
    if not subject.can("grid"):
        yield "a grid", lambda: mixer(x, layout=Grid(1, place.length))
    if subject.causal or not subject.can("cross"):
        yield "a context", lambda: mixer(x, context=x)
    if not (subject.causal and subject.can("decode")):
        yield "decoding", lambda: mixer.start(1)


def costs(subject: Subject) -> None:
    """flops counts at least the linear layers and grows with n; state_bytes is what the state takes."""
    places = sorted(subject.places(9, 37, 65), key=lambda place: place.length)
    mixer = subject.mixer(torch.float32)
    told = [checked_count("flops", place.length, mixer.flops(place.length)) for place in places]
    assert told == sorted(told), f"flops falls as n grows over {[p.length for p in places]}: {told}"
    for place, flops in zip(places, told, strict=True):
        least = linear_flops(mixer, subject, place)
        assert flops >= least, f"flops({place.length}) is {flops}, its linear layers alone take {least}"
    if subject.causal and subject.can("decode") and not subject.on_grids:
        _state_bytes(mixer, subject)


def _state_bytes(mixer: Mixer, subject: Subject) -> None:
    state, x = mixer.start(1), subject.tokens(37, batch=1).float()
    for n in range(1, 38):
        state = mixer.step(x[:, n - 1 : n], state).state
        if n in (1, 9, 37):
            told, taken = checked_count("state_bytes", n, mixer.state_bytes(n)), bytes_of(state)
            assert told == taken, f"state_bytes({n}) is {told}, the state takes {taken}"


def checked_count(what: str, n: int, value: Any) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    assert whole and value > 0, f"{what}({n}) is {value!r}, not a positive whole number"
    return value


def linear_flops(mixer: Mixer, subject: Subject, place: Place) -> int:
    """Floating-point operations of the linear layers that forward runs on one sequence."""
    counted = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        counted.append(2 * inputs[0].numel() * out.shape[-1])

    hooks = [m.register_forward_hook(count) for m in mixer.modules() if isinstance(m, nn.Linear)]
    mixer(torch.randn(1, place.length, DIM), layout=place.layout)
    for hook in hooks:
        hook.remove()
    return sum(counted)


def bytes_of(state: Any) -> int:
    """Bytes of a state's tensors; whole numbers of 64 bits and booleans are bookkeeping and do not count."""
    if isinstance(state, Tensor):
        return 0 if state.dtype in (torch.int64, torch.bool) else state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(bytes_of, state.values()))
    if isinstance(state, (list, tuple)):
        return sum(map(bytes_of, state))
    return sum(map(bytes_of, vars(state).values())) if hasattr(state, "__dict__") else 0
