"""The speed to reach: what is wanted of each case, and whether it was reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

OURS = "Foveate"
YARDSTICK = "Foveate, dense"


def family(label: str) -> str:
    """A contender's name without what tells its spellings apart: "SDPA" of "SDPA, packed"."""
    return label.partition(",")[0]


@dataclass(frozen=True)
class Verdict:
    """What was wanted, as a number to reach, and what was got; None where it could not be told."""

    words: str
    wanted: float
    got: float | None

    @property
    def reached(self) -> bool | None:
        return None if self.got is None else self.got >= self.wanted


@dataclass(frozen=True)
class Measured:
    """Least seconds of each contender, the share of the limit that ours reached, the share of the yardstick's work."""

    seconds: Mapping[str, float]
    of_limit: float | None
    of_yardstick: float | None

    def best(self, families: tuple[str, ...]) -> float | None:
        """Least seconds of any contender of these families or spellings."""
        found = (t for label, t in self.seconds.items() if label in families or family(label) in families)
        return min(found, default=None)


class Target(Protocol):
    def judge(self, measured: Measured) -> Verdict: ...


class Faster:
    """At least so many times as fast as the best of some rivals."""

    def __init__(self, factor: float, *rivals: str) -> None:
        self.factor, self.rivals = factor, rivals

    def judge(self, measured: Measured) -> Verdict:
        theirs = measured.best(self.rivals)
        got = None if theirs is None else theirs / measured.seconds[OURS]
        return Verdict(f"{self.factor:g}x {' and '.join(self.rivals)}", self.factor, got)


class OfLimit:
    """At least this share of what the machine can do."""

    def __init__(self, share: float) -> None:
        self.share = share

    def judge(self, measured: Measured) -> Verdict:
        return Verdict(f"{self.share:.0%} of the limit", self.share, measured.of_limit)


class InProportion:
    """At most so many times the yardstick's time for as many pairs, and so many seconds more."""

    def __init__(self, factor: float, extra: float = 0.0) -> None:
        self.factor, self.extra = factor, extra

    def judge(self, measured: Measured) -> Verdict:
        assert measured.of_yardstick is not None
        allowed = self.factor * measured.of_yardstick * measured.seconds[YARDSTICK] + self.extra
        more = f" + {1e6 * self.extra:.0f} us" if self.extra else ""
        words = f"{self.factor:g}x its share of dense time{more}, allowed / taken"
        return Verdict(words, 1.0, allowed / measured.seconds[OURS])


class Flat:
    """The same time per token whatever the length, within a share of the least."""

    def __init__(self, share: float, lengths: Mapping[str, int]) -> None:
        self.share, self.lengths = share, lengths

    def judge(self, measured: Measured) -> Verdict:
        per_token = [measured.seconds[label] / length for label, length in self.lengths.items()]
        shortest, longest = min(self.lengths.values()), max(self.lengths.values())
        words = f"time per token flat within {self.share:.0%} from N {shortest} to {longest}, least / most"
        return Verdict(words, 1 / (1 + self.share), min(per_token) / max(per_token))
