"""flash-linear-attention's functions by their names and arguments (version 0.6), over `recur`, on any device.

>>> import torch
>>> from foveate.compat.fla import chunk_gla  # in place of: from fla.ops.gla import chunk_gla
>>> q, k, v = (torch.randn(1, 100, 4, 16) for _ in range(3))
>>> o, final_state = chunk_gla(q, k, v, torch.nn.functional.logsigmoid(q), output_final_state=True)
>>> o.shape, final_state.shape
(torch.Size([1, 100, 4, 16]), torch.Size([1, 4, 16, 16]))
"""

from foveate.compat.fla.comba import chunk_comba, fused_recurrent_comba
from foveate.compat.fla.constant import (
    chunk_lightning_attn,
    chunk_retention,
    fused_chunk_retention,
    fused_recurrent_lightning_attn,
    fused_recurrent_retention,
    parallel_retention,
)
from foveate.compat.fla.delta import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_gdn,
    chunk_kda,
    fused_chunk_delta_rule,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gdn,
    fused_recurrent_kda,
)
from foveate.compat.fla.delta_product import chunk_gated_delta_product
from foveate.compat.fla.forgetting import parallel_forgetting_attn
from foveate.compat.fla.gated import (
    chunk_gla,
    chunk_simple_gla,
    fused_chunk_gla,
    fused_chunk_simple_gla,
    fused_recurrent_gla,
    fused_recurrent_simple_gla,
    parallel_simple_gla,
)
from foveate.compat.fla.gates import fused_beta_sigmoid, fused_gdn_gate, fused_kda_gate
from foveate.compat.fla.gdn2 import chunk_gdn2, fused_recurrent_gdn2
from foveate.compat.fla.hgrn import chunk_hgrn, fused_recurrent_hgrn
from foveate.compat.fla.lightnet import chunk_lightnet, fused_additive_gate, fused_recurrent_lightnet
from foveate.compat.fla.linear import chunk_linear_attn, fused_chunk_linear_attn, fused_recurrent_linear_attn
from foveate.compat.fla.moba import parallel_moba
from foveate.compat.fla.nsa import naive_nsa, parallel_nsa
from foveate.compat.fla.polynomial import fused_chunk_based, parallel_based, parallel_rebased
from foveate.compat.fla.rwkv import (
    chunk_dplr_delta_rule,
    chunk_iplr_delta_rule,
    chunk_rwkv6,
    chunk_rwkv7,
    fused_mul_recurrent_rwkv7,
    fused_recurrent_dplr_delta_rule,
    fused_recurrent_iplr_delta_rule,
    fused_recurrent_rwkv6,
    fused_recurrent_rwkv7,
)
from foveate.compat.fla.rwkv4 import fused_recurrent_rwkv4

__all__ = [
    "chunk_comba",
    "chunk_delta_rule",
    "chunk_dplr_delta_rule",
    "chunk_gated_delta_product",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "chunk_gdn2",
    "chunk_gla",
    "chunk_hgrn",
    "chunk_iplr_delta_rule",
    "chunk_kda",
    "chunk_lightnet",
    "chunk_lightning_attn",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_rwkv6",
    "chunk_rwkv7",
    "chunk_simple_gla",
    "fused_additive_gate",
    "fused_beta_sigmoid",
    "fused_chunk_based",
    "fused_chunk_delta_rule",
    "fused_chunk_gla",
    "fused_chunk_linear_attn",
    "fused_chunk_retention",
    "fused_chunk_simple_gla",
    "fused_gdn_gate",
    "fused_kda_gate",
    "fused_mul_recurrent_rwkv7",
    "fused_recurrent_comba",
    "fused_recurrent_delta_rule",
    "fused_recurrent_dplr_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_gdn2",
    "fused_recurrent_gla",
    "fused_recurrent_hgrn",
    "fused_recurrent_iplr_delta_rule",
    "fused_recurrent_kda",
    "fused_recurrent_lightnet",
    "fused_recurrent_lightning_attn",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_rwkv4",
    "fused_recurrent_rwkv6",
    "fused_recurrent_rwkv7",
    "fused_recurrent_simple_gla",
    "naive_nsa",
    "parallel_based",
    "parallel_forgetting_attn",
    "parallel_moba",
    "parallel_nsa",
    "parallel_rebased",
    "parallel_retention",
    "parallel_simple_gla",
]
