"""The native kernels of this process: which library, and how many threads for it.

FOVEATE_ISA=avx2      use this variant and no other; `none`: use no native kernels
FOVEATE_NO_JIT=1      compile nothing at first use
FOVEATE_SANITIZE=1    kernels that check every access (Python must then run with libasan preloaded)
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import threading

import torch  # before a library is opened, which then shares PyTorch's OpenMP threads

from foveate.kernels.cpu.fork import threads_lost
from foveate.kernels.cpu.search import Loaded, Places, Status, search

__all__ = ["Status", "library", "num_threads", "status"]

FORKED = "one thread: this process was forked off one whose OpenMP threads are not here"

_loaded: Loaded | None = None
_lock = threading.Lock()


def library() -> ctypes.CDLL | None:
    """The kernels for this machine, found or compiled at the first call; None if there are none to be had.

    >>> (library() is None) == (status().isa is None)
    True
    """
    return (_loaded or _load()).library


def status() -> Status:
    """Which library `library()` gives and where it came from, or why there is none; and why not a better one.

    >>> status().origin in ("package", "cache", "compiled", None)
    True
    """
    found = (_loaded or _load()).status
    return dataclasses.replace(found, cautions=(*found.cautions, FORKED)) if threads_lost() else found


def num_threads() -> int:
    """Threads for a call of the library, at most: PyTorch's, but one in a process forked from one that had threads.

    OpenMP's threads do not survive a fork: whoever waits for them waits for ever.

    >>> 1 <= num_threads() <= torch.get_num_threads()
    True
    """
    return 1 if threads_lost() else torch.get_num_threads()


def _load() -> Loaded:
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = search(Places())
        return _loaded


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
