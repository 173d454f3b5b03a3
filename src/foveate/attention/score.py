"""Functions of a logit and of where it stands, as attend applies them to every pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from foveate.patterns.algebra import Index


@dataclass(frozen=True, eq=False)
class ScoreFunction:
    """``fn(score, b, h, q, k, *tensors)``, see :func:`score_function`."""

    fn: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]

    def __call__(self, scores: Tensor, batch: Index, head: Index, q: Tensor, k: Tensor) -> Tensor:
        """The new scores of pairs whose indices broadcast to the shape of the scores."""
        found = self.fn(scores, batch, head, q, k, *self.tensors)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            what = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"a score function returns a float tensor of scores; got {what}")
        try:
            return found.to(scores.dtype).broadcast_to(scores.shape)
        except RuntimeError as error:
            shapes = f"{tuple(scores.shape)}, but it returned {tuple(found.shape)}"
            raise ValueError(f"a score function is elementwise: it was given scores {shapes}") from error

    def part(self, first_query: int, step: int, first_key: int) -> ScoreFunction:
        """The same function, asked about a part of the pairs."""

        def moved(scores: Tensor, batch: Index, head: Index, q: Tensor, k: Tensor, *tensors: Tensor) -> Tensor:
            return self.fn(scores, batch, head, first_query + step * q, first_key + k, *tensors)

        return replace(self, fn=moved)


def score_function(fn: Callable[..., Tensor], *tensors: Tensor) -> ScoreFunction:
    """A change of every logit: ``fn(score, b, h, q, k, *tensors) -> score``, given to ``attend(bias=...)``.

    It has the meaning of FlexAttention's score_mod (Dong et al., Flex Attention, arXiv 2412.05496): elementwise, from
    the scaled and soft-capped logit with all biases added, its batch entry, query head, query and key. These are
    integer tensors that broadcast against the scores; q counts from 0 to N - 1 and k from 0 to M - 1, slots of the
    call as they are, padding and other texts of a pack included. Several functions apply one after the other.

    Gradients flow to q, k and the tensors, and to whatever else ``fn`` closes over. It is asked about hidden pairs as
    well, whose answers count for nothing; where they are to have gradients, they must be finite there too. It runs on
    "reference" and, on GPUs, "flex".

    >>> import torch
    >>> from foveate import attend, causal
    >>> q = k = v = torch.randn(1, 2, 5, 8)
    >>> gain = torch.ones(2, requires_grad=True)
    >>> distant = score_function(lambda score, b, h, q, k, gain: score - gain[h] * (q - k).abs().sqrt(), gain)
    >>> attend(q, k, v, causal, bias=distant).sum().backward()
    >>> gain.grad.shape
    torch.Size([2])

    Raises TypeError for what is no function, or no tensor.
    """
    if not callable(fn):
        raise TypeError(f"score_function takes a function (score, b, h, q, k, *tensors); got {type(fn).__name__}")
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"a score function's further arguments are tensors; got {type(tensor).__name__}")
    return ScoreFunction(fn, tensors)
