"""What transformers calls in the place of a model's attention: the layer's swaps, over what its model lets it see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.adapt.hf.own_function import unknown_options
from foveate.adapt.hf.pattern_mask import PatternMask
from foveate.adapt.hf.placed import MEMORY, Token, at_work, record_of
from foveate.adapt.hf.stacked import attend_stacked
from foveate.attention import softmax
from foveate.patterns import Packed, Pattern, causal, full, window
from foveate.patterns.compound import leaves

try:  # by which transformers 5 hands out weights
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    _active_collector = None  # type: ignore[assignment]

_WEIGHTS_UP_TO = 2048  # keys: more weights than these pairs of a head are not handed out


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Query (B, H, N, D), key and value (B, G, M, D) in; (B, N, H, Dv) out, and the weights if they are asked for."""
    _refuse(module, kwargs)
    options: dict[str, Any] = {
        "weights": "softmax" if s_aux is None else softmax(sink=s_aux),
        "scale": scaling,
        "softcap": softcap,
    }
    if MEMORY in module.__dict__:
        from foveate.adapt.hf.memory import attend_remembered

        if _weights_asked(module, kwargs):
            raise ValueError("a method that keeps a part of the text hands out no weights: undo it for these")
        run = partial(attend_stacked, at_work(module, None))
        heads = attend_remembered(
            module, query, key, value, attention_mask, sliding_window, options | {"bias": position_bias}, run
        )
        return heads.transpose(1, 2).contiguous(), None
    if attention_mask is None:
        causal_here = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        within, bias = _own_limits(bool(causal_here), sliding_window), position_bias
    elif isinstance(attention_mask, PatternMask):
        within, num_keys = _carried(attention_mask, key.shape[2])
        key, value = key[:, :, :num_keys], value[:, :, :num_keys]
        bias = None if position_bias is None else position_bias[..., :num_keys]
    else:
        within, bias = full, _as_bias(module, attention_mask, key.shape[2], position_bias, query.dtype)
    options |= {"within": within, "bias": bias}
    if dropout and module.training:
        seed = torch.randint(2**62, (), dtype=torch.int64, device="cpu")  # one for the result and for its weights
        options |= {"dropout": dropout, "seed": seed}
    lengths = _packed_lengths(kwargs, query.shape[0], key.shape[2])
    if lengths is not None:
        options["layout"] = Packed(lengths)
    remembered = attention_mask.remembered if isinstance(attention_mask, PatternMask) else None
    tokens = at_work(module, remembered)
    out = attend_stacked(tokens, query, key, value, options)
    weights = None
    if _weights_asked(module, kwargs):
        weights = _weights(tokens, query, key, options)
    return out.transpose(1, 2).contiguous(), weights


