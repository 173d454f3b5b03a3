"""What commands share: where they print, and how a mistake becomes one sentence."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

EXPECTED = (ValueError, TypeError, NotImplementedError, ImportError, OSError)
FAILED, BAD_INPUT, STOPPED = 1, 2, 130
PACKAGE = Path(__file__).parents[1]


def out() -> Console:
    """Standard output, wide enough for a table where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


def complain(sentence: str) -> None:
    """One red sentence on standard error."""
    Console(stderr=True).print(Text(sentence, style="red"), soft_wrap=True)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Inside, wrong input ends the command with a sentence and status 2 (FOVEATE_DEBUG=1: a traceback)."""
    try:
        yield
    except BrokenPipeError:
        raise
    except EXPECTED as error:
        if os.environ.get("FOVEATE_DEBUG"):
            raise
        complain(_sentence(error))
        raise typer.Exit(BAD_INPUT) from None


@contextmanager
def keeping(what: str) -> Iterator[None]:
    """Inside, Ctrl-C ends the command with status 130, saying what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        complain(f"Stopped. {what}")
        raise typer.Exit(STOPPED) from None


def _sentence(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"There is no file {error.filename}"
    words = str(error) or type(error).__name__
    return words if _is_ours(error) else f"{words} ({type(error).__name__}; FOVEATE_DEBUG=1 shows where)"


def _is_ours(error: Exception) -> bool:
    """Whether the error was raised by this package, and so is written for its users."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and PACKAGE in Path(trace.tb_frame.f_code.co_filename).parents
