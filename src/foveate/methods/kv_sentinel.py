"""Spans of a text compressed into the key and value of a sentinel token: the mask to train with, and the cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from foveate.cache.sentinel import ORDINARY, SentinelMemory, marks_of, sees
from foveate.cache.slots import FREE
from foveate.catalogue.contracts import Method
from foveate.catalogue.tiers import method
from foveate.counts import whole_numbers
from foveate.mixers.core import PatternCore

if TYPE_CHECKING:
    from torch import nn

    from foveate.adapt.swap import Swap

Ids = int | Sequence[int]


class SentinelInputs(NamedTuple):
    """What a transformers model takes besides the tokens, to learn from a text with sentinels.

    ``attention_mask`` (B, 1, N, N) is True where a token sees another; ``position_ids`` (B, N) stand still on
    sentinels; ``labels`` (B, N), which models shift by one, ask for no sentinel and nothing of one, -100.
    """

    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor


def sentinel_inputs(tokens: Tensor, begin: Ids, end: Ids, padding: Tensor | None = None) -> SentinelInputs:
    """The mask, positions and labels of texts (B, N) in which sentinels stand around spans, for training in one pass.

    The token before a sentinel, or before several, learns the ordinary token after it; what follows a sentinel directly
    is nobody's label.
    ``padding`` (B, N) is True at real tokens.

    >>> inputs = sentinel_inputs(torch.tensor([[5, 8, 6, 7, 9, 5]]), begin=8, end=9)
    >>> inputs.attention_mask[0, 0].int()
    tensor([[1, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0],
            [1, 0, 1, 0, 0, 0],
            [1, 0, 1, 1, 0, 0],
            [0, 1, 1, 1, 1, 0],
            [1, 0, 0, 0, 1, 1]], dtype=torch.int32)
    >>> inputs.position_ids, inputs.labels
    (tensor([[0, 0, 1, 2, 2, 3]]), tensor([[   5,    6, -100,    7,    5, -100]]))
    """
    real = torch.ones_like(tokens, dtype=torch.bool) if padding is None else padding.bool()
    place = (real.long().cumsum(1) - 1).masked_fill(~real, FREE)
    marks = marks_of(tokens, place, _as_ids(begin, tokens), _as_ids(end, tokens))
    mask = sees(marks, marks, place, place)
    mask = mask | (torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device) & ~real.unsqueeze(2))
    return SentinelInputs(mask.unsqueeze(1), marks.position, _labels(tokens, marks.kind, real))


def _labels(tokens: Tensor, kind: Tensor, real: Tensor) -> Tensor:
    """A label behind an ordinary token is the next ordinary one; behind a sentinel there is none."""
    count = tokens.shape[1]
    at = torch.arange(count, device=tokens.device).expand_as(tokens)
    ordinary = (kind == ORDINARY) & real
    following = torch.where(ordinary, at, count).flip(1).cummin(1).values.flip(1)  # ordinary token from here on
    labels = torch.cat([tokens, torch.full_like(tokens[:, :1], -100)], 1).gather(1, following)
    behind = torch.cat([torch.ones_like(ordinary[:, :1]), ordinary[:, :-1]], 1)
    return labels.masked_fill(~(behind & real), -100)


def _as_ids(ids: Ids, like: Tensor | None = None) -> Tensor:
    numbers = whole_numbers("ids of sentinels", (ids,) if isinstance(ids, int) else ids)
    return torch.tensor(numbers, dtype=torch.long, device="cpu" if like is None else like.device)


@dataclass(frozen=True)
class KVSentinel:
    """See :func:`kv_sentinel`."""

    begin: Tensor
    end: Tensor

    def install(self, model: nn.Module) -> Swap:
        """Give a causal language model of transformers caches of this kind from now on."""
        from transformers import PreTrainedModel

        from foveate.adapt.hf.memory import keep

        swap = keep(model, lambda facts: SentinelMemory(self.begin, self.end), PatternCore())
        for module in model.modules():
            takes = inspect.signature(module.forward).parameters
            if isinstance(module, PreTrainedModel) and {"position_ids", "past_key_values"} <= takes.keys():
                swap.on_undo(module.register_forward_pre_hook(_freeze, with_kwargs=True).remove)
        return swap


def _freeze(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """A pre-hook of a model: positions stand still on sentinels."""
    from foveate.adapt.hf.memory import MemoryLayer, call_at_work

    call = call_at_work()
    memories = (layer.memory for layer in call.cache.layers if isinstance(layer, MemoryLayer))
    memory = next(one for one in memories if isinstance(one, SentinelMemory))
    memory.commit()
    return args, kwargs | {"position_ids": memory.next_marks(call.tokens, call.position).position}


@method(
    "kv_sentinel",
    papers=("KV-Sentinel",),
    tiny={"begin": (3, 13, 23, 33, 43, 53), "end": (7, 17, 27, 37, 47, 57)},
    full_budget={"begin": (10**9,), "end": (10**9 + 1,)},
)
def kv_sentinel(begin: Ids, end: Ids) -> Method:
    """Spans between two sentinel tokens are read by the second alone, whose key and value then stand for them.

    ``begin`` and ``end`` are the ids of the sentinels (``<CL>`` and ``<CR>``), one or several, which the text has
    around its spans. Once the end of a span is read, the span's keys and values leave the cache; later tokens see what
    is outside of spans, and ends. Positions stand still on sentinels. The model must have learned to use them:
    :func:`sentinel_inputs` makes the mask, positions and labels of such a training; both compute the same logits.

    Ren, Jia, Zhu, Context Compression for Auto-regressive Transformers with Sentinel Tokens, arXiv 2310.08152. The
    authors' code is followed: an end sees its span and the sentinel that began it, and nothing else, and a beginning
    sees itself. Spans do not nest here: a beginning inside a span begins none.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(small).eval()
    >>> change = kv_sentinel(begin=62, end=63).install(model)
    >>> with torch.no_grad():
    ...     cache = model(torch.tensor([[5, 6, 62, 7, 8, 9, 63, 5]])).past_key_values
    >>> cache.layers[0].keys.shape[2]  # of 5, 6, the end and 5
    4
    >>> change.undo()
    """
    first, last = _as_ids(begin), _as_ids(end)
    if not len(first) or not len(last) or bool(torch.isin(first, last).any()):
        raise ValueError(f"begin and end are ids of different tokens, at least one each; got {begin} and {end}")
    return KVSentinel(first, last)
