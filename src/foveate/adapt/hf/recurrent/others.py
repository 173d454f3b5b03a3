"""Layers with a recurrence of their own kind: MiniMax, xLSTM, RWKV-4 and RecurrentGemma."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.adapt.hf.recurrent.layers import as_state, in_place_of, without_padding
from foveate.mixers.recurrent_ssm.rwkv4 import Averages, weighed_average
from foveate.recurrence import linear_scan, recur
from foveate.recurrence.linear.stabilise import stabilise

_SMALLEST = torch.finfo(torch.float32).tiny

States = tuple[Tensor, Tensor, Tensor]


@in_place_of("forward")
def _lightning(
    layer: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """MiniMax: linear attention with a constant decay for each head."""
    qkv = without_padding(layer.act_fn(layer.qkv_proj(hidden_states)), attention_mask)
    q, k, v = qkv.unflatten(2, (layer.num_attention_heads, 3, layer.head_dim)).transpose(1, 3).unbind(1)
    state = None if past_key_values is None else past_key_values.get_linear_cache(layer.layer_idx)
    state = None if state is None else as_state(state, v)
    out, state = recur(q, k, v, decay=-layer.slope_rate.flatten(), scale=1.0, state=state)
    if past_key_values is not None:
        past_key_values.set_linear_cache(layer.layer_idx, state.to(v.dtype))
    out = layer.norm(out.transpose(1, 2).flatten(2))
    return layer.out_proj(F.sigmoid(layer.output_gate(hidden_states)) * out), state


@in_place_of("forward")
def _mlstm(
    backend: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    igate: Tensor,
    fgate: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool | None = None,
    mode: str | None = None,
) -> Tensor | tuple[Tensor, States]:
    """xLSTM: a matrix memory with exponential gates, and a normaliser that is one more column of it."""
    unit = igate.new_zeros(igate.shape[:2]) if m_initial is None else m_initial[..., 0]
    stable = stabilise(F.logsigmoid(fgate.float()), igate.float(), unit=unit.float())
    memory = None
    if c_initial is not None and n_initial is not None:
        memory = torch.cat([c_initial, n_initial.unsqueeze(3)], dim=3).float()
    weighted = key.float() * stable.weight.unsqueeze(3)
    out, memory = recur(
        query.float(), weighted, F.pad(value.float(), (0, 1), value=1.0), decay=stable.decay, state=memory
    )
    size = torch.maximum(out[..., -1:].abs(), (-stable.after).exp().unsqueeze(3)) + backend.config.eps
    out = (out[..., :-1] / size).to(query.dtype)
    states = memory[..., :-1], memory[..., -1], stable.last.unsqueeze(2)
    return (out, states) if _wants_states(backend.config, mode, return_last_states) else out


def _wants_states(config: Any, mode: str | None, asked: bool | None) -> bool:
    if "inference" in (mode or config.mode):
        return True
    return config.return_last_states if asked is None else asked


@in_place_of("forward")
def _wkv(layer: Any, hidden: Tensor, state: Any = None, use_cache: bool = False) -> tuple[Tensor, Any]:
    """RWKV-4: averages with exponential weights; states (B, C, layers) of numerators, denominators and log-units."""
    receptance, key, value, state = layer.extract_key_value(hidden, state=state)
    averages = None
    if state is not None:
        *sums, unit = (held[..., layer.layer_id] for held in state[2:])
        averages = Averages(torch.cat(sums, dim=1), unit)
    decay = -layer.time_decay.float().exp()
    mean, averages = weighed_average(key.float(), value.float(), decay, layer.time_first, averages)
    if state is not None:
        for held, new in zip(state[2:], (*averages.sums.chunk(2, dim=1), averages.unit), strict=True):
            held[..., layer.layer_id] = new
    return layer.output(receptance * mean.to(hidden.dtype)), state


@in_place_of("_rnn_scan")
def _rg_lru(
    layer: Any,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """RecurrentGemma: a gated linear recurrence of every channel, which starts anew at position 0."""
    decay = recurrent_gate.float().clamp(_SMALLEST, 1.0).log().masked_fill(reset, -torch.inf)
    out, state = linear_scan(hidden_states.to(acc_dtype), decay, state=recurrent_states)
    return out.to(hidden_states.dtype), state


LAYERS = {
    "minimax": {"MiniMaxLightningAttention": _lightning},
    "xlstm": {"xLSTMBackend": _mlstm},
    "rwkv": {"RwkvSelfAttention": _wkv},
    "recurrent_gemma": {"RecurrentGemmaRglru": _rg_lru},
}
