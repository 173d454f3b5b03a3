"""DeciMamba: Mamba over the tokens with the greatest step sizes."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor

from foveate.catalogue.registry import register
from foveate.mixers.base import StepOutput
from foveate.mixers.recurrent_ssm.mamba import Mamba, MambaOptions, MambaState, SSMParams
from foveate.mixers.stateful import Lengths


class Decimated(NamedTuple):
    """What a layer says of the tokens it kept, (B, P, C), their positions (B, P), and the state after them."""

    out: Tensor
    kept: Tensor
    state: MambaState


@register(
    "decimamba",
    papers=("DeciMamba",),
    formula="out = scan(u_t for t among the P greatest mean_c Δ_tc, in order), 0 elsewhere",
    supports={"causal", "padding"},
    notes=(
        "Has no parameters but Mamba's, whose weights it takes. Tokens are dropped from a prompt: decoding goes on "
        "from prefill(x), token by token, as with mamba. The authors' code takes the norm of Δ in place of its mean."
    ),
)
class DeciMamba(Mamba):
    """Mamba whose scan sees only the ``keep`` tokens with the greatest step sizes, in their order.

    The ``last`` tokens, which ask or answer, are among them in any case; the convolution still reads every token.
    In a stack, :func:`tokens_to_keep` says how many for each layer; ``decimate`` hands on the kept tokens only, so
    that deeper layers are shorter.

    >>> trained = Mamba(64)
    >>> mixer = DeciMamba(64, keep=20)
    >>> mixer.load_state_dict(trained.state_dict())
    <All keys matched successfully>
    >>> mixer.decimate(torch.randn(2, 50, 64)).out.shape
    torch.Size([2, 20, 64])
    """

    tiny: ClassVar[dict[str, Any]] = {"keep": 11}
    exempt: ClassVar[dict[str, str]] = {"causality": "which tokens are kept depends on the step sizes of all of them"}

    def __init__(self, dim: int, *, keep: int = 2048, last: int = 1, **mamba: Unpack[MambaOptions]) -> None:
        super().__init__(dim, **mamba)
        if not 0 <= last <= keep or keep < 1:
            raise ValueError(f"keep, at least 1, counts the last tokens, too; got keep={keep} and last={last}")
        self.keep, self.last = keep, last

    def run(self, x: Tensor, state: MambaState | None, lengths: Lengths, key_mask: Tensor | None) -> StepOutput:
        if x.shape[1] <= self.keep:
            return super().run(x, state, lengths, key_mask)
        out, kept, state = self.decimate(x, state, key_mask)
        spread = torch.zeros_like(x).scatter(1, kept.unsqueeze(-1).expand_as(out), out)
        return StepOutput(spread, state)

    def prefill(self, x: Tensor, state: MambaState | None = None) -> StepOutput:
        """Read a prompt x (B, N, C), decimated; ``decode`` then goes on from the state."""
        return super().prefill(x, self.empty_state(x.shape[0], None) if state is None else state)

    def decimate(self, x: Tensor, state: MambaState | None = None, key_mask: Tensor | None = None) -> Decimated:
        """The layer over x (B, N, C), at the tokens it keeps only."""
        before, tail = (None, None) if state is None else state
        u, gate = self.to_in(x).chunk(2, dim=-1)
        u, tail = self.branch.conv(u, tail)
        ssm = self.branch.ssm
        chosen = ssm.chosen(u, key_mask)
        importance = ssm.sizes(chosen).mean(-1).masked_fill(self.at_end(x, key_mask), torch.inf)  # (B, N)
        kept = importance.topk(min(self.keep, x.shape[1]), dim=1).indices.sort(dim=1).values
        u, gate, *choices = (gathered(each, kept) for each in (u, gate, *chosen))
        out, after = ssm.scan(u, SSMParams(*choices), gate=gate, state=before)
        return Decimated(self.to_out(out), kept, MambaState(after, tail))

    def at_end(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """Where the last real tokens are, (B, N)."""
        key_mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if key_mask is None else key_mask
        return key_mask & (key_mask.flip(1).cumsum(1).flip(1) <= self.last)


def tokens_to_keep(layers: int, base: int, *, fade: float = 0.75, least: int = 1) -> list[int]:
    """How many tokens each of the decimating layers keeps: ``base``, falling by ``fade`` with depth.

    >>> tokens_to_keep(4, 1000, fade=0.5, least=200)
    [1000, 500, 250, 200]
    """
    if not 0 < fade <= 1:
        raise ValueError(f"fade is the share of tokens kept from layer to layer, in (0, 1]; got {fade}")
    return [max(least, int(base * fade**layer)) for layer in range(layers)]


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of x (B, N, C) at positions (B, P)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
