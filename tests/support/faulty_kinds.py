"""Kinds of cases that go wrong in every way, and a worker that runs them: ``python faulty_kinds.py PLAN BOARD``."""

from __future__ import annotations

import ctypes
import sys
import time

from fuzz.cases import Refused, kind
from fuzz.draw import Draw
from fuzz.judge import demand

EVERY = 3  # one case in so many goes wrong


def goes_wrong(draw: Draw) -> bool:
    return draw.whole(1, EVERY) == 1


@kind("falls", 1)
def falls(draw: Draw) -> None:
    if goes_wrong(draw):
        ctypes.string_at(0)


@kind("sleeps", 1)
def sleeps(draw: Draw) -> None:
    if goes_wrong(draw):
        time.sleep(60)


@kind("differs", 1)
def differs(draw: Draw) -> None:
    demand(not goes_wrong(draw), "one is not two")


@kind("raises", 1)
def raises(draw: Draw) -> None:
    if goes_wrong(draw):
        raise KeyError("nobody caught this")


@kind("refuses", 1)
def refuses(draw: Draw) -> None:
    if goes_wrong(draw):
        raise Refused("not this one")


if __name__ == "__main__":
    from fuzz import worker

    worker.load = dict  # type: ignore[assignment]  # nothing else
    worker.main(*sys.argv[1:])
