"""Settings of grid patterns: one value for all axes, or a tuple with one for each."""

from __future__ import annotations

from typing import TypeVar

from foveate.layouts.kinds import Grid
from foveate.patterns.algebra import Pattern

Setting = TypeVar("Setting", int, bool)


def is_whole(value: object, least: int) -> bool:
    """Whether the value is a whole number, not a flag, of at least this much."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def per_axis(pattern: str, name: str, value: int | tuple[int, ...], *, least: int = 1) -> int | tuple[int, ...]:
    """A checked setting of whole numbers."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not 1 <= len(values) <= 3 or not all(is_whole(one, least) for one in values):
        raise ValueError(
            f"{pattern} takes a whole {name} of at least {least}, or one for each of up to three axes; got {value!r}"
        )
    return values if isinstance(value, (list, tuple)) else value


def flags(pattern: str, name: str, value: bool | tuple[bool, ...]) -> bool | tuple[bool, ...]:
    """A checked setting of flags."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not 1 <= len(values) <= 3 or not all(isinstance(one, bool) for one in values):
        raise ValueError(f"{pattern} takes {name}=True or False, or one for each axis; got {value!r}")
    return values if isinstance(value, (list, tuple)) else value


def check_equal_axes(pattern: str, *settings: int | tuple[int, ...]) -> None:
    """Refuse tuples of different lengths."""
    counts = {len(setting) for setting in settings if isinstance(setting, tuple)}
    if len(counts) > 1:
        raise ValueError(f"{pattern} got settings for different numbers of axes: {sorted(counts)}")


def pairs(first: int | tuple[int, ...], second: int | tuple[int, ...]) -> list[tuple[int, int]]:
    """Two settings side by side, once for each axis that either of them names."""
    count = max(len(setting) if isinstance(setting, tuple) else 1 for setting in (first, second))
    columns = (setting if isinstance(setting, tuple) else (setting,) * count for setting in (first, second))
    return list(zip(*columns, strict=True))


def spread(pattern: Pattern, setting: Setting | tuple[Setting, ...], dims: tuple[int, ...]) -> tuple[Setting, ...]:
    """A setting for each axis of a grid."""
    if not isinstance(setting, tuple):
        return (setting,) * len(dims)
    if len(setting) != len(dims):
        raise ValueError(f"{pattern} is written for {len(setting)} axes, but {Grid(*dims)} has {len(dims)}")
    return setting
