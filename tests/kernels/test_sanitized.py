"""The native kernels with every access and operation checked, under the tests that run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from foveate.kernels.cpu.compiler import CannotCompile, find_compiler
from foveate.kernels.cpu.processor import lacks
from foveate.kernels.cpu.variants import SOURCES, VARIANTS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
APART = {f"test_{name}.py" for name in ("build", "neon", "sanitized")}
KERNEL_TESTS = [path for path in sorted(HERE.glob("test_*.py")) if path.name not in APART]
RUNNABLE = [variant.name for variant in VARIANTS if lacks(variant) is None]
FAULTY = """
#include <cstdlib>
extern "C" __attribute__((visibility("default"))) int fault(int kind) {
    volatile int* number = (int*)std::malloc(sizeof(int));
    *number = 2147483647;
    const int next = kind == 1 ? *number + kind : 0;
    std::free((void*)number);
    if (kind == 2) *number = kind;
    return next;
}
"""
LOAD = """
import sys
from pathlib import Path
from foveate.kernels.cpu.search import Places, search
library = search(Places(Path(sys.argv[1]), Path(sys.argv[1]))).library
sys.exit(library.fault(int(sys.argv[2])))
"""


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def runtimes() -> str | None:
    """What must be in a process before Python is: the sanitizers', and what they hook into; None if it is not here."""
    try:
        compiler = find_compiler()
    except CannotCompile:
        return None
    paths = [said(*compiler.command, f"-print-file-name={name}") for name in ("libasan.so", "libstdc++.so")]
    return " ".join(paths) if all(Path(path).is_absolute() for path in paths) else None


def sanitized(*command: str, isa: str) -> subprocess.CompletedProcess[str]:
    switches = {"FOVEATE_SANITIZE": "1", "FOVEATE_ISA": isa, "ASAN_OPTIONS": "detect_leaks=0"}
    environment = os.environ | switches | {"LD_PRELOAD": str(runtimes()), "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)


pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not RUNNABLE, reason="there are no native kernels for this processor"),
    pytest.mark.skipif(runtimes() is None, reason="the compiler here has no address sanitizer"),
]


@pytest.mark.parametrize("isa", sorted({*RUNNABLE[:1], *RUNNABLE[-1:]}))
def test_the_kernels_touch_nothing_they_should_not(isa: str) -> None:
    # Compiled before the sanitizers are in the process: the compiler would carry them too.
    build = [sys.executable, "-m", "foveate.kernels.cpu.build", "--isa", isa, "--sanitize"]
    built = subprocess.run(build, cwd=ROOT / "src", capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    run = sanitized("-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, KERNEL_TESTS), isa=isa)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-8000:]
    assert " passed" in run.stdout


def test_faults_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "version.cpp").write_bytes((SOURCES / "version.cpp").read_bytes())
    (tmp_path / "faulty.cpp").write_text(FAULTY, encoding="utf-8")
    fine, overflow, freed = (sanitized("-c", LOAD, str(tmp_path), str(kind), isa=RUNNABLE[0]) for kind in range(3))
    assert fine.returncode == 0, fine.stderr
    assert "signed integer overflow" in overflow.stderr
    assert "heap-use-after-free" in freed.stderr
