"""Delta correction of sparse attention against its formula."""

from __future__ import annotations

import pytest
import torch
from tests.support.heads import agree, heads, qkv

from foveate import Packed, alibi, attend, causal
from foveate.mixers.normalizer_sink.streaming_llm import streaming_core
from foveate.mixers.static_sparse.delta_attention import DeltaCore, EveryQuery


@pytest.mark.paper("Delta Attention", "definition")
@pytest.mark.parametrize("stride", [1, 4, 100])
@pytest.mark.parametrize(("n", "m"), [(30, 30), (11, 30)])
def test_delta_attention_is_its_formula(stride: int, n: int, m: int) -> None:
    q, k, v = qkv(n, m)
    slopes, dense = heads(4), heads(4, n, m)
    base = streaming_core(sinks=1, window=4)
    for bias in (alibi(slopes), dense):
        got = DeltaCore(base, stride)(q, k, v, within=causal, bias=bias)
        sparse = attend(q, k, v, base.pattern & causal, bias=bias, impl="reference")
        exact = attend(q, k, v, causal, bias=bias, impl="reference")
        nearest = torch.arange(n) // stride * stride
        agree(got, sparse + (exact - sparse)[:, :, nearest], q, k, v, slopes, dense)
        if stride == 1:
            torch.testing.assert_close(got, exact)


def test_delta_correction_keeps_packed_sequences_apart() -> None:
    core, lengths = DeltaCore(stride=4), [9, 0, 14]
    q, k, v = torch.randn(3, 1, 2, 23, 8, dtype=torch.float64)
    parts = [core(*each, within=causal) for each in zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)]
    torch.testing.assert_close(core(q, k, v, within=causal, layout=Packed(lengths)), torch.cat(parts, 2))


def test_queries_at_the_stride_see_all_that_is_earlier() -> None:
    mask = (EveryQuery(3) & causal).mask(8)[0, 0]
    assert torch.equal(mask, torch.ones(8, 8).tril().bool() & (torch.arange(8) % 3 == 0).unsqueeze(1))
