"""RefAM: where in an image a text looks, by cross-attention maps freed of words that draw attention from everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from foveate.catalogue.contracts import Hook
from foveate.catalogue.tiers import hook
from foveate.patterns import Grid, boolean_mask
from foveate.patterns.rules.choose import NEVER, score
from foveate.precision import to_accum

Handling = Literal["keep", "suppress", "redirect"]


@hook("refam", papers=("RefAM",), tiny={"height": 5, "width": 4, "words": 11, "sinks": (0, 7)}, uses=("image", "video"))
def refam(height: int = 64, width: int = 64, words: int = 64, sinks: Sequence[int] = (0,)) -> Hook:
    """RefAM's cross-attention: image tokens see the words of a text, global attention sinks suppressed.

    ``words`` are the expression's tokens and the stop words appended to it, ``sinks`` the numbers of those that draw
    attention from the whole image (`global_sinks` finds them). `token_maps` returns what each word is given.
    Kukleva et al., RefAM: Attention Magnets for Zero-Shot Referral Segmentation, arXiv 2509.22650; sizes are ours.
    """
    if not set(sinks) < set(range(words)):
        raise ValueError(f"sinks are some of the words, numbered from 0 to {words - 1}; got {list(sinks)}")
    seen = torch.ones(words, dtype=torch.bool)
    seen[list(sinks)] = False
    pattern = boolean_mask(seen.expand(height * width, -1))
    return Hook(pattern, heads=24, head_dim=64, length=words, queries=Grid(height, width).length)


def token_maps(
    q: Tensor,
    k: Tensor,
    *,
    sinks: Sequence[int] = (),
    auxiliary: Sequence[int] = (),
    handling: Handling = "suppress",
    scale: float | None = None,
) -> Tensor:
    """What image tokens give each word, the mean over heads, (B, M, N), with sinks handled inside the softmax.

    Image queries q (B, H, N, D) attend to the words' keys k (B, G, M, D). With "suppress" the words ``sinks`` are left
    out, so that the others share all; with "redirect" each query's share for them goes to the ``auxiliary`` words
    (appended stop words), in proportion to what these have: every other word keeps the weight it had. "keep" leaves
    weights as they are. Filtering maps, and segmenting by them, is up to the caller, as is the mean over layers and
    steps. Redirecting in proportion is the reading taken here: the paper's formula was not found.

    >>> q, k = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 5, 4)
    >>> maps = token_maps(q, k, sinks=[0], auxiliary=[3, 4], handling="redirect")
    >>> maps.shape, bool((maps[:, 0] == 0).all()), torch.allclose(maps.sum(1), torch.ones(1, 6))
    (torch.Size([1, 5, 6]), True, True)

    Raises ValueError for words that there are not, words that are both, a redirection to none, and where no word would
    be left.
    """
    count = k.shape[2]
    if any(not 0 <= one < count for one in (*sinks, *auxiliary)) or set(sinks) & set(auxiliary):
        raise ValueError(
            f"sinks and auxiliary words are below {count}, none of both; got {list(sinks)} and {list(auxiliary)}"
        )
    if handling not in ("keep", "suppress", "redirect"):
        raise ValueError(f'sinks are handled by "keep", "suppress" or "redirect"; got {handling!r}')
    if sinks and (len(set(sinks)) == count or (handling == "redirect" and not auxiliary)):
        raise ValueError(f"the weight of {len(set(sinks))} sinks of {count} words has nowhere to go")
    logits = score(q, to_accum(k)) * (q.shape[3] ** -0.5 if scale is None else scale)
    if handling == "keep" or not sinks:
        return logits.softmax(-1).mean(1).mT
    drawn, given = list(sinks), list(auxiliary)
    if handling == "redirect":  # the same softmax, whose auxiliary logits grow by the log of what they gain
        gain = logits[..., [*drawn, *given]].logsumexp(-1, True) - logits[..., given].logsumexp(-1, True)
        added = torch.zeros_like(logits)
        added[..., given] = gain.expand(*gain.shape[:-1], len(given))
        logits = logits + added
    hidden = torch.zeros(count, dtype=torch.bool, device=logits.device)
    hidden[drawn] = True
    return logits.masked_fill(hidden, NEVER).softmax(-1).mean(1).mT


def global_sinks(maps: Tensor, *, factor: float = 2.0) -> list[list[int]]:
    """Words that draw more than ``factor`` times their share from nearly all of an image, for each entry of the batch.

    ``maps`` (B, M, N) are those of `token_maps`. A word is a sink if at least nine in ten of the queries give it more
    than factor / M. The paper's criterion was not found.

    >>> global_sinks(torch.tensor([[[0.8, 0.9], [0.1, 0.05], [0.1, 0.05]]]))
    [[0]]
    """
    drawn = (maps > factor / maps.shape[1]).double().mean(-1) >= 0.9
    return [row.nonzero().squeeze(1).tolist() for row in drawn]
