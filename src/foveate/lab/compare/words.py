"""Figures in words: shares, times, sizes and counts to about three digits."""

from __future__ import annotations


def percent(value: float, *, sign: bool = False) -> str:
    """A share to three digits, with a proper minus.

    >>> percent(0.0123), percent(-0.5, sign=True), percent(2.0, sign=True), percent(1.0)
    ('1.23%', '−50.0%', '+200%', '100%')
    """
    shown = f"{abs(value) * 100:.{2 if abs(value) < 0.0995 else 1 if abs(value) < 0.9995 else 0}f}"
    return f"{_sign(value) if sign or value < 0 else ''}{shown}%"


def round_percent(value: float, *, sign: bool = False) -> str:
    """A share that is a round number, without needless zeros.

    >>> round_percent(0.001, sign=True), round_percent(0.01), round_percent(0.0, sign=True)
    ('+0.1%', '1%', '0%')
    """
    return f"{_sign(value) if value and (sign or value < 0) else ''}{abs(value) * 100:g}%"


def _sign(value: float) -> str:
    return "−" if value < 0 else "+"


def seconds(value: float) -> str:
    """A time to three digits, in the unit that suits it.

    >>> seconds(0.01234), seconds(12.34)
    ('12.3 ms', '12.3 s')
    """
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def size(value: int | None) -> str:
    """A size in bytes to three digits.

    >>> size(1_234_567), size(None)
    ('1.23 MB', '-')
    """
    if value is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value} B"


def count(number: int) -> str:
    """A large number to three digits.

    >>> count(4_860_416), count(12)
    ('4.86 M', '12')
    """
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return str(number)
