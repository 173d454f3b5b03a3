"""A library of kernels for another processor, in the place of this machine's: its calls run in an emulator."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REMOTE = tuple(f"foveate_{operator}_{way}" for operator in ("attend", "recur") for way in ("forward", "backward"))
REACH = 2**21  # bytes from a pointer on that are sent: more than any tensor of these tests has
PAGE = 4096


@dataclass(frozen=True)
class Emulator:
    """How to run `remote_call` (native/remote_call.cpp) on a library."""

    command: tuple[str, ...]
    library: Path


class RemoteLibrary:
    """Answers like a ctypes library: attention and recurrences run in the emulator, all else in this process."""

    def __init__(self, emulator: Emulator, local: ctypes.CDLL) -> None:
        self._local = local
        self._remote = {name: RemoteFunction(emulator, name) for name in REMOTE}

    def __getattr__(self, name: str) -> Any:
        return self._remote.get(name) or getattr(self._local, name)

    @property
    def calls(self) -> int:
        """How many calls ran in the emulator."""
        return sum(function.calls for function in self._remote.values())


class RemoteFunction:
    """A function of one structure, called on a copy of the memory that this points to."""

    def __init__(self, emulator: Emulator, name: str) -> None:
        self._command = [*emulator.command, str(emulator.library), name]
        self.calls = 0

    def __call__(self, reference: Any) -> int:
        argument = reference._obj
        places = list(pointers(argument))
        sent = {start: memory(start, end).copy() for start, end in regions(argument, places)}
        request = [numbers(len(sent))]
        for start, content in sent.items():
            request += [numbers(start, len(content)), content.tobytes()]
        request.append(numbers(len(places), *places, ctypes.addressof(argument)))
        answer = self._run(b"".join(request))
        self.calls += 1
        at = 8
        for start, content in sent.items():
            returned = np.frombuffer(answer, np.uint8, len(content), at)
            changed = returned != content
            memory(start, start + len(content))[changed] = returned[changed]
            at += len(content)
        return int.from_bytes(answer[:8], "little", signed=True)

    def _run(self, request: bytes) -> bytes:
        done = subprocess.run(self._command, input=request, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout


def pointers(structure: ctypes.Structure) -> Iterator[int]:
    """The addresses of all pointers in a structure, and in the biases it points to."""
    for name, kind, *_ in structure._fields_:
        place = ctypes.addressof(structure) + getattr(type(structure), name).offset
        if issubclass(kind, ctypes.Structure):
            yield from pointers(getattr(structure, name))
        elif (kind is ctypes.c_void_p or hasattr(kind, "contents")) and address_at(place):
            yield place
        if name == "biases":
            for bias in structure.biases[: structure.num_biases]:
                yield from pointers(bias)


def regions(argument: ctypes.Structure, places: list[int]) -> list[tuple[int, int]]:
    """Whole pages from the argument and from every pointer on, as far as memory goes; joined where they meet."""
    ends = dict(readable())
    joined: list[tuple[int, int]] = []
    for start in sorted({ctypes.addressof(argument), *places, *map(address_at, places)}):
        end = next(end for first, end in ends.items() if first <= start < end)
        first, last = start // PAGE * PAGE, min(start // PAGE * PAGE + REACH, end)
        if joined and first <= joined[-1][1]:
            first = joined.pop()[0]
        joined.append((first, last))
    return joined


def readable() -> Iterator[tuple[int, int]]:
    """The parts of this process's memory that can be read and written, joined where they meet."""
    first = last = 0
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        bounds, rights = line.split()[:2]
        start, end = (int(bound, 16) for bound in bounds.split("-"))
        if not rights.startswith("rw"):
            continue
        if start != last:
            yield first, last
            first = start
        last = end
    yield first, last


def address_at(place: int) -> int:
    return ctypes.c_uint64.from_address(place).value


def memory(start: int, end: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)
