"""transformers models: any mechanism as an entry of their registry of attention functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from foveate.adapt.recurrent import accelerate
from foveate.adapt.transformers_masks import PatternMask, pattern_mask
from foveate.attention import Weights, softmax
from foveate.patterns import Pattern, causal, full, window

if TYPE_CHECKING:
    from foveate.adapt.swap import Swap

__all__ = ["accelerate", "attention_function", "install"]

_FORBIDDEN = ("flash", "sdpa", "flex_attention", "/", "|", "paged", "eager")
_HARMLESS = {"position_ids", "cache_position", "position_embeddings"}
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")

_active: WeakKeyDictionary[nn.Module, Swap] = WeakKeyDictionary()


def install(model: nn.Module, swap: Swap, name: str) -> None:
    """Switch a model over to ``swap.core`` and teach ``swap`` the way back."""
    inner = pretrained(model)
    _check_name(name)
    if not inner._can_set_attn_implementation():
        raise ValueError(
            f"{type(inner).__name__} computes attention in its own code, without asking transformers for it, "
            "so it cannot be replaced"
        )
    _register(name)
    before = _implementations(inner.config)
    swap.on_undo(lambda: inner.set_attn_implementation(before))
    try:
        inner.set_attn_implementation(name)
    except BaseException:
        swap.undo()
        raise
    for module in inner.modules():
        _put_on(module, swap)


def _put_on(module: nn.Module, swap: Swap) -> None:
    before = _active.get(module)
    _active[module] = swap

    def back() -> None:
        if before is None:
            _active.pop(module, None)
        else:
            _active[module] = before

    swap.on_undo(back)


def pretrained(model: nn.Module) -> Any:
    """The transformers model itself, out of whatever wraps it (PEFT, torch.compile)."""
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise ImportError("adapting a model needs transformers: pip install 'foveate[hf]'") from error
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                return module
    raise TypeError(f"expected a transformers model; got {type(model).__name__}")


def _check_name(name: str) -> None:
    clash = next((part for part in _FORBIDDEN if part in name), None)
    if clash is not None or not name:
        raise ValueError(f"transformers gives {clash or 'an empty name'!r} a meaning of its own; got name={name!r}")


def _register(name: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention_function)
    AttentionMaskInterface.register(name, pattern_mask)


def _implementations(config: Any) -> str | dict[str, Any] | None:
    """The attention implementation of a configuration, and of those inside it by name."""
    inside = {key: getattr(config, key) for key in config.sub_configs if getattr(config, key) is not None}
    if not inside:
        return config._attn_implementation
    return {"": config._attn_implementation} | {key: _implementations(part) for key, part in inside.items()}


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
) -> tuple[Tensor, None]:
    """What transformers calls: query (B, H, N, D), key and value (B, G, M, D) in, (B, N, H, Dv) out."""
    _refuse(dropout, kwargs)
    swap = _active.get(module)
    if swap is None:
        raise ValueError(
            "this model is set to attend with Foveate, but is a copy of the one that was given a mechanism: "
            "call foveate.adapt.use(model, ...) on it"
        )
    swap.calls += 1
    if attention_mask is None:
        causal_here = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        within = _own_limits(bool(causal_here), sliding_window)
    else:
        within, num_keys = _carried(attention_mask, key.shape[2])
        key, value = key[:, :, :num_keys], value[:, :, :num_keys]
        position_bias = None if position_bias is None else position_bias[..., :num_keys]
    weights: Weights | str = "softmax" if s_aux is None else softmax(sink=s_aux)
    out = swap.core(
        query, key, value, within=within, bias=position_bias, weights=weights, scale=scaling, softcap=softcap
    )
    return out.transpose(1, 2).contiguous(), None


def _own_limits(is_causal: bool, sliding_window: int | None) -> Pattern:
    """What a layer may see where its model builds no mask."""
    if not sliding_window or sliding_window < 2:
        return causal if is_causal else full
    return window(sliding_window - 1) & causal if is_causal else window(sliding_window - 1)


def _carried(mask: Tensor, num_slots: int) -> tuple[Pattern, int]:
    if not isinstance(mask, PatternMask):
        raise ValueError(
            f"attention was given a ready-made mask of shape {tuple(mask.shape)}, but Foveate takes padding "
            "masks of shape (batch, length): pass the 2-D mask to the model instead"
        )
    if mask.shape[3] != num_slots:
        raise ValueError(f"the model made a mask for {mask.shape[3]} keys, but its attention has {num_slots}")
    return mask.pattern, mask.num_keys


def _refuse(dropout: float, kwargs: Mapping[str, Any]) -> None:
    """Refuse, in words, what changes the result and is not supported."""
    if dropout:
        raise ValueError(
            f"the model drops attention weights with probability {dropout}, which Foveate does not: set "
            "config.attention_dropout = 0 (and the layers' attention_dropout), or call model.eval()"
        )
    if any(kwargs.get(name) is not None for name in _PACKED):
        raise ValueError(
            "packed sequences given as cumulative lengths are not supported: pass position_ids that start "
            "again at 0 for each sequence, without attention_mask and with use_cache=False"
        )
    if kwargs.get("output_attentions"):
        raise ValueError("attention weights are never formed, so output_attentions=True cannot be served")
    unknown = [name for name, value in kwargs.items() if _changes_result(name, value)]
    if unknown:
        raise ValueError(f"attention of this model depends on {', '.join(unknown)}, which Foveate does not know")


def _changes_result(name: str, value: Any) -> bool:
    if name in _HARMLESS:
        return False
    return isinstance(value, Tensor) or (name == "cache" and value is not None)
