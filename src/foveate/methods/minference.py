"""MInference: prompts are read with the sparse pattern that suits each head, found once offline; decoding is exact."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foveate.adapt.hf.layers import attention_layers
from foveate.adapt.swap import Change, use
from foveate.catalogue.tiers import method
from foveate.mixers.core import PatternCore, PromptCore
from foveate.mixers.dynamic_sparse.minference_search import HeadPattern, as_pattern, search_heads
from foveate.patterns import Pattern, full, per_head

if TYPE_CHECKING:
    from torch import Tensor, nn

    from foveate.catalogue.contracts import Method

Assignment = Sequence[Mapping[int, HeadPattern]]
UNSEARCHED = HeadPattern("vertical_and_slash", 1000, 6096)  # of heads that the authors' configurations leave out


@dataclass(frozen=True)
class MInferenceMethod:
    """A pattern for every head of every layer; the cache as it is."""

    assignment: Assignment | None
    default: HeadPattern
    options: Mapping[str, int]

    def install(self, model: nn.Module) -> Change:
        """Let a transformers model read its prompts so from now on."""
        layers, change = attention_layers(model)[0], Change()
        numbers = sorted({layer.number for layer in layers if layer.number is not None})
        if self.assignment is not None and len(self.assignment) != len(numbers):
            raise ValueError(f"the assignment is of {len(self.assignment)} layers; the model has {len(numbers)}")
        heads = {layer.number: layer.config.num_attention_heads for layer in layers}
        try:
            for number in numbers:
                own = {} if self.assignment is None else self.assignment[number]
                unknown = [head for head in own if not 0 <= head < heads[number]]
                if unknown:
                    raise ValueError(f"layer {number} has {heads[number]} heads; heads {unknown} are assigned patterns")
                patterns = [self.pattern_of(own.get(head, self.default)) for head in range(heads[number])]
                change.on_undo(use(model, PromptCore(PatternCore(per_head(patterns))), layers=[number]).undo)
        except BaseException:
            change.undo()
            raise
        return change

    def pattern_of(self, one: HeadPattern) -> Pattern:
        return as_pattern(one, **self.options)


@method(
    "minference",
    papers=("MInference",),
    tiny={
        "assignment": [{0: ("stream_llm", 2, 5), 2: ("block_sparse", 2, 1)}, {1: ("stream_llm", 1, 6)}],
        "default": ("vertical_and_slash", 3, 4),
        "block": 4,
        "last": 5,
        "first": 1,
        "near": 2,
    },
    full_budget={"assignment": None, "default": ("vertical_and_slash", 1 << 20, 1 << 20)},
    exempt={
        "causality": "its choice for early queries looks at later ones; no output reads a later key or value",
        "decoding": "it is for prompts: a token decoded sees everything",
    },
)
def minference(
    assignment: Assignment | str | Path | None = None,
    default: HeadPattern | tuple[str, int, int] = UNSEARCHED,
    block: int = 64,
    last: int = 64,
    first: int = 30,
    near: int = 30,
) -> Method:
    """MInference: sparse prefill with an A-shape, vertical-slash or block-sparse pattern for each head, decoding exact.

    ``assignment`` says for each layer which heads have which pattern, as `search_model` finds it, or is a JSON file of
    the authors' configurations: ("stream_llm", sinks, window), ("vertical_and_slash", keys, distances)
    or ("block_sparse", blocks of ``block`` keys, ignored). Heads it does not name have ``default``. Indices are found
    for each prompt from its ``last`` queries; the ``first`` keys and the ``near`` distances are always among them.
    Jiang et al., MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention,
    arXiv 2407.02490, with the numbers of the authors' code. There blocks of 64 x 64 pairs are computed whole, here the
    lines that were chosen; and here a block of queries always sees its own block of keys.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(small)
    >>> change = minference([{0: ("stream_llm", 100, 800)}, {}]).install(model)
    >>> change.undo()

    Raises ValueError for a pattern of another name, for sizes below 1, and at ``install`` for an assignment of other
    layers or heads than the model has.
    """
    found = load_configuration(assignment) if isinstance(assignment, (str, Path)) else assignment
    parsed = None if found is None else [{head: HeadPattern.of(one) for head, one in layer.items()} for layer in found]
    made = MInferenceMethod(
        parsed, HeadPattern.of(default), {"block": block, "last": last, "first": first, "near": near}
    )
    for one in {made.default, *(one for layer in parsed or () for one in layer.values())}:
        made.pattern_of(one)  # refused now rather than in a model
    return made


@dataclass
class SearchingCore:
    """Exact attention that notes, for each head of the layer it stands in, which pattern comes nearest to it."""

    budget: float
    options: Mapping[str, int]
    found: dict[int, HeadPattern] = field(default_factory=dict)
    pattern: Pattern = full

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        within, scale = options["within"], options["scale"]
        chosen = search_heads(q, k, v, budget=self.budget, within=within, scale=scale, **self.options).assignment
        self.found = dict(enumerate(chosen))
        return PatternCore()(q, k, v, **options)


def search_model(
    model: nn.Module,
    tokens: Tensor,
    *,
    budget: float = 0.25,
    block: int = 64,
    last: int = 64,
    first: int = 30,
    near: int = 30,
) -> list[dict[int, HeadPattern]]:
    """The pattern of every head of every layer that comes nearest to its exact output on a sample of text.

    The model reads ``tokens`` (B, N) once with exact attention. Every head tries the authors' patterns, their sizes
    changed to cost the fraction ``budget`` of causal attention's pairs at this length
    (`foveate.mixers.dynamic_sparse.minference_search`). Use `minference` with the same further options.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(small)
    >>> [sorted(layer) for layer in search_model(model, torch.arange(60).view(1, 60), block=4)]
    [[0, 1], [0, 1]]
    """
    options = {"block": block, "last": last, "first": first, "near": near}
    numbers = sorted({layer.number for layer in attention_layers(model)[0] if layer.number is not None})
    change, cores = Change(), [SearchingCore(budget, options) for _ in numbers]
    try:
        for number, core in zip(numbers, cores, strict=True):
            change.on_undo(use(model, core, layers=[number]).undo)
        with torch.no_grad():
            model(tokens, use_cache=False)
    finally:
        change.undo()
    return [core.found for core in cores]


def load_configuration(path: str | Path) -> list[dict[int, HeadPattern]]:
    """Read a configuration of the authors: a JSON list of layers, each of heads by number; scores are left out."""
    layers = json.loads(Path(path).read_text(encoding="utf-8"))
    return [{int(head): HeadPattern.of(one[:3]) for head, one in layer.items()} for layer in layers]


def as_parts(
    assignment: Assignment, *, block: int = 64, last: int = 64, first: int = 30, near: int = 30
) -> list[dict[str, Any]]:
    """A search's result as parts of a `foveate.adapt.Assignment`, which is saved beside a model as JSON.

    >>> from foveate.adapt import Assignment
    >>> found = [{0: HeadPattern("stream_llm", 4, 60), 1: HeadPattern("stream_llm", 4, 60)}]
    >>> Assignment.of(as_parts(found)).parts[0]
    Part(use='sinks(4) | window(59, 0)', layers=(0,), heads=(0, 1), prompts=True)
    """
    options = {"block": block, "last": last, "first": first, "near": near}
    parts: list[dict[str, Any]] = []
    for number, layer in enumerate(assignment):
        heads: dict[str, list[int]] = {}
        for head, one in sorted(layer.items()):
            heads.setdefault(str(as_pattern(one, **options)), []).append(head)
        parts += [{"use": text, "layers": [number], "heads": own, "prompts": True} for text, own in heads.items()]
    return parts
