"""A mechanism of one's own: a pattern, a mixer around it, and every check the library knows.

Each query sees the keys at Fibonacci distances 0, 1, 2, 3, 5, 8, 13, ...: about 1.44 log2(N) keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.catalogue.registry import Reference, register
from foveate.mixers.attention import AttentionMixer
from foveate.mixers.core import PatternCore
from foveate.patterns.rules.sequence import ByDistance
from foveate.testing import check_mixer

DISTANCES = [0, 1]
while DISTANCES[-1] < 2**31:
    DISTANCES.append(DISTANCES[-1] + DISTANCES[-2] if len(DISTANCES) > 2 else 2)


@dataclass(frozen=True, eq=False, repr=False)
class Fibonacci(ByDistance):
    """The keys at Fibonacci distances before the query, and the query's own."""

    text = "fibonacci"
    sees_future = False

    def visible(self, batch, head, q: Tensor, k: Tensor) -> Tensor:
        return torch.isin(q - k, torch.tensor(DISTANCES, device=q.device))


@register(
    "fibonacci",
    papers=None,
    reference=Reference("You", "Attention at Fibonacci distances", "0000.00000"),
    family="static-sparse",
    formula="o_i = sum_j softmax_j(q_i k_j / sqrt(d)) v_j over i - j in {0, 1, 2, 3, 5, 8, ...}",
    supports={"causal", "padding", "packed", "decode", "gqa"},
    core=lambda: PatternCore(Fibonacci()),
)
class FibonacciAttention(AttentionMixer):
    """Attention to keys at Fibonacci distances."""

    def __init__(self, dim: int, heads: int = 8, **options) -> None:
        super().__init__(dim, heads, core=PatternCore(Fibonacci()), **options)


check_mixer("fibonacci")
mixer = FibonacciAttention(64, heads=4)
print(Fibonacci().draw(24))
print(f"{mixer.flops(8192) / mixer.flops(1024):.1f} times the work for 8 times the tokens")
