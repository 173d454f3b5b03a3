"""Progress of `foveate compare`."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import contextmanager

from foveate.lab.progress import Bar, bar


class Steps:
    """One bar over all contenders, whose text names the one at work."""

    def __init__(self, shown: Bar, contenders: int, ticks: int) -> None:
        self._bar, self._total, self._ticks = shown, contenders * ticks, ticks
        self._before, self._ticked, self._name = 0, 0, "getting ready"

    def start(self, name: str) -> None:
        """Say who is measured now."""
        self._ticked, self._name = 0, name
        self._show()

    def tick(self) -> None:
        self._ticked += 1
        self._show()

    def done(self) -> None:
        """Close the contender, whether all its steps were taken or not."""
        self._before, self._ticked = self._before + self._ticks, 0
        self._show()

    def _show(self) -> None:
        self._bar.update((self._before + self._ticked) / self._total, self._name)


@contextmanager
def steps(contenders: Sized, ticks: int, *, show: bool) -> Iterator[Steps]:
    """Progress over these contenders and exact attention."""
    with bar(show=show) as shown:
        yield Steps(shown, len(contenders) + 1, ticks)
