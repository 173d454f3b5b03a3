"""Attention in chunks of queries and keys against attention to all at once, with every bias and weighting."""

from __future__ import annotations

import pytest
import torch
from tests.support.heads import agree, heads, qkv

from foveate import Packed, alibi, attend, causal, key_padding, relative_table, softmax
from foveate.mixers.exact_io.chunked import ChunkedCore
from foveate.patterns import full


@pytest.mark.parametrize(("query_chunk", "key_chunk"), [(1, 1), (7, 5), (64, None), (20, 100)])
@pytest.mark.parametrize("case", ["plain", "alibi", "dense", "table", "sink", "sigmoid", "softcap"])
def test_chunked_attention_is_attention(query_chunk: int, key_chunk: int | None, case: str) -> None:
    q, k, v = qkv(11, 17)
    slopes, dense, table = heads(4), heads(4, 11, 1), heads(4, 9)
    sink = heads(4)
    options = {
        "plain": {},
        "alibi": {"bias": alibi(slopes)},
        "dense": {"bias": dense},
        "table": {"bias": relative_table(table)},
        "sink": {"weights": softmax(sink=sink)},
        "sigmoid": {"weights": "sigmoid"},
        "softcap": {"softcap": 2.0, "scale": 0.7},
    }[case]
    got = ChunkedCore(query_chunk, key_chunk)(q, k, v, within=causal, **options)
    agree(got, attend(q, k, v, causal, impl="reference", **options), q, k, v, slopes, dense, table, sink)


def test_chunked_attention_survives_extreme_logits_and_keeps_to_padding_and_documents() -> None:
    q, k, v = qkv(23)
    real = torch.rand(2, 23) < 0.7
    real[0] = False
    big = (300 * q).detach().requires_grad_()
    for within, layout in ((causal & key_padding(real), None), (full, Packed([9, 0, 14]))):
        got = ChunkedCore(8, 5)(big, k, v, within=within, layout=layout)
        agree(got, attend(big, k, v, within, layout=layout, impl="reference"), big, k, v)
