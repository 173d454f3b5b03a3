"""The exact-attention operator."""

from foveate.attention.api import ATTEND, attend, attend_partial
from foveate.attention.bias import Bias, alibi, alibi_slopes, log_decay, relative_table
from foveate.attention.partial import Partial, merge
from foveate.attention.score import score_function
from foveate.attention.talking import attend_talking
from foveate.attention.weights import Weights, entmax, entmax15, qr_squared, relu, sigmoid, sinkhorn, softmax, sparsemax

__all__ = [
    "ATTEND",
    "Bias",
    "Partial",
    "Weights",
    "alibi",
    "alibi_slopes",
    "attend",
    "attend_partial",
    "attend_talking",
    "entmax",
    "entmax15",
    "log_decay",
    "merge",
    "qr_squared",
    "relative_table",
    "relu",
    "score_function",
    "sigmoid",
    "sinkhorn",
    "softmax",
    "sparsemax",
]
