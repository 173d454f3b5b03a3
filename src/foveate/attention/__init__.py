"""The exact-attention operator."""

from foveate.attention.api import IMPLEMENTATIONS, attend, attend_partial
from foveate.attention.bias import Bias, alibi, alibi_slopes, log_decay, relative_table
from foveate.attention.explain import Explanation, explain
from foveate.attention.partial import Partial, merge
from foveate.attention.weights import Weights, relu, sigmoid, softmax

__all__ = [
    "IMPLEMENTATIONS",
    "Bias",
    "Explanation",
    "Partial",
    "Weights",
    "alibi",
    "alibi_slopes",
    "attend",
    "attend_partial",
    "explain",
    "log_decay",
    "merge",
    "relative_table",
    "relu",
    "sigmoid",
    "softmax",
]
