"""BlindSight: heads of vision-language models read prompts of several images by classes told beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.adapt.swap import use
from foveate.catalogue.contracts import Method
from foveate.catalogue.tiers import method
from foveate.methods.prefill import FOR_PROMPTS
from foveate.mixers.core import PatternCore, PromptCore
from foveate.patterns import per_head
from foveate.patterns.rules.segments import HeadClass, image_segments

if TYPE_CHECKING:
    from torch import nn

Images = Sequence[tuple[int, int]]
SPARSEST_FIRST: tuple[HeadClass, ...] = ("sink", "document_sink", "document")


class Changes:
    """Swaps of several layers, undone together."""

    def __init__(self, swaps: list[Any]) -> None:
        self.swaps = swaps

    def undo(self) -> None:
        """Give every layer its own attention back."""
        for swap in reversed(self.swaps):
            swap.undo()


@dataclass(frozen=True)
class BlindSight:
    """Head classes over a prompt's images; see :func:`blindsight`."""

    images: tuple[tuple[int, int], ...]
    classes: HeadClass | tuple[tuple[HeadClass, ...], ...]
    sinks: int

    def install(self, model: nn.Module) -> Changes:
        """Let prompts be read so from now on.

        Raises ValueError where the classes are for another number of layers.
        """
        depth = model.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]
        if isinstance(self.classes, str):
            core = PromptCore(PatternCore(image_segments(self.images, self.classes, self.sinks)))
            return Changes([use(model, core)])
        if len(self.classes) != depth:
            raise ValueError(f"classes are told for each of {depth} layers; got {len(self.classes)} layers")
        swaps = []
        for layer, kinds in enumerate(self.classes):
            pattern = per_head([image_segments(self.images, kind, self.sinks) for kind in kinds])
            swaps.append(use(model, PromptCore(PatternCore(pattern)), layers=[layer]))
        return Changes(swaps)


@method(
    "blindsight",
    papers=("BlindSight",),
    tiny={"images": ((2, 6), (9, 5), (15, 9)), "classes": "document_sink"},
    full_budget={"classes": "dense"},
    exempt={"decoding": FOR_PROMPTS},
)
def blindsight(
    images: Iterable[tuple[int, int]],
    classes: HeadClass | Iterable[Iterable[HeadClass]] = "document_sink",
    sinks: int = 1,
) -> Method:
    """Each head reads a prompt of text and images by its class: dense, sinks of images, own image, or both.

    ``images`` are the (first position, tokens) of each image, as the prompt's template has them; ``classes`` one class
    for all heads, or one for each head of each layer, as :func:`classify_heads` finds them. Tokens that are written
    attend to everything.

    BlindSight: Harnessing Sparsity for Efficient VLMs, arXiv 2507.09071. The authors' code was not at
    hand: that text reading for text sees all images in ``document`` heads and their sinks alone in the two others, that
    sinks are an image's first tokens, and the rule by which heads are classified, were chosen here.

    >>> blindsight([(3, 16), (20, 16)], "document").images
    ((3, 16), (20, 16))
    """
    placed = tuple((int(start), int(count)) for start, count in images)
    kinds = classes if isinstance(classes, str) else tuple(tuple(layer) for layer in classes)
    for kind in [kinds] if isinstance(kinds, str) else [kind for layer in kinds for kind in layer]:
        image_segments(placed, kind, sinks)
    return BlindSight(placed, kinds, sinks)


@torch.no_grad()
def classify_heads(
    model: Any, samples: Iterable[tuple[Tensor, Images]], *, mass: float = 0.95, sinks: int = 1
) -> list[list[HeadClass]]:
    """For each head of each layer the sparsest class that keeps a share ``mass`` of its attention, on average.

    Samples are tokens (1, N) and the images in them; where images lie may differ from one to another. A head whose
    attention no class keeps is ``dense``. The model must be able to return its attention maps
    (``attn_implementation="eager"``, which it is given for the time being).

    Raises ValueError for no samples.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    totals, count = None, 0
    try:
        for tokens, images in samples:
            maps = model(tokens, output_attentions=True).attentions
            shares = torch.stack([kept_by_class(own, images, sinks) for own in maps])  # (layers, classes, heads)
            totals, count = shares if totals is None else totals + shares, count + 1
    finally:
        model.set_attn_implementation(before)
    if totals is None:
        raise ValueError("heads are classified by their attention to samples; got none")
    enough = totals / count >= mass
    return [
        [
            next((kind for kind, ok in zip(SPARSEST_FIRST, head, strict=True) if ok), "dense")
            for head in layer.T.tolist()
        ]
        for layer in enough
    ]


def kept_by_class(attention: Tensor, images: Images, sinks: int) -> Tensor:
    """The share (classes, H) of attention (1, H, N, N) that each class keeps, from the sparsest on."""
    length = attention.shape[-1]
    masks = [image_segments(tuple(images), kind, sinks).mask(length)[0, 0] for kind in SPARSEST_FIRST]
    return torch.stack([(attention[0] * mask.to(attention.device)).sum(-1).mean(-1) for mask in masks])
