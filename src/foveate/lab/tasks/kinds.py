"""Synthetic tasks that tell token mixers apart: recalling, copying, and keeping track of a state."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

NOTHING = -100  # where no answer is asked; the value that cross-entropy ignores


class Batch(NamedTuple):
    """Tokens (B, N), and the answers (B, N) wanted after each of them, NOTHING where none is."""

    tokens: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Task:
    """Sequences of ``length`` tokens with questions in them, made afresh from a generator."""

    name: ClassVar[str]
    source: ClassVar[str]
    length: int

    @property
    def vocabulary(self) -> int:
        """How many different tokens and answers there are."""
        raise NotImplementedError

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        raise NotImplementedError

    def shrunk(self, factor: int) -> Task:
        """The same task, so many times shorter: what a curriculum begins with."""
        return replace(self, length=max(2, self.length // factor))


@dataclass(frozen=True)
class Recall(Task):
    """Pairs of a key and a value, then noise in which every key stands once more: its value is asked.

    The gaps between the pairs and the questions follow a power law, j ** (power - 1): most questions come
    early. Noise is any token but the keys of the sequence, so it holds other keys and other values.

    Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv 2312.04927.

    >>> task = Recall(length=16, pairs=2, vocab=12)
    >>> tokens, answers = task.batch(1, torch.Generator().manual_seed(0))
    >>> int((answers != NOTHING).sum())
    2
    """

    name: ClassVar[str] = "recall"
    source: ClassVar[str] = "multi-query associative recall of Zoology, arXiv 2312.04927"
    length: int = 256
    pairs: int = 16
    vocab: int = 128
    power: float = 0.01

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.length < 4 * self.pairs:
            raise ValueError(
                f"recall needs 4 tokens a pair, two of them for the question: {self.pairs} pairs take a length of "
                f"{4 * self.pairs} or more, got {self.length}"
            )
        if self.vocab // 2 < max(2, self.pairs):
            raise ValueError(f"half of the vocabulary are keys: {self.pairs} pairs need more than vocab={self.vocab}")

    @property
    def vocabulary(self) -> int:
        return self.vocab

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        half, told = self.vocab // 2, 2 * self.pairs
        order = torch.rand(size, half, generator=generator).argsort(1)
        keys, others = order[:, : self.pairs], order[:, self.pairs :]  # (B, P), (B, half - P)
        values = half + torch.rand(size, self.vocab - half, generator=generator).argsort(1)[:, : self.pairs]
        noise = torch.cat([others, torch.arange(half, self.vocab).expand(size, -1)], 1)
        picked = torch.randint(noise.shape[1], (size, self.length), generator=generator)
        tokens = noise.gather(1, picked)
        tokens[:, 0:told:2], tokens[:, 1:told:2] = keys, values
        asked = told + 2 * self._slots(size, generator)
        answers = torch.full_like(tokens, NOTHING)
        return Batch(tokens.scatter(1, asked, keys), answers.scatter(1, asked, values))

    def _slots(self, size: int, generator: torch.Generator) -> Tensor:
        """Every second place after the pairs, drawn without replacement (B, P): the power law plus Gumbel noise."""
        slots = (self.length - 2 * self.pairs) // 2
        chance = (self.power - 1) * torch.arange(1, slots + 1).log()
        gumbel = -torch.empty(size, slots).exponential_(generator=generator).log()
        return (chance + gumbel).topk(self.pairs, dim=1).indices

    def shrunk(self, factor: int) -> Recall:
        pairs = max(1, self.pairs // factor)
        return replace(self, length=max(4 * pairs, self.length // factor), pairs=pairs)


@dataclass(frozen=True)
class Copy(Task):
    """Random tokens, a mark, and the same tokens again: each is asked from the mark on.

    Jelassi et al., "Repeat After Me: Transformers are Better than State Space Models at Copying",
    arXiv 2402.01032.

    >>> tokens, answers = Copy(length=9, vocab=20).batch(1, torch.Generator().manual_seed(0))
    >>> bool((answers[:, 4:8] == tokens[:, :4]).all())
    True
    """

    name: ClassVar[str] = "copy"
    source: ClassVar[str] = "copying as in Repeat After Me, arXiv 2402.01032"
    length: int = 128
    vocab: int = 64

    def __post_init__(self) -> None:
        if self.length < 2 or self.vocab < 2:
            raise ValueError(f"copying takes 2 tokens and 2 words or more, got length={self.length}, {self.vocab=}")

    @property
    def vocabulary(self) -> int:
        return self.vocab + 1

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        half = self.length // 2
        words = torch.randint(self.vocab, (size, half), generator=generator)
        mark = torch.full((size, 1), self.vocab)
        tokens = torch.cat([words, mark, words], 1)[:, : self.length]
        answers = torch.full_like(tokens, NOTHING)
        answers[:, half : 2 * half] = words
        return Batch(tokens, answers)


@dataclass(frozen=True)
class State(Task):
    """Elements of a group; after each, the product of all so far is asked.

    ``parity`` (of bits) needs a state that changes sign. ``s5`` (permutations of five things) cannot be solved
    at every length by a fixed number of layers of attention, or of states whose transitions are diagonal.

    Merrill, Petty, Sabharwal, "The Illusion of State in State-Space Models", arXiv 2404.08819.

    >>> tokens, answers = State(length=5, group="parity").batch(1, torch.Generator().manual_seed(0))
    >>> bool((answers == tokens.cumsum(1) % 2).all())
    True
    """

    name: ClassVar[str] = "state"
    source: ClassVar[str] = "word problems of groups as in The Illusion of State, arXiv 2404.08819"
    length: int = 64
    group: str = "parity"

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"group is one of {', '.join(GROUPS)}; got {self.group!r}")
        if self.length < 1:
            raise ValueError(f"length is the number of tokens, 1 or more; got {self.length}")

    @property
    def vocabulary(self) -> int:
        return len(GROUPS[self.group]())

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        product = GROUPS[self.group]()
        tokens = torch.randint(len(product), (size, self.length), generator=generator)
        so_far = list(itertools.accumulate(tokens.unbind(1), lambda done, new: product[new, done]))
        return Batch(tokens, torch.stack(so_far, 1))


@cache
def bits() -> Tensor:
    """The table of products (2, 2) of bits under exclusive or."""
    return torch.tensor([[0, 1], [1, 0]])


@cache
def permutations() -> Tensor:
    """The table of products (120, 120) of permutations: entry (a, b) does b first, then a."""
    every = torch.tensor(list(itertools.permutations(range(5))))  # (120, 5)
    products = every[:, None, :].expand(-1, 120, -1).gather(2, every[None].expand(120, -1, -1))
    powers = 5 ** torch.arange(5)
    number = torch.full((5**5,), -1).scatter(0, (every * powers).sum(1), torch.arange(120))
    return number[(products * powers).sum(2)]


GROUPS: dict[str, Callable[[], Tensor]] = {"parity": bits, "s5": permutations}
TASKS: dict[str, type[Task]] = {kind.name: kind for kind in (Recall, Copy, State)}


def make_task(name: str, **options: Any) -> Task:
    """The task of that name; options that are None keep their defaults.

    >>> make_task("recall", length=64, pairs=4, group=None)
    Recall(length=64, pairs=4, vocab=128, power=0.01)

    Raises ValueError for an unknown name, for an option that the task does not have, and for sizes that do
    not fit together.
    """
    if name not in TASKS:
        raise ValueError(f"no task is called {name!r}; there are {', '.join(TASKS)}")
    given = {key: value for key, value in options.items() if value is not None}
    known = [field.name for field in fields(TASKS[name])]
    strange = [key for key in given if key not in known]
    if strange:
        raise ValueError(f"the task {name} has no {' and no '.join(strange)}; it takes {', '.join(known)}")
    return TASKS[name](**given)
