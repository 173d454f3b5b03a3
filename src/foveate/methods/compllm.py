"""Contexts as half as many embeddings, compressed segment by segment, kept and used again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from foveate.catalogue.contracts import Method
from foveate.catalogue.tiers import method
from foveate.methods.low_rank import Adapters

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class SegmentCompressor(nn.Module):
    """A language model with low-rank adapters and one linear layer, which makes concept embeddings of segments.

    Behind the ``segment`` or fewer tokens of a segment stand a ``rate``-th as many end tokens (id ``end``); what the
    last layer makes of these, through the linear layer, are the segment's concept embeddings. No segment sees another.
    """

    def __init__(self, model: nn.Module, *, segment: int = 20, rate: int = 2, rank: int = 16, end: int = 0) -> None:
        super().__init__()
        if rate < 1 or segment < rate:
            raise ValueError(f"a segment has at least rate tokens, and rate is at least 1; got {segment} and {rate}")
        self.segment, self.rate, self.end = segment, rate, end
        self.adapters = Adapters(model, PROJECTIONS, rank)
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
        self.to_concepts = nn.Linear(weight.shape[1], weight.shape[1]).to(device=weight.device, dtype=weight.dtype)

    def compress(self, model: Any, segments: Tensor) -> Tensor:
        """Segments (S, L) of tokens to (S, ⌈L / rate⌉, C), each by itself."""
        count = -(-segments.shape[1] // self.rate)
        ends = segments.new_full((len(segments), count), self.end)
        tokens = torch.cat([segments, ends], 1)
        with self.adapters.at_work(model, {}):
            out = model(tokens, attention_mask=torch.ones_like(tokens), output_hidden_states=True, use_cache=False)
        return self.to_concepts(out.hidden_states[-1][:, -count:])

    def embed(self, model: Any, context: Tensor, known: dict[tuple[int, ...], Tensor] | None = None) -> Tensor:
        """A context (N,) as (M, C): its segments' concept embeddings, one after the other.

        Those of segments that are ``known`` are taken from there; others are computed together and added to it.
        """
        known = {} if known is None else known
        keys = [tuple(part.tolist()) for part in context.split(self.segment)]
        missing = list(dict.fromkeys(key for key in keys if key not in known))
        for length in sorted({len(key) for key in missing}):
            alike = [key for key in missing if len(key) == length]
            made = self.compress(model, torch.tensor(alike, device=context.device))
            known.update(zip(alike, made, strict=True))
        weight = model.get_input_embeddings().weight
        return torch.cat([weight[:0], *(known[key] for key in keys)])


def compress_loss(model: Any, compressor: SegmentCompressor, context: Tensor, tokens: Tensor, answer: int) -> Tensor:
    """How far what the frozen model makes of an answer is from what it makes of it with the whole context.

    The smooth L1 distance of hidden states, in standard deviations of the latter, averaged over layers, at the last
    ``answer`` of the ``tokens`` (B, M) that follow contexts (B, N) of whole segments.
    """
    with torch.no_grad():
        whole = model(torch.cat([context, tokens], 1), output_hidden_states=True).hidden_states
    parts = context.unflatten(1, (-1, compressor.segment)).flatten(0, 1)
    concepts = compressor.compress(model, parts).unflatten(0, (len(context), -1)).flatten(1, 2)
    embedded = model.get_input_embeddings()(tokens)
    short = model(inputs_embeds=torch.cat([concepts, embedded], 1), output_hidden_states=True).hidden_states
    losses = []
    for mine, other in zip(short[1:], whole[1:], strict=True):
        target = other[:, -answer:]
        losses.append(smooth_l1_loss(mine[:, -answer:] / target.std(), target / target.std()))
    return torch.stack(losses).mean()


@dataclass
class Undo:
    """The model's own ``generate`` back in its place."""

    model: nn.Module

    def undo(self) -> None:
        self.model.__dict__.pop("generate", None)


@dataclass
class CompLLM:
    """See :func:`compllm`. ``known`` are the segments compressed so far."""

    compressor: SegmentCompressor | None
    segment: int
    rate: int
    known: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def install(self, model: nn.Module) -> Undo:
        """Let ``generate`` of a causal language model of transformers take ``context=`` from now on."""
        if "generate" in model.__dict__:
            raise ValueError("another method has put a generate of its own into this model: undo it first")
        made = {"segment": self.segment, "rate": self.rate}
        compressor = SegmentCompressor(model, **made) if self.compressor is None else self.compressor
        known: dict[tuple[int, ...], Tensor] = {}
        self.known = known
        model.__dict__["generate"] = partial(self.generate, model, compressor, known)
        return Undo(model)

    @torch.no_grad()
    def generate(
        self,
        model: Any,
        compressor: SegmentCompressor,
        known: dict[tuple[int, ...], Tensor],
        inputs: Tensor | None = None,
        *,
        context: Sequence[Tensor] | Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The model's own ``generate``; with contexts, one a row, it reads their embeddings before ``inputs``."""
        plain = partial(type(model).generate, model)
        if context is None:
            return plain(inputs, **options)
        if inputs is None or len(context) != len(inputs):
            raise ValueError("pass the questions as inputs (B, M), and as many contexts")
        rows = [compressor.embed(model, one, known) for one in context]
        longest = max(len(row) for row in rows)
        concepts = torch.stack([nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        there = torch.stack([torch.arange(longest, device=inputs.device) >= longest - len(row) for row in rows]).long()
        given = options.pop("attention_mask", None)
        mask = torch.cat([there, torch.ones_like(inputs) if given is None else given], 1)
        embedded = model.get_input_embeddings()(inputs)
        return plain(inputs_embeds=torch.cat([concepts, embedded], 1), attention_mask=mask, **options)


@method(
    "compllm",
    papers=("CompLLM",),
    tiny={"segment": 6, "rate": 2},
    full_budget=None,
)
def compllm(compressor: SegmentCompressor | None = None, segment: int = 20, rate: int = 2) -> Method:
    """CompLLM: a context's segments are each compressed into ``rate`` times fewer embeddings, once for all questions.

    ``model.generate(question, context=[tokens, ...])`` reads concept embeddings in the place of the context's tokens,
    so that the model's cache is ``rate`` times shorter there; compressing takes time proportional to the context, and
    what is known of a segment serves later questions and contexts that have it too. The model stays as it is. The
    ``compressor`` (`SegmentCompressor`) is trained for it with :func:`compress_loss`; None takes an untrained one of
    this ``segment`` and ``rate``, from which nothing can be read. Without ``context=`` nothing changes.

    Berton, Unnikrishnan, Tran, Shah, CompLLM: Compression for Long Context Q&A, arXiv 2509.19228; code was not
    published. Adapters here are at all projections of a layer.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(small).eval()
    >>> method = compllm(segment=10)
    >>> change = method.install(model)
    >>> question, context = torch.tensor([[5, 6, 7]]), [torch.arange(34)]
    >>> model.generate(question, context=context, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape
    torch.Size([1, 4])
    >>> sorted(len(concepts) for concepts in method.known.values())  # the last segment is shorter
    [2, 5, 5, 5]
    >>> change.undo()
    """
    if rate < 1 or segment < rate:
        raise ValueError(f"a segment has at least rate tokens, and rate is at least 1; got {segment} and {rate}")
    if compressor is not None and not isinstance(compressor, SegmentCompressor):
        raise TypeError(
            f"compressor is a SegmentCompressor of foveate.methods.compllm; got {type(compressor).__name__}"
        )
    return CompLLM(compressor, segment, rate)
