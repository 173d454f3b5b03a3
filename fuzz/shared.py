"""What a worker and its parent share: a small file in memory that outlives a crash."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

CURRENT, FINISHED, HEADER = 0, 1, 2
FIELDS = ("cases", "refused", "disagreements", "errors", "nanoseconds")
IDLE = -1


class Board:
    """Whole numbers: the case in hand, whether the worker is through, and what it counted for each kind."""

    def __init__(self, path: Path, kinds: Sequence[str], *, create: bool = False) -> None:
        self.kinds = {name: number for number, name in enumerate(kinds)}
        size = 8 * (HEADER + len(FIELDS) * len(kinds))
        if create:
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self.numbers = memoryview(mmap.mmap(file.fileno(), size)).cast("q")
        if create:
            self.numbers[CURRENT] = IDLE

    def at(self, kind: str, field: str) -> int:
        return HEADER + self.kinds[kind] * len(FIELDS) + FIELDS.index(field)

    def add(self, kind: str, field: str, count: int = 1) -> None:
        self.numbers[self.at(kind, field)] += count

    def get(self, kind: str, field: str) -> int:
        return self.numbers[self.at(kind, field)]

    def total(self, field: str) -> int:
        return sum(self.get(kind, field) for kind in self.kinds)
