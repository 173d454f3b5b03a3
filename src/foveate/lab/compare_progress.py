"""Progress bars of `foveate compare`."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Steps:
    """One bar over all contenders, whose text names the one at work."""

    def __init__(self, progress: Progress, contenders: int, ticks: int) -> None:
        self._progress, self._ticks, self._ticked = progress, ticks, 0
        self._task = progress.add_task("getting ready", total=contenders * ticks)

    def start(self, name: str) -> None:
        """Say who is measured now."""
        self._ticked = 0
        self._progress.update(self._task, description=name)

    def tick(self) -> None:
        self._ticked += 1
        self._progress.advance(self._task)

    def done(self) -> None:
        """Close the contender, whether all its steps were taken or not."""
        self._progress.advance(self._task, self._ticks - self._ticked)


@contextmanager
def steps(contenders: Sized, ticks: int, *, show: bool) -> Iterator[Steps]:
    """Bars on standard error for these contenders and exact attention."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as progress:
        yield Steps(progress, len(contenders) + 1, ticks)
