"""Methods that read parts of a long context apart from one another."""

from __future__ import annotations

from collections.abc import Iterable

from foveate.cache.grouped import GroupedMemory
from foveate.catalogue.contracts import Method
from foveate.catalogue.tiers import method
from foveate.counts import whole_numbers
from foveate.methods.cached import CachedMethod


@method(
    "structured_prompting",
    papers=("Structured Prompting",),
    tiny={"lengths": (7, 5, 8)},
    full_budget={"lengths": (20,)},
)
def structured_prompting(lengths: Iterable[int]) -> Method:
    """Groups of demonstrations read apart, each ending at the same position; what follows sees all of them, rescaled.

    The text begins with groups of ``lengths`` tokens, which do not see one another: their cost is linear in their
    number. What follows has positions behind the longest group, and counts what it sees of itself as often as there are
    groups, so that more of these do not drown it. For models with rotary positions.

    Hao, Sun, Dong, Han, Gu, Wei, Structured Prompting: Scaling In-Context Learning to 1,000 Examples, arXiv 2212.06713.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> import torch
    >>> small = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    >>> model = LlamaForCausalLM(small).eval()
    >>> change = structured_prompting([12, 9]).install(model)
    >>> model.generate(torch.arange(30).view(1, 30), max_new_tokens=5, min_new_tokens=5, do_sample=False).shape
    torch.Size([1, 35])
    >>> change.undo()

    Raises ValueError for no groups, or one without tokens.
    """
    own = _lengths(lengths)
    return CachedMethod(lambda _: GroupedMemory(own, rescale=len(own), align_ends=True))


def parallel_context_windows(lengths: Iterable[int]) -> Method:
    """Parallel Context Windows: windows of a context read apart, beginning together; what follows sees all of them.

    As `structured_prompting`, but for where windows begin, and without any scale. Ratner et al., Parallel Context
    Windows for Large Language Models, arXiv 2212.10947.
    """
    own = _lengths(lengths)
    return CachedMethod(lambda _: GroupedMemory(own, rescale=1.0, align_ends=False))


def _lengths(lengths: Iterable[int]) -> tuple[int, ...]:
    own = whole_numbers("lengths of the groups", lengths)
    if not own or min(own) < 1:
        raise ValueError(f"a context has groups of at least one token each; got {list(own)}")
    return own
