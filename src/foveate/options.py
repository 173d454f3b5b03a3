"""Choices that hold for every operator inside a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Forced:
    """The implementation that stands in for "auto", if any.

    A plain attribute, since torch.compile guards on it: it cannot trace a ContextVar, and does not notice
    that a threading.local has changed.
    """

    name: str | None = None

    def get(self) -> str | None:
        return self.name


FORCED = Forced()


@contextmanager
def forced_impl(name: str) -> Iterator[None]:
    """Make ``impl="auto"`` mean ``impl=name`` in every operator of the process until the block ends.

    >>> import torch
    >>> from foveate import attend
    >>> q = k = v = torch.randn(1, 2, 5, 8)
    >>> with forced_impl("reference"):
    ...     attend(q, k, v).shape
    torch.Size([1, 2, 5, 8])

    An operator that does not know the name, or whose implementation cannot run the call, says so as it would
    for ``impl=name``.
    """
    before, FORCED.name = FORCED.name, name
    try:
        yield
    finally:
        FORCED.name = before
