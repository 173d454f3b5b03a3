"""What a few queries attend to, against dense softmax written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.attention import softmax
from foveate.cache.memory import Look
from foveate.cache.scores import last_rows, of_key_heads, weights_of_rows

N, D = 23, 6


def dense(q: Tensor, k: Tensor, place: Tensor, width: int | None, cap: float | None, sink: Tensor | None) -> Tensor:
    """(H, N, N) of one text, by loops."""
    out = torch.zeros(q.shape[0], N, N, dtype=q.dtype)
    for h in range(q.shape[0]):
        for i in range(N):
            seen = [j for j in range(N) if place[i] >= 0 and 0 <= place[j] <= place[i]]
            seen = [j for j in seen if width is None or place[i] - place[j] < width]
            logits = [0.4 * (q[h, i] @ k[h // 2, j]) for j in seen]
            logits = [x if cap is None else cap * torch.tanh(x / cap) for x in logits]
            weights = [x.exp() for x in logits]
            total = sum(weights) + (0.0 if sink is None else sink[h].exp())
            for j, weight in zip(seen, weights, strict=True):
                out[h, i, j] = weight / total
    return out


@pytest.mark.parametrize(
    ("width", "cap", "sink"), [(None, None, None), (5, None, None), (None, 1.5, None), (7, 2.0, 0.3)]
)
def test_weights_of_the_last_rows_are_those_of_dense_attention(
    width: int | None, cap: float | None, sink: float | None
) -> None:
    q, k = (torch.randn(2, heads, N, D, dtype=torch.float64) for heads in (4, 2))
    sinks = None if sink is None else torch.tensor([sink, -1.0, 0.0, 2.0], dtype=torch.float64)
    place = torch.stack([torch.arange(N), torch.cat([torch.full((18,), -1), torch.arange(N - 18)])])
    options = {"scale": 0.4, "softcap": cap, "weights": "softmax" if sinks is None else softmax(sink=sinks)}
    few, at = last_rows(q, Look(place, options, width), 7)
    got = weights_of_rows(few, k, place.unsqueeze(1).expand(-1, 2, -1), at)
    for entry in range(2):
        want = dense(q[entry], k[entry], place[entry], width, cap, sinks)[:, -7:]
        torch.testing.assert_close(got[entry], want)
    assert got[1, :, :2].eq(0).all()  # of the second text there are five
    torch.testing.assert_close(of_key_heads(got, 2)[:, 1], (got[:, 2] + got[:, 3]) / 2)


def test_rows_end_with_the_text_also_where_padding_follows() -> None:
    q = torch.randn(1, 1, 6, D)
    place = torch.tensor([[0, 1, 2, 3, -1, -1]])
    few, at = last_rows(q, Look(place, {}), 3)
    assert at.position.tolist() == [[1, 2, 3]]
    assert torch.equal(few, q[:, :, 1:4])


def test_other_weights_are_refused() -> None:
    look = Look(torch.tensor([[0]]), {"weights": "sigmoid"})
    with pytest.raises(NotImplementedError, match="softmax"):
        weights_of_rows(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.tensor([[[0]]]), look)
