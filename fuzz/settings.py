"""What a process may have set before a call: default dtype, default device, threads, inference mode, a threshold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from foveate.attention.impl.native import KEYS_OF_VISIT
from fuzz.cases import Refused
from fuzz.draw import Draw

USUAL = 0.8  # share of calls in an untouched process
GATHERED = 0.1  # share of those that gather the queries of a block wherever they can, as long calls do


@contextmanager
def anything(draw: Draw, *, devices: bool = True) -> Iterator[str]:
    """A setting that no result may depend on, undone afterwards.

    Without ``devices`` a call may fail, though in no other way, where another default device is set: what is made of
    many torch operators makes some of its tensors on the default device.
    """
    kind = "gathered" if draw.chance(GATHERED) else "usual"
    if kind == "usual" and not draw.chance(USUAL):
        kind = draw.one(("bfloat16", "float16", "float64", "meta", "threads", "inference"))
    if kind in ("bfloat16", "float16", "float64"):
        torch.set_default_dtype(getattr(torch, kind))
        try:
            yield kind
        finally:
            torch.set_default_dtype(torch.float32)
    elif kind == "meta":
        try:
            with torch.device("meta"):
                yield kind
        except (RuntimeError, ValueError, TypeError) as reason:
            if devices:
                raise
            raise Refused(str(reason)) from None
    elif kind == "threads":
        before = torch.get_num_threads()
        torch.set_num_threads(draw.whole(2, 3))
        try:
            yield kind
        finally:
            torch.set_num_threads(before)
    elif kind == "gathered":
        with mock.patch.dict(KEYS_OF_VISIT, dict.fromkeys(KEYS_OF_VISIT, 1)):
            yield kind
    elif kind == "inference" and not torch.is_grad_enabled():
        with torch.inference_mode():
            yield kind
    else:
        yield kind
