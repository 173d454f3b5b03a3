"""State tuning: a frozen RWKV-7 is adapted by the state it starts from, which kernel features may enlarge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.catalogue.registry import register
from foveate.mixers.recurrent import Inputs
from foveate.mixers.recurrent_ssm.rwkv7 import RWKV7
from foveate.mixers.stateful import Lengths
from foveate.recurrence import Recurrent, recur


@dataclass(frozen=True, eq=False)
class Lifted(Inputs):
    """Inputs as features, and as they were before."""

    plain: Inputs | None = None


@register(
    "state_tuning",
    papers=("State-Tuning",),
    formula="RWKV-7 from a learned S_0; enlarged: x ↦ exp(-γ |x - u_i|^2), i = 1…M, for r, k, v, w, a and κ",
    notes=(
        "What is read of an enlarged state becomes a vector again by interpolation through the support vectors, and "
        "the removal key's features are scaled to unit length, which keeps the state bounded; both are ours. Tokens "
        "see the one before them: padding lies at the ends of a sequence."
    ),
)
class StateTuning(RWKV7):
    """RWKV-7 whose state before the first token is a parameter, optionally of ``features`` kernel features a side.

    ``adapt`` makes one of a trained RWKV-7 and leaves nothing but that state to train:

    >>> tuned = adapt(RWKV7(64, heads=4), features=24)
    >>> [name for name, p in tuned.named_parameters() if p.requires_grad]
    ['initial']
    >>> tuned.initial.shape
    torch.Size([4, 24, 24])
    """

    supports: Tensor
    back: Tensor

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        *,
        features: int | None = None,
        sharpness: float = 0.5,
        rank: int = 64,
        causal: bool = True,
    ) -> None:
        if features is not None and features < 1:
            raise ValueError(f"features is the number of support vectors of each head, at least 1; got {features}")
        if not sharpness > 0:
            raise ValueError(f"sharpness is the kernel's γ, above 0; got {sharpness}")
        self.features, self.sharpness = features, sharpness
        super().__init__(dim, heads, rank=rank, initial=True, causal=causal)
        if features is not None:
            self.register_buffer("supports", torch.empty(heads, features, self.head_dim))
            self.register_buffer("back", torch.empty(heads, features, self.head_dim))
            self.support(torch.randn(heads, features, self.head_dim))

    def support(self, vectors: Tensor) -> None:
        """Choose the support vectors (H, M, D), such as cluster centres of keys."""
        if vectors.shape != self.supports.shape:
            raise ValueError(f"support vectors are {tuple(self.supports.shape)}; got {tuple(vectors.shape)}")
        self.supports.copy_(vectors)
        exact = vectors.double()
        self.back.copy_(torch.linalg.pinv(kernel(exact, exact, self.sharpness)) @ exact)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        size = self.features or super().state_shape[1]
        return self.heads, size, size

    def inputs(self, *seen: Tensor) -> Inputs:
        parts = self.parts(*seen)
        plain = self.turned(*parts)
        if self.features is None:
            return plain
        r, k, v, decay, removal, rate = parts
        features = (kernel(y, self.supports, self.sharpness) for y in (r, k, v, normalize(removal, dim=-1), rate))
        r, k, v, removal, rate = features
        decay = -self.sharpness * distances(decay.exp(), self.supports)
        return Lifted(**vars(self.turned(r, k, v, decay, removal, rate)), plain=plain)

    def recall(self, inputs: Inputs, state: Tensor, lengths: Lengths) -> Recurrent:
        if not isinstance(inputs, Lifted):
            return super().recall(inputs, state, lengths)
        given = {name: value for name, value in vars(inputs).items() if name != "plain"}
        out, state = recur(**given, state=state, lengths=lengths)
        return Recurrent(out @ self.back.to(out.dtype), state)

    def gated(self, normed: Tensor, inputs: Inputs, seen: Tensor) -> Tensor:
        plain = inputs.plain if isinstance(inputs, Lifted) else inputs
        assert plain is not None
        return super().gated(normed, plain, seen)


def kernel(x: Tensor, supports: Tensor, sharpness: float) -> Tensor:
    """Gaussian features exp(-γ |x - u_i|^2), (..., H, N, M), of x (..., H, N, D) for supports (H, M, D)."""
    return (-sharpness * distances(x, supports)).exp()


def distances(x: Tensor, supports: Tensor) -> Tensor:
    """Squared distances (..., H, N, M) of x (..., H, N, D) to supports (H, M, D)."""
    supports = supports.to(x.dtype)
    squares = x.square().sum(-1, keepdim=True) + supports.square().sum(-1).unsqueeze(-2)
    return (squares - 2 * x @ supports.mT).clamp(min=0)


def adapt(mixer: RWKV7, *, features: int | None = None, sharpness: float = 0.5) -> StateTuning:
    """A copy of a trained RWKV-7 mixer of which only the initial state is trained; without features it starts equal."""
    rank = mixer.to_rate.down.out_features
    tuned = StateTuning(mixer.dim, mixer.heads, rank=rank, features=features, sharpness=sharpness).to(mixer.weight)
    theirs = {name: value for name, value in mixer.state_dict().items() if name != "initial" or features is None}
    tuned.load_state_dict(theirs, strict=False)
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_(name == "initial")
    return tuned
