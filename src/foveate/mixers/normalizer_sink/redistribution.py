"""VAR: in heads that look at the image, weight that sinks take is given to the image's other tokens."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from foveate.attention import Partial, attend_partial
from foveate.cache.tokens import Tokens
from foveate.catalogue.registry import register
from foveate.mixers.attention import JUMPS, AttentionMixer
from foveate.mixers.base import StepOutput, join_heads
from foveate.mixers.core import joined
from foveate.patterns import Layout, Pattern, block_mask, causal, full
from foveate.precision import to_accum


class Redistribution(NamedTuple):
    """How much of a sink's weight it keeps (p), and which rows are changed: where visual sinks have at most the share
    ``rho`` of the weight on visual tokens, and these have at least ``least`` of all."""

    p: float = 0.6
    rho: float = 0.5
    least: float = 0.2


def sink_tokens(hidden: Tensor, dims: tuple[int, ...], tau: float = 20.0) -> Tensor:
    """Tokens (B, N) of hidden states (B, N, C) of which one of the sink dimensions exceeds tau times the token's rms.

    >>> sink_tokens(torch.tensor([[[1.0, 1.0, 1.0], [9.0, 1.0, 1.0]]]), (0,), tau=1.5)
    tensor([[False,  True]])
    """
    rms = to_accum(hidden).square().mean(-1, keepdim=True).add(1e-6).sqrt()
    return (to_accum(hidden[..., list(dims)]).abs() / rms).amax(-1) > tau


def redistribute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visual: Tensor,
    sinks: Tensor,
    rows: Tensor,
    pattern: Pattern = full,
    how: Redistribution | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention whose sinks keep a share p of their weight, and visual tokens that are no sinks take the rest.

    The weights themselves are never formed: attention over each group of keys returns the log of the group's sum of
    weights, and what moves between groups multiplies their outputs. So it runs on any implementation, on caches too.

    Args:
        q, k, v: (B, H, N, D), (B, G, M, D), (B, G, M, Dv).
        visual, sinks: keys (B or 1, M) that are the image's, and that are sinks, in the image or elsewhere.
        rows: queries (B or 1, N) that may be changed: the text after the image.
        pattern: which pairs are visible.
        how: p and the rows that are changed; of a row that is, all weights still sum to 1.

    Returns (B, H, N, Dv). Kang, Kim, Kim, Hwang, See What You Are Told: Visual Attention Sink in Large Multimodal
    Models, arXiv 2503.03321, as in the authors' code, where sinks of the text give weight, too.
    """
    how = how or Redistribution()
    groups = (visual & ~sinks, visual & sinks, ~visual & sinks, ~visual & ~sinks)
    parts = [_group(q, k, v, group, pattern, scale, impl) for group in groups]
    lse = torch.stack([part.lse for part in parts if part.lse is not None])
    empty = lse.isneginf().all(0)
    total = torch.where(empty, 0, torch.where(empty, 0, lse).logsumexp(0))
    clear, sunk, other_sunk, rest = torch.exp(lse - total)
    image = clear + sunk
    chosen = rows[:, None] & (visual & sinks).any(-1)[:, None, None] & (clear > 0)
    chosen = chosen & (image >= how.least) & (sunk <= how.rho * image)
    moved = torch.where(chosen, (1 - how.p) * (sunk + other_sunk), 0)
    sunk, other_sunk = (torch.where(chosen, how.p * share, share) for share in (sunk, other_sunk))
    shares = (clear + moved, sunk, other_sunk, rest)
    out = sum(share.unsqueeze(-1) * part.out for share, part in zip(shares, parts, strict=True))
    return out.to(q.dtype)  # type: ignore[union-attr]


def _group(q: Tensor, k: Tensor, v: Tensor, group: Tensor, pattern: Pattern, scale: float | None, impl: str) -> Partial:
    keys = block_mask(group[:, None, None].contiguous(), 1, q_block=max(q.shape[2], 1))
    return attend_partial(q, k, v, joined(keys, pattern), scale=scale, impl=impl)


@register(
    "visual_redistribution",
    papers=("VAR",),
    formula="o_i = Σ_j a'_ij v_j, a' = p a on sinks, a (1 + (1 - p) Σ_sinks a / Σ_clear a) on the image's other tokens",
    supports={"causal", "decode", "gqa"},
)
class VisualRedistribution(AttentionMixer):
    """Causal attention that takes weight off sinks and gives it to the image's other tokens, in heads that look there.

    ``image`` are the first position of the image's tokens and the first after them; ``sink_dims`` the dimensions in
    which the model's sinks have massive activations (2533 and 1415 in Llama 2 7B), and ``tau`` how massive, in root
    mean squares of the token. Queries after the image are changed, where ``rho`` and ``least`` say so; see
    :func:`redistribute`. Nothing is learned: the mixer stands for a pretrained layer's attention.
    """

    tiny: ClassVar[dict[str, Any]] = {"image": (4, 19), "sink_dims": (3,), "tau": 1.2, "rho": 0.6}
    full_budget: ClassVar[dict[str, Any] | None] = {"p": 1.0}
    exempt: ClassVar[dict[str, str]] = JUMPS

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        image: tuple[int, int] = (0, 0),
        sink_dims: tuple[int, ...] = (),
        tau: float = 20.0,
        p: float = 0.6,
        rho: float = 0.5,
        least: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(dim, heads, **options)
        if not 0 <= image[0] <= image[1]:
            raise ValueError(f"image is the first position of its tokens and the first after them; got {image}")
        if not 0 <= p <= 1 or any(not 0 <= each < dim for each in sink_dims):
            raise ValueError(f"p is a share, and sink_dims are below {dim}; got {p} and {sink_dims}")
        self.image, self.sink_dims, self.tau = image, sink_dims, tau
        self.how = Redistribution(p, rho, least)

    def mix(self, x: Tensor, context: Tensor | None, layout: Layout | None, padding: Tensor | None) -> Tensor:
        q, k, v = self.project(x, x)
        return self.to_out(join_heads(self._redistributed(q, k, v, self.sinks(x), 0)))

    def sinks(self, x: Tensor) -> Tensor:
        """Tokens (B, N) that are sinks."""
        if not self.sink_dims:
            return torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        return sink_tokens(x, self.sink_dims, self.tau)

    def _redistributed(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, first: int) -> Tensor:
        at = torch.arange(k.shape[2], device=k.device).unsqueeze(0)
        visual = (at >= self.image[0]) & (at < self.image[1])
        return redistribute(
            q, k, v, visual=visual, sinks=sinks, rows=at[:, first:] >= self.image[1], pattern=causal, how=self.how
        )

    # ---- decoding: beside keys and values, which of them are sinks ------------------------------------------

    def empty_state(self, batch: int, capacity: int | None) -> Tokens:  # type: ignore[override]
        return Tokens(batch, capacity)

    def mix_after(self, x: Tensor, state: Tokens) -> StepOutput:  # type: ignore[override]
        first = state.length
        q, k, v = self.project(x, x, first)
        state = state.append(k, v, self.sinks(x)[:, None, :, None].to(k.dtype))
        keys, values, sinks = state.tensors
        out = self._redistributed(q, keys, values, sinks[:, 0, :, 0] > 0, first)
        return StepOutput(self.to_out(join_heads(out)), state)

    def state_bytes(self, n: int) -> int:
        return n * (2 * self.kv_heads * self.head_dim + 1) * self.weight.element_size()
