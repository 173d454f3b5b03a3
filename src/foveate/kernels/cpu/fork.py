"""Whether OpenMP's threads may have been lost in a fork.

They do not survive one: whoever waits for them in the child waits for ever. This module is imported before PyTorch is
wherever that can be had, so that it sees forks; it needs nothing but Python.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

SELF = Path("/proc/self")
FORKED_WITHOUT_EXEC = 0x40  # PF_FORKNOEXEC of Linux

_torch_was_first = "torch" in sys.modules
_parent_has_threads = False


def threads_lost() -> bool:
    """Whether this process was forked off another whose OpenMP threads, if it had started any, are not here.

    >>> threads_lost()
    False
    """
    return _lost


def _before() -> None:
    global _parent_has_threads
    _parent_has_threads = _num_threads() != 1


def _in_child() -> None:
    global _lost
    _lost = _lost or _parent_has_threads


def _num_threads() -> int | None:
    """Of this process, those of libraries too; None where that cannot be told."""
    try:
        return len(os.listdir(SELF / "task"))
    except OSError:
        return None


def _was_forked() -> bool:
    """Whether this process still runs what its parent ran: before this module could see a fork."""
    try:
        flags = (SELF / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[6]
    except (OSError, IndexError):
        return False
    return bool(int(flags) & FORKED_WITHOUT_EXEC)


# Where PyTorch was imported before, and this process is a fork, its parent may have computed already.
_lost = _torch_was_first and _was_forked()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_child=_in_child)
