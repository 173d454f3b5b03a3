"""Kernels under the address and undefined-behaviour sanitizers: building them, and what workers then need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from foveate.kernels.cpu.compiler import find_compiler
from foveate.kernels.cpu.processor import lacks
from foveate.kernels.cpu.variants import VARIANTS

RUNTIMES = ("libasan.so", "libstdc++.so")


def environment(usual: dict[str, str]) -> dict[str, str]:
    """Compile the kernels with checks, and return the environment in which they are loaded."""
    runnable = [variant.name for variant in VARIANTS if lacks(variant) is None]
    if not runnable:
        raise SystemExit("there are no native kernels for this processor: nothing to sanitize")
    isa = usual.get("FOVEATE_ISA") or runnable[0]
    # Compiled before the sanitizers are in the process: the compiler would carry them too.
    build = [sys.executable, "-m", "foveate.kernels.cpu.build", "--isa", isa, "--sanitize"]
    subprocess.run(build, check=True, env=usual, stdout=subprocess.DEVNULL)
    switches = {"FOVEATE_SANITIZE": "1", "FOVEATE_ISA": isa, "ASAN_OPTIONS": "detect_leaks=0"}
    return usual | switches | {"LD_PRELOAD": " ".join(map(str, runtimes()))}


def runtimes() -> list[Path]:
    """What must be in a process before Python is: the sanitizers', and what they hook into."""
    compiler = find_compiler()
    paths = [Path(_said(*compiler.command, f"-print-file-name={name}")) for name in RUNTIMES]
    if not all(path.is_absolute() for path in paths):
        raise SystemExit("the compiler here has no address sanitizer")
    return paths


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
