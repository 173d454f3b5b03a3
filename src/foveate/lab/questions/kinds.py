"""Questions in Python code: lines put into a text at some depth, and a last line that asks for what they said.

After "needle in a haystack" and RULER (Hsieh et al., arXiv 2404.06654), in the forms of code: a line such as
``zorinpadek = 48213`` says something, a later ``zorinpadek =`` asks. Models of code without any instruction tuning
can answer that, small ones too; their accuracy under exact attention says how well.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

CANDIDATES = 4  # answers that are ranked, the right one among them


@dataclass(frozen=True)
class Question:
    """``lines`` are put into the text at ``depths``, shares of it; ``ask`` ends it, ``answer`` is to follow.

    ``others`` are answers of the same form that are wrong.
    """

    lines: tuple[str, ...]
    depths: tuple[float, ...]
    ask: str
    answer: str
    others: tuple[str, ...]


def needle(depth: float, draw: random.Random) -> Question:
    """One line says the value of a name; the others are values that nothing said.

    >>> needle(0.5, random.Random(1)).ask
    'fuzapdovot ='
    """
    (name,), (value, *others) = _names(draw, 1), _values(draw, CANDIDATES)
    return _asked([f"{name} = {value}"], [depth], name, value, others)


def recall(depth: float, draw: random.Random) -> Question:
    """Eight names and values, line after line; one of them is asked, the others are values of the same list."""
    names, values = _names(draw, 8), _values(draw, 8)
    lines = [f"{name} = {value}" for name, value in zip(names, values, strict=True)]
    at = draw.randrange(8)
    others = draw.sample([value for value in values if value != values[at]], CANDIDATES - 1)
    return _asked(["\n".join(lines)], [depth], names[at], values[at], others)


def multikey(depth: float, draw: random.Random) -> Question:
    """Four needles all over the text, the one that is asked at the depth; the others are the values of the rest."""
    names, values = _names(draw, CANDIDATES), _values(draw, CANDIDATES)
    lines = [f"{name} = {value}" for name, value in zip(names, values, strict=True)]
    depths = [depth, *(draw.random() for _ in lines[1:])]
    return _asked(lines, depths, names[0], values[0], values[1:])


def variables(depth: float, draw: random.Random) -> Question:
    """Two chains of assignments, ``b = a`` after ``a = 48213``: the end of the one that begins at the depth."""
    names, values = _names(draw, 6), _values(draw, CANDIDATES)
    lines = [f"{names[0]} = {values[0]}", f"{names[1]} = {names[0]}", f"{names[2]} = {names[1]}"]
    lines += [f"{names[3]} = {values[1]}", f"{names[4]} = {names[3]}", f"{names[5]} = {names[4]}"]
    own = sorted(depth + (1 - depth) * draw.random() for _ in range(2))
    rest = sorted(draw.random() for _ in range(3))
    return _asked(lines, [depth, *own, *rest], names[2], values[0], values[1:], sign="==", verb="assert ")


def aggregation(depth: float, draw: random.Random) -> Question:
    """A list of words at the depth, one of them six times and others thrice or never: which is the most common."""
    words = _names(draw, CANDIDATES)
    said = [words[0]] * 6 + [words[1]] * 3 + [words[2]] * 3
    draw.shuffle(said)
    lines = "\n".join(f'votes.append("{word}")' for word in said)
    return Question((lines,), (depth,), 'most_voted = "', words[0], tuple(words[1:]))


TASKS: dict[str, Callable[[float, random.Random], Question]] = {
    "needle": needle,
    "recall": recall,
    "multikey": multikey,
    "variables": variables,
    "aggregation": aggregation,
}
RULER = ("multikey", "variables", "aggregation")


def question(task: str, depth: float, seed: str) -> Question:
    """A question of a task, always the same for a seed."""
    return TASKS[task](depth, random.Random(f"{task} {depth} {seed}"))


def _asked(
    lines: list[str], depths: list[float], name: str, value: str, others: list[str], sign: str = "=", verb: str = ""
) -> Question:
    wrong = tuple(f" {other}" for other in others)
    return Question(tuple(lines), tuple(depths), f"{verb}{name} {sign}", f" {value}", wrong)


def _word(draw: random.Random) -> str:
    return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(2)) + draw.choice("klmnprst")


def _names(draw: random.Random, count: int) -> list[str]:
    """Words without a part in common: small models take names that end alike for one another."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[_word(draw) + _word(draw)] = None
    return list(found)


def _values(draw: random.Random, count: int) -> list[str]:
    return [str(value) for value in draw.sample(range(10_000, 100_000), count)]
