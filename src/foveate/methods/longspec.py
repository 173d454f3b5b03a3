"""Lossless speculative decoding for long texts: trees of drafts, verified in one call of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.cache import KVCache
from foveate.cache.memory import Turn
from foveate.cache.tree import Tree, TreeMemory
from foveate.catalogue.contracts import Method
from foveate.catalogue.tiers import method
from foveate.counts import whole_numbers
from foveate.methods.longspec_draft import Draft, Grown, turn_of
from foveate.mixers.core import PatternCore

if TYPE_CHECKING:
    from torch import nn

    from foveate.adapt.swap import Swap


@dataclass
class Nodes:
    """A tree of drafted tokens: ids (T,), depths (T,), the parent of each and (T, T) whom each sees."""

    ids: Tensor
    depth: Tensor
    parent: list[int]
    sees: Tensor

    @classmethod
    def root(cls, token: Tensor) -> Nodes:
        one = torch.ones(1, 1, dtype=torch.bool, device=token.device)
        return cls(token.view(1), torch.zeros_like(token.view(1)), [-1], one)

    def with_children(self, ids: Tensor, parents: Tensor) -> Nodes:
        count = len(ids)
        below = torch.cat([self.sees[parents], torch.eye(count, dtype=torch.bool, device=ids.device)], 1)
        above = torch.cat([self.sees, self.sees.new_zeros(len(self.ids), count)], 1)
        depth = torch.cat([self.depth, self.depth[parents] + 1])
        return Nodes(torch.cat([self.ids, ids]), depth, self.parent + parents.tolist(), torch.cat([above, below]))

    def child(self, node: int, token: int) -> int | None:
        """The child of a node that has this token."""
        found = (i for i, parent in enumerate(self.parent) if parent == node and int(self.ids[i]) == token)
        return next(found, None)


@dataclass
class Round:
    """Drafting for one text: the draft's cache is a window, the target's last keys are read where they are."""

    model: Any
    draft: Draft
    turn: Turn | None
    kept: KVCache = field(init=False)

    def __post_init__(self) -> None:
        self.kept = self.draft.init_state()

    def remember(self, tokens: Tensor) -> None:
        """Tokens (1, N) that are part of the text from now on."""
        at = torch.arange(self.kept.seen, self.kept.seen + tokens.shape[1], device=tokens.device)
        new = self.draft.keys(self.embed(tokens), at[None], self.turn)
        self.kept = self.kept.append(*new).trimmed()

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(tokens)

    def tree(self, root: Tensor, widths: Sequence[int], target: tuple[Tensor, Tensor]) -> Nodes:
        """Level by level, the likeliest paths: ``widths`` are how many nodes each level has at most."""
        nodes, grown = Nodes.root(root), None
        score, first = torch.zeros(1, device=root.device, dtype=torch.float64), 0
        for width in widths:
            logits, grown = self.level(nodes, first, grown, target)
            paths = score.unsqueeze(1) + logits.double().log_softmax(-1)  # (nodes of the level, vocabulary)
            score, best = paths.flatten().topk(min(width, paths.numel()))
            parents, ids = first + best // paths.shape[1], best % paths.shape[1]
            first = len(nodes.ids)
            nodes = nodes.with_children(ids, parents)
        return nodes

    def level(
        self, nodes: Nodes, first: int, grown: Grown | None, target: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Grown]:
        """Logits of the nodes from ``first`` on, and the keys of all."""
        x, at = self.embed(nodes.ids[None, first:]), (self.kept.seen + nodes.depth[first:])[None]
        own = self.draft.keys(x, at, self.turn)
        whole = own if grown is None else Grown(*(torch.cat(pair, 2) for pair in zip(grown, own, strict=True)))
        found = self.draft.grow(x, at, self.turn, self.kept, whole, nodes.sees[first:], target)
        return self.model.get_output_embeddings()(found)[0], whole


@dataclass
class LongSpec:
    """See :func:`longspec`. ``accepted`` are the tokens that each call of the model gave in the last ``generate``."""

    draft: Draft | None
    window: int
    widths: tuple[int, ...]
    accepted: list[int] = field(default_factory=list)

    def install(self, model: nn.Module) -> Swap:
        """Let ``generate`` of a causal language model of transformers draft and verify from now on."""
        from foveate.adapt.hf.memory import keep

        tree, owner = Tree(), model
        swap = keep(model, lambda facts: TreeMemory(tree), PatternCore())
        draft = self.draft if self.draft is not None else Draft.of(model, self.window)
        written = partial(self.write, tree, draft)

        def generate(*args: Any, **kwargs: Any) -> Any:
            return type(owner).generate(owner, *args, custom_generate=written, **kwargs)  # type: ignore[attr-defined]

        owner.__dict__["generate"] = generate
        swap.on_undo(partial(owner.__dict__.pop, "generate", None))
        return swap

    def write(
        self,
        tree: Tree,
        draft: Draft,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Tensor:
        """What ``generate`` runs: rows one after the other, greedy."""
        if generation_config.do_sample or generation_config.num_beams > 1 or generation_config.return_dict_in_generate:
            raise ValueError(
                "drafts are verified against the likeliest tokens: do_sample=False, one beam, plain output"
            )
        mask = kwargs.get("attention_mask")
        rows, self.accepted = [], []
        for row, text in enumerate(input_ids):
            real = torch.ones_like(text, dtype=torch.bool) if mask is None else mask[row].bool()
            rows.append(self.write_one(tree, draft, model, text[None], real, logits_processor, stopping_criteria))
        pad, longest = generation_config._pad_token_tensor, max(row.shape[1] for row in rows)
        fill = 0 if pad is None else int(pad)
        return torch.cat([torch.nn.functional.pad(row, (0, longest - row.shape[1]), value=fill) for row in rows])

    def write_one(
        self, tree: Tree, draft: Draft, model: Any, text: Tensor, real: Tensor, processors: Any, stop: Any
    ) -> Tensor:
        from transformers import DynamicCache

        drafting, prompt = Round(model, draft, turn_of(model)), text[:, real]
        cache: Any = DynamicCache(config=model.config)
        out = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        drafting.remember(prompt)
        root = likeliest(processors, text, out.logits[:, -1])
        text = torch.cat([text, root[None]], 1)
        while not bool(stop(text, None).all()):
            last = cache.layers[-1]
            nodes = drafting.tree(root, self.widths, (last.keys, last.values))
            before = text.shape[1]
            text, path = self.verify(tree, model, cache, nodes, text, processors, stop)
            self.accepted.append(text.shape[1] - before)
            for layer in cache.layers:
                layer.memory.accept(path)
            drafting.remember(nodes.ids[None, path])
            root = text[0, -1:]
        return text

    def verify(
        self, tree: Tree, model: Any, cache: Any, nodes: Nodes, text: Tensor, processors: Any, stop: Any
    ) -> tuple[Tensor, Tensor]:
        """The text with what the model itself writes along the tree, and the nodes that it went through."""
        seen = cache.get_seq_length()
        tree.ancestors = nodes.sees
        try:
            logits = model(
                nodes.ids[None],
                past_key_values=cache,
                position_ids=(seen + nodes.depth)[None],
                attention_mask=torch.ones(1, seen + len(nodes.ids), dtype=torch.long, device=text.device),
            ).logits[0]
        finally:
            tree.ancestors = None
        node: int | None = 0
        path = []
        while node is not None:
            path.append(node)
            token = likeliest(processors, text, logits[node : node + 1])
            text = torch.cat([text, token[None]], 1)
            node = None if bool(stop(text, None).all()) else nodes.child(node, int(token))
        return text, torch.tensor(path, device=text.device)


def likeliest(processors: Any, text: Tensor, logits: Tensor) -> Tensor:
    """The token (1,) that greedy decoding writes behind a text (1, N)."""
    return processors(text, logits.float()).argmax(-1)


@method(
    "longspec",
    papers=("LongSpec",),
    tiny={"window": 6, "tree": (2, 3, 2)},
    full_budget={},
)
def longspec(draft: Draft | None = None, window: int = 512, tree: Sequence[int] = (4, 16, 16, 16, 16)) -> Method:
    """LongSpec: a small model drafts trees of tokens, the model verifies each in one call, and greedy output stays.

    The ``draft`` is one layer: self-attention over the last ``window`` tokens, so that its cache stays as large however
    long the text, and cross-attention to the keys and values that the model's last layer has anyway.
    `foveate.methods.longspec_draft` has the layer and its loss, on short texts at positions of long ones (anchor-offset
    indices); None takes an untrained one, whose drafts are seldom right. ``tree`` is how many nodes each level has. The
    model reads its long text without a mask and the tree by one, merged exactly (hybrid tree attention). Rows of a
    batch are written one after the other.

    Yang et al., LongSpec: Long-Context Lossless Speculative Decoding with Efficient Drafting and Verification,
    arXiv 2502.17421. The layer is that of the authors' code; there is no GPU kernel here for the tree.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model, prompt = LlamaForCausalLM(small).double().eval(), torch.arange(1, 9).view(1, 8)
    >>> options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    >>> plain = model.generate(prompt, **options)
    >>> change = longspec(window=16, tree=(2, 2)).install(model)
    >>> torch.equal(model.generate(prompt, **options), plain)
    True
    >>> change.undo()
    """
    widths = whole_numbers("nodes of each level of the tree", tree)
    if not widths or min(widths) < 1 or window < 1:
        raise ValueError(f"window and every level of the tree are at least 1; got {window} and {list(widths)}")
    if draft is not None and not isinstance(draft, Draft):
        raise TypeError(f"draft is a Draft of foveate.methods.longspec_draft, or None; got {type(draft).__name__}")
    return LongSpec(draft, window, widths)
