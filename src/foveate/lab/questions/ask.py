"""One question: the text with its lines, read by a model, and the answers that it finds likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.lab.compare.subject import trunk_of
from foveate.lab.questions.kinds import Question


@dataclass(frozen=True)
class Reply:
    """Whether the right answer is the likeliest of the candidates, whether greedy decoding writes it, its nats."""

    ranked: bool
    written: bool
    nats: float


@dataclass(frozen=True)
class Haystack:
    """Tokens of a text, and where its lines end: at tokens that begin with the end of a line."""

    tokens: tuple[int, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, text: str) -> Haystack:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        begins = [begin for begin, _ in encoded.offset_mapping]
        ends = (at for at, begin in enumerate(begins) if at and text[begin] == "\n")
        return cls(tuple(encoded.input_ids), (0, *ends))

    def with_lines(self, lines: Sequence[Sequence[int]], depths: Sequence[float], first: int, count: int) -> list[int]:
        """``count`` tokens from ``first`` on, lines among them: each at the end of a line nearest its depth."""
        room = count - sum(map(len, lines))
        tokens = list(self.tokens[first : first + room])
        breaks = [at - first for at in self.ends if first <= at < first + room] or [0]
        places = [min([*breaks, room], key=lambda at: abs(at - depth * room)) for depth in depths]
        for place, line in sorted(zip(places, lines, strict=True), key=lambda pair: -pair[0]):
            tokens[place:place] = line
        return tokens


def prompt_of(
    tokenizer: Any, hay: Haystack, question: Question, length: int, first: int, start: Sequence[int] = ()
) -> tuple[list[int], list[list[int]]]:
    """Tokens of text and question, and of the answers, the right one first; ``length`` with the longest answer."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    asked = ids("\n" + question.ask)
    whole = [ids("\n" + question.ask + answer) for answer in (question.answer, *question.others)]
    same = min(_alike(asked, one) for one in whole)
    answers = [one[same:] for one in whole]
    lines = [ids(f"\n{line}") for line in question.lines]
    count = length - len(start) - same - max(map(len, answers))
    if count - sum(map(len, lines)) < 1:
        raise ValueError(f"a question of {length - count + sum(map(len, lines))} tokens leaves no text of {length}")
    return [*start, *hay.with_lines(lines, question.depths, first, count), *asked[:same]], answers


def _alike(first: Sequence[int], second: Sequence[int]) -> int:
    """With how many equal tokens both begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


@torch.inference_mode()
def ask(model: Any, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Reply:
    """Read the prompt once, then put all answers through its cache side by side, the right one first."""
    ids = torch.tensor([list(prompt)], device=model.device)
    cache = trunk_of(model)(input_ids=ids[:, :-1], use_cache=True).past_key_values
    logits = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1].float()
    longest = max(map(len, answers))
    padded = torch.tensor([[*one, *[one[-1]] * (longest - len(one))] for one in answers], device=model.device)
    logits = logits.expand(len(answers), -1)
    cache.batch_repeat_interleave(len(answers))
    steps = [logits]
    for at in range(longest - 1):
        out = model(input_ids=padded[:, at : at + 1], past_key_values=cache, use_cache=True)
        steps.append(out.logits[:, -1].float())
    return reply(torch.stack(steps, 1), padded, [len(one) for one in answers])


def reply(logits: Tensor, answers: Tensor, lengths: Sequence[int]) -> Reply:
    """Of logits (K, n, V) for answers (K, n), of which so many tokens count, the right one first."""
    chances = logits.log_softmax(-1).gather(2, answers.unsqueeze(2)).squeeze(2)  # (K, n)
    total = torch.stack([row[:count].sum() for row, count in zip(chances, lengths, strict=True)])
    right = (logits[0].argmax(-1) == answers[0])[: lengths[0]]
    best = bool(total[0] > total[1:].max()) if len(total) > 1 else True
    return Reply(best, bool(right.all()), -float(total[0]))
