"""Methods that make prompts sparse: the tokens that are then written attend to everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from foveate.catalogue.budget import MASS, Budget
from foveate.catalogue.contracts import Method
from foveate.catalogue.tiers import method
from foveate.methods.core import CoreMethod
from foveate.mixers.core import PatternCore, PromptCore
from foveate.patterns import sinks, window
from foveate.patterns.rules.chunks import chunk_budget
from foveate.patterns.rules.hierarchical import halved_ranges
from foveate.patterns.rules.proxies import proxy_blocks
from foveate.patterns.rules.stripes import sampled_columns, stripes

if TYPE_CHECKING:
    from foveate.adapt.hf.layers import Layers

FOR_PROMPTS = "it is for prompts: a token that is written attends to everything"
AHEAD = "it chooses for many queries of a prompt at once, the last among them"


@method(
    "sample_attention",
    papers=("SampleAttention",),
    tiny={"mass": 0.5, "rows": 0.2, "width": 0.1},
    full_budget={"mass": 1.0},
    budget=Budget("mass", levels=MASS),
    exempt={"decoding": FOR_PROMPTS, "causality": AHEAD},
)
def sample_attention(
    mass: float = 0.95, rows: float = 0.05, width: float = 0.08, layers: Layers | None = None
) -> Method:
    """SampleAttention: prompts attend to a window, and to the fewest keys that get ``mass`` of the weights of a sample.

    ``rows`` is the share of queries that are sampled, ``width`` the window as a share of the prompt; each head chooses
    its keys anew for each prompt. Zhu et al., SampleAttention, arXiv 2406.15486.

    >>> from foveate.methods.prefill import sample_attention
    >>> sample_attention(mass=0.9).core.pattern
    sampled_columns(0.9, rows=0.05, width=0.08)
    """
    return CoreMethod(PromptCore(PatternCore(sampled_columns(mass, rows=rows, width=width))), layers)


@method(
    "anchor_attention",
    papers=("AnchorAttention",),
    tiny={"theta": 1.0, "block": 3, "step": 2},
    full_budget={"theta": 1e9},
    budget=Budget("theta", levels=(1.0, 2.0, 4.0, 8.0, 12.0)),
    exempt={"decoding": FOR_PROMPTS, "causality": AHEAD},
)
def anchor_attention(theta: float = 12.0, block: int = 128, step: int = 16, layers: Layers | None = None) -> Method:
    """AnchorAttention: prompts attend to the first block, their own group, and keys that score near the best of them.

    ``theta`` is how far a key's logit may lie below the anchor, the mean over a block of queries of their best scores
    among the first ``block`` keys and the group of ``step`` blocks around them. The authors' code takes it in powers of
    two, where 12 is 8.3 here. Zhang et al., AnchorAttention, arXiv 2505.23520.

    >>> anchor_attention(theta=8.0).core.pattern
    stripes(8.0, block=128, step=16)
    """
    return CoreMethod(PromptCore(PatternCore(stripes(theta, block=block, step=step))), layers)


@method(
    "proxy_attention",
    papers=("ProxyAttn",),
    tiny={"mass": 0.4, "block": 4},
    full_budget={"mass": 1.0},
    budget=Budget("mass", levels=MASS),
    exempt={"decoding": FOR_PROMPTS, "causality": AHEAD},
)
def proxy_attention(mass: float = 0.95, block: int = 64, proxies: int = 1, layers: Layers | None = None) -> Method:
    """ProxyAttn: prompts attend to blocks that mean heads rank first, as many for each head as its last queries need.

    ``proxies`` groups of heads each have a mean head; ``mass`` is the share of a head's attention that its blocks hold.
    The paper's own mass and block were not verified. Wang et al., ProxyAttn, arXiv 2509.24745.

    >>> proxy_attention(mass=0.9).core.pattern
    proxy_blocks(0.9, block=64, proxies=1)
    """
    return CoreMethod(PromptCore(PatternCore(proxy_blocks(mass, block=block, proxies=proxies))), layers)


@method(
    "hip_attention",
    papers=("HiP",),
    tiny={"keys": 12, "q_block": 4, "k_block": 2, "first_keys": 2, "recent": 3, "dense_layers": 0},
    full_budget={"keys": 1 << 20},
    budget="keys",
    exempt={"decoding": "a block of queries chooses together, a token that is written for itself", "causality": AHEAD},
)
def hip_attention(
    keys: int = 512,
    q_block: int = 64,
    k_block: int = 16,
    first_keys: int = 16,
    recent: int = 64,
    dense_layers: int = 3,
) -> Method:
    """HiP: block-sparse attention to ``keys`` keys that a search by halves of ranges finds best, in O(T log T).

    Blocks of ``q_block`` queries choose blocks of ``k_block`` keys; the first keys and the recent ones are always seen,
    and the first ``dense_layers`` of the model stay as they are. Sizes other than ``keys`` are Foveate's.
    Lee et al., HiP Attention, arXiv 2406.09827.

    >>> hip_attention(keys=256, recent=32).core.pattern
    halved_ranges(256, q_block=64, k_block=16) | sinks(16) | window(31, 0)
    """
    pattern = halved_ranges(keys, q_block=q_block, k_block=k_block)
    pattern = pattern | sinks(first_keys) if first_keys else pattern
    pattern = pattern | window(recent - 1, 0) if recent > 1 else pattern
    return CoreMethod(PatternCore(pattern), slice(dense_layers, None) if dense_layers else None)


@method(
    "dhsa",
    papers=("DHSA",),
    tiny={"keys": 9, "chunk": 5},
    full_budget={"keys": 1 << 20},
    budget="keys",
    exempt={"decoding": "a chunk of queries chooses together, and texts that grow are cut anew", "causality": AHEAD},
)
def dhsa(
    keys: int = 2048, chunk: int = 64, starts: Sequence[int] | None = None, layers: Layers | None = None
) -> Method:
    """DHSA: each query attends to ``keys`` keys, those of the chunks of unequal lengths with the best pooled scores.

    Chunks begin at ``starts``, or where keys change most, ``chunk`` long on average: the paper has a small network
    trained for that. Its own budget was not verified. Xiong et al., DHSA, arXiv 2510.24606.

    >>> dhsa(keys=512).core.pattern
    chunk_budget(512, chunk=64)
    """
    return CoreMethod(PatternCore(chunk_budget(keys, chunk=chunk, starts=starts)), layers)
