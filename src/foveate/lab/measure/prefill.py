"""Time and memory of a prefill."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from foveate.lab.compare.results import Memory, Spread, Timing

Run = Callable[[], None]
Arm = Callable[[], AbstractContextManager[object]]  # entered, untimed, around each run


def compare_times(
    length: int,
    exact: Arm,
    other: Arm,
    run: Run,
    repeats: int,
    tick: Run = lambda: None,
    *,
    warm: bool = False,
) -> Timing:
    """Time a run under two arms by turns; neighbours in time are compared.

    Each is run once unmeasured before, unless both are ``warm`` already. A run must not return before its work is
    done: on a GPU it waits for the device.
    """
    for arm in () if warm else (exact, other):
        _seconds(arm, run)
    pairs: list[tuple[float, float]] = []
    for repeat in range(repeats):
        if repeat % 2:
            theirs = _seconds(other, run)
            pairs.append((_seconds(exact, run), theirs))
        else:
            pairs.append((_seconds(exact, run), _seconds(other, run)))
        tick()
    speedups = Spread.of([ours / theirs for ours, theirs in pairs])
    return Timing(length, Spread.of([t for _, t in pairs]), Spread.of([t for t, _ in pairs]), speedups)


def _seconds(arm: Arm, run: Run) -> float:
    with arm():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


def peak_memory(run: Run, device: torch.device | None = None) -> Memory:
    """Peak memory of the process while it runs, less what it held before: a GPU's own, else resident memory."""
    if device is not None and device.type == "cuda":
        return _peak_on_gpu(run, device)
    _give_back_freed_memory()
    if _reset_high_water():
        before = _status("VmRSS")
        run()
        return Memory(max(0, _status("VmHWM") - before), "high-water mark of resident memory")
    if Path("/proc/self/statm").exists():
        return Memory(_sampled_peak(run), "resident memory, sampled every millisecond")
    run()
    return Memory(None, f"not measured on {sys.platform}")


def _peak_on_gpu(run: Run, device: torch.device) -> Memory:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return Memory(torch.cuda.max_memory_allocated(device) - before, "memory that torch allocated on the GPU")


def _give_back_freed_memory() -> None:
    """Have glibc return freed memory, or the peak would hide in memory that only looks taken."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmHWM") > 0
    except OSError:
        return False


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes; 0 where it is missing."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _sampled_peak(run: Run) -> int:
    peak = before = _status("VmRSS")
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _status("VmRSS"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peak - before
