"""The C++ compiler: which one there is, which flags it takes, and what it makes."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

PROBE = """
#include <omp.h>
typedef int Four __attribute__((vector_size(16)));
extern "C" int probe(void) {
    const Four swapped = __builtin_shufflevector(Four{}, Four{}, 1, 0, 3, 2);
    return swapped[0] + omp_get_max_threads();
}
"""
USUAL = ("g++", "c++", "clang++")


class CannotCompile(Exception):
    """Why nothing came of compiling, in one line; `output` holds all that the compiler said."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


@dataclass(frozen=True)
class Compiler:
    """A command that compiles C++, and what it calls itself."""

    command: tuple[str, ...]
    version: str

    def probe(self, flags: Iterable[str]) -> None:
        """Raise CannotCompile if it refuses these flags."""
        with TemporaryDirectory(prefix="foveate-") as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(PROBE, encoding="utf-8")
            _run([*self.command, *flags, "-shared", str(source), "-o", str(source.with_suffix(".so"))])

    def compile(self, flags: Iterable[str], source: Path, name: str) -> Path:
        """Make an object of one source, beside it."""
        _run([*self.command, *flags, "-c", source.name, "-o", name], source.parent)
        return source.with_name(name)

    def link(self, flags: Iterable[str], objects: Iterable[Path], made: Path) -> None:
        """Make a shared library of objects."""
        _run([*self.command, *flags, "-shared", *map(str, objects), "-o", str(made)])


def find_compiler() -> Compiler:
    """The compiler that CXX names, else a usual one that is on PATH; CannotCompile if there is none.

    >>> try:
    ...     found = find_compiler().version
    ... except CannotCompile as reason:
    ...     found = str(reason)
    """
    named = _named()
    for command in [named] if named else [[name] for name in USUAL]:
        if found := shutil.which(command[0]):
            command = [os.path.abspath(found), *command[1:]]  # it runs in other folders, too
            told = (_run([*command, option]).splitlines() for option in ("--version", "-dumpmachine"))
            return Compiler(tuple(command), ", ".join(lines[0] for lines in told if lines))
    if named:
        raise CannotCompile(f"CXX names {named[0]}, which is not here")
    raise CannotCompile(f"no C++ compiler is on PATH ({', '.join(USUAL)}; CXX names another)")


def _named() -> list[str]:
    text = os.environ.get("CXX", "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise CannotCompile(f"CXX is {text!r}, which is no command: {str(error).lower()}") from error


def _run(command: list[str], folder: Path | None = None) -> str:
    environment = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise CannotCompile(f"{command[0]} does not start: {error.strerror}") from error
    if done.returncode:
        raise CannotCompile(f"{Path(command[0]).name}: {_first_error(done)}", done.stderr)
    return done.stdout


def _first_error(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = (line.partition("error: ")[2] for line in lines if "error: " in line)
    return next(errors, lines[-1] if lines else f"status {done.returncode}")
