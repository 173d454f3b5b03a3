"""SpargeAttn for prompts of language models; `SpargeCore` alone for whatever else attends."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from foveate.catalogue.budget import MASS, Budget
from foveate.catalogue.contracts import Method
from foveate.catalogue.tiers import method
from foveate.methods.core import CoreMethod
from foveate.methods.prefill import AHEAD, FOR_PROMPTS
from foveate.mixers.core import PromptCore
from foveate.mixers.dynamic_sparse.sparge import SpargeCore
from foveate.patterns.rules.similar import ByHead

if TYPE_CHECKING:
    from foveate.adapt.hf.layers import Layers


@method(
    "sparge_attention",
    papers=("SpargeAttn",),
    tiny={"tau": 0.5, "theta": 0.0, "lam": -0.5, "q_block": 4, "k_block": 2, "rows": 2},
    full_budget={"tau": 1.0, "theta": 1.0, "lam": -math.inf},
    budget=Budget("tau", levels=MASS),
    exempt={"decoding": FOR_PROMPTS, "causality": AHEAD},
    uses=("causal-lm", "encoder", "image", "video"),
)
def sparge_attention(
    tau: ByHead = 0.98,
    theta: ByHead = 0.6,
    lam: ByHead = -math.inf,
    q_block: int = 128,
    k_block: int = 64,
    rows: int = 32,
    sink: bool = True,
    layers: Layers | None = None,
) -> Method:
    """Prompts skip blocks that their means find needless, then values of tiles far below the best scores so far.

    ``tau`` is the share of the softmax over mean keys that blocks of keys hold, ``theta`` how alike the tokens of a
    block must be to be judged by their mean, ``lam`` how far below the best score so far values still count; each one
    number for all heads, or one a head as `foveate.mixers.dynamic_sparse.sparge_tuning.tune` finds them on a layer's
    own queries, keys and values. See `foveate.mixers.dynamic_sparse.sparge.SpargeCore`. Defaults are the authors'
    code's, whose lam of -50 skips what no float32 shows; products are exact, where the authors quantise them.

    Zhang et al., SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference, arXiv 2502.18137.

    >>> sparge_attention(tau=0.9).core.pattern
    similar_blocks(0.9, 0.6, q_block=128, k_block=64, causal=False)
    """
    return CoreMethod(PromptCore(SpargeCore(tau, theta, lam, q_block, k_block, rows, sink)), layers)
