"""What commands share: where they print, and how a mistake becomes one sentence."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from foveate.catalogue.papers import Reference

FAILED, BAD_INPUT, STOPPED = 1, 2, 130
NARROWEST = 20  # columns of a terminal
PACKAGE = Path(__file__).parents[1]


def out() -> Console:
    """Standard output, wide enough for a table where it is no terminal, or where COLUMNS makes no sense."""
    asked = os.environ.get("COLUMNS", "")
    wide = int(asked) >= NARROWEST if asked.isdecimal() else not asked and sys.stdout.isatty()
    return Console(width=None if wide else 120)


def say(sentence: str) -> None:
    """One line on standard output, whatever is in it: no markup, no colours, no breaks."""
    out().print(Text(printable(sentence)), soft_wrap=True, highlight=False)


def complain(sentence: str) -> None:
    """One red sentence on standard error."""
    Console(stderr=True).print(Text(printable(sentence), style="red"), soft_wrap=True, highlight=False)


def printable(said: str) -> str:
    """Text as a terminal can take it: on one line, without control signs, and names of files that are not UTF-8.

    >>> printable("a\\nb \\x1b[31m \\udcff")
    'a b ?[31m \ufffd'
    """
    whole = said.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    joined = " ".join(line.strip() for line in whole.splitlines() if line.strip())
    return "".join(sign if sign.isprintable() else "?" for sign in joined)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Inside, wrong input ends the command with a sentence and status 2 (FOVEATE_DEBUG=1: a traceback)."""
    try:
        yield
    except (BrokenPipeError, typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if os.environ.get("FOVEATE_DEBUG", "0") not in ("", "0") or _from_typer(error):
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


def _from_typer(error: Exception) -> bool:
    """Whether it is a mistake in how a command was called, which typer tells of with the command's usage."""
    return any(kind.__module__.startswith(("click.", "typer.")) for kind in type(error).__mro__)


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error):
        return "There is not enough memory for that: ask for less, as with --length or --batch"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"There is no file {_named(error.filename)}"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{_named(error.filename)} cannot be used: {error.strerror}"
    words = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}; FOVEATE_DEBUG=1 shows where"
    if isinstance(error, OSError) and words.endswith("written"):  # numpy's words for it
        return f"There is no room left to write to ({words})"
    return words if _is_ours(error) else f"{words} ({type(error).__name__}; FOVEATE_DEBUG=1 shows where)"


def _named(file: object) -> str:
    return os.fsdecode(file) if isinstance(file, (str, bytes, os.PathLike)) else str(file)


def _is_ours(error: Exception) -> bool:
    """Whether the error was raised by this package, and so is written for its users."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and PACKAGE in Path(trace.tb_frame.f_code.co_filename).parents


def cited(source: Reference) -> str:
    """A paper in lines: authors and title, and where to read it."""
    return "\n  ".join(filter(None, (", ".join(filter(None, (source.authors, source.title))), source.url)))