def _weights_asked(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether anybody waits for weights. Some layers keep the question to themselves: GPT-2's, OPT's, StableLM's."""
    config = getattr(module, "config", None)
    collected = None
    if _active_collector is not None:
        collected = _active_collector.global_var if torch.compiler.is_compiling() else _active_collector.get()
    told = kwargs.get("output_attentions", getattr(config, "output_attentions", False))
    return bool(told) or any(key.endswith("attentions") for key in collected or ())


def _refuse(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Refuse, in words, what changes the result and is not supported."""
    unknown = [name for name in unknown_options(module) if kwargs.get(name) is not None]
    if kwargs.get("cache") is not None:
        unknown.append("cache (continuous batching)")
    if kwargs.get("seq_idx") is not None and kwargs.get("cu_seq_lens_q") is None:
        unknown.append("seq_idx without cu_seq_lens_q")
    if unknown:
        raise ValueError(f"attention of this model depends on {', '.join(unknown)}, which Foveate does not know")


def _own_limits(is_causal: bool, sliding_window: int | None) -> Pattern:
    """What a layer may see where its model builds no mask."""
    if not sliding_window or sliding_window < 2:
        return causal if is_causal else full
    return window(sliding_window - 1) & causal if is_causal else window(sliding_window - 1)


def _carried(mask: PatternMask, num_slots: int) -> tuple[Pattern, int]:
    if mask.shape[3] != num_slots:
        raise ValueError(f"the model made a mask for {mask.shape[3]} keys, but its attention has {num_slots}")
    return mask.pattern, mask.num_keys


def _as_bias(module: nn.Module, mask: Tensor, num_keys: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A ready-made mask (B, 1 or H, N, M), of booleans or of numbers to add, as what is added to the logits."""
    if mask.dim() != 4 or mask.shape[3] < num_keys:
        raise ValueError(f"a ready-made mask is (batch, 1 or heads, queries, {num_keys}); got {tuple(mask.shape)}")
    mask, lowest = mask[..., :num_keys], torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest)
    _check_whole(module, mask, lowest / 2)
    return mask if bias is None else mask + bias[..., :num_keys]


def _check_whole(module: nn.Module, mask: Tensor, hidden: float) -> None:
    """Refuse patterns of positions where a ready-made mask (B, H, N, M) hides padding or keeps documents apart.

    Logits that gain at most ``hidden`` are not seen.
    """
    record = record_of(module)
    looks = [] if record is None else [token.core.pattern for token in record.tokens if token.core.pattern != full]
    if not looks or not getattr(module, "is_causal", True):
        return
    seen = mask > hidden  # not sooner: most layers have no pattern that asks
    if bool((~seen).all(2).any()):
        trouble = "hides some keys from all queries"
    elif any(_counts_positions(pattern) for pattern in looks) and _has_documents(seen):
        trouble = "keeps several documents apart"
    else:
        return
    raise ValueError(
        f"attention was given a ready-made mask that {trouble}, so that nothing says which positions {looks[-1]} "
        "counts from: pass the 2-D mask, or the position_ids of the documents, to the model instead"
    )


def _counts_positions(pattern: Pattern) -> bool:
    return any(leaf.is_dynamic or leaf.depends_on == "position" for leaf in leaves(pattern))


def _has_documents(seen: Tensor) -> bool:
    """Whether a table (B, H, N, N) falls into blocks along its diagonal that see nothing of one another."""
    if seen.shape[2] != seen.shape[3]:
        return False
    either = (seen | seen.mT).any(1)
    farthest = torch.where(either, torch.arange(seen.shape[3], device=seen.device), -1).amax(2).cummax(1).values
    ends = farthest <= torch.arange(seen.shape[2], device=seen.device)
    return bool(ends[:, :-1].any())


def _packed_lengths(kwargs: Mapping[str, Any], batch: int, num_keys: int) -> tuple[int, ...] | None:
    """Lengths of documents that lie in one row, told by where each begins and the last ends."""
    starts, of_keys = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if starts is None:
        return None
    if starts.dtype == torch.uint8:  # whose differences wrap
        starts = starts.long()
    if of_keys is not None and not torch.equal(starts, of_keys):
        raise ValueError("packed documents have as many keys as queries; got cu_seq_lens_q unlike cu_seq_lens_k")
    lengths = tuple(starts.diff().tolist())
    if batch != 1 or int(starts[0]) != 0 or sum(lengths) != num_keys or min(lengths, default=-1) < 0:
        raise ValueError(
            f"cu_seq_lens_q counts from 0 to the {num_keys} tokens of one row, without a cache; got {starts.tolist()} "
            f"for a batch of {batch}"
        )
    return lengths


def _weights(tokens: Sequence[Token], query: Tensor, key: Tensor, options: dict[str, Any]) -> Tensor:
    """Weights (B, H, N, M), as what attention makes of the values 1, one for each key."""
    num_keys = key.shape[2]
    if num_keys > _WEIGHTS_UP_TO:
        raise ValueError(
            f"output_attentions=True forms all weights, which Foveate does for up to {_WEIGHTS_UP_TO} keys; here are "
            f"{num_keys}"
        )
    one_each = torch.eye(num_keys, dtype=query.dtype, device=query.device).expand(query.shape[0], 1, -1, -1)
    return attend_stacked(tokens, query, key, one_each, options, count=False)
