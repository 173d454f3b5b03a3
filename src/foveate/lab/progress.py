"""How far a long run is: a bar in a terminal, elsewhere a plain line every few seconds; on standard error."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

EVERY_SECONDS = 5.0  # between plain lines


class Bar:
    """What is done of a run, 0 to 1, and a note on what is at work."""

    def __init__(self) -> None:
        self.done, self.note = 0.0, "getting ready"

    def update(self, done: float, note: str) -> None:
        self.done, self.note = done, note


class TerminalBar(Bar):
    """A bar that a terminal draws over and over."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self._task = progress.add_task(self.note, total=1.0)

    def update(self, done: float, note: str) -> None:
        super().update(done, note)
        self._progress.update(self._task, completed=done, description=note)


@contextmanager
def bar(*, show: bool = True) -> Iterator[Bar]:
    """A bar to update; one that nobody sees with ``show=False``."""
    console = Console(stderr=True)
    if not show:
        yield Bar()
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            yield TerminalBar(progress)
    else:
        with _lines(Bar()) as plain:
            yield plain


@contextmanager
def _lines(plain: Bar) -> Iterator[Bar]:
    """Says now and then, from a thread of its own, how far the bar is: one step may take long."""
    began, over = time.monotonic(), threading.Event()

    def say() -> None:
        while not over.wait(EVERY_SECONDS):
            print(in_words(plain.done, time.monotonic() - began, plain.note), file=sys.stderr, flush=True)

    speaker = threading.Thread(target=say, daemon=True)
    speaker.start()
    try:
        yield plain
    finally:
        over.set()
        speaker.join()


def in_words(done: float, seconds: float, note: str) -> str:
    """One line of plain progress.

    >>> in_words(0.25, 75.0, "streaming_llm")
    ' 25%  1:15  streaming_llm'
    """
    return f"{done:4.0%}  {int(seconds) // 60}:{int(seconds) % 60:02}  {note}"
