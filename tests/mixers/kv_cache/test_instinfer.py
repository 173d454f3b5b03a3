"""Attention over stored pages against dense formulas, and SparF against loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.catalogue.registry import mixer

DIM, HEADS, GROUPS, SIZE = 24, 4, 2, 6


def made(random: bool, **options: Any) -> Any:
    layer = mixer("instinfer", dim=DIM, heads=HEADS, kv_heads=GROUPS, page=7, **options).double()
    if random:
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, std=0.6)
    return layer


def projected(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (H, N, D), k and v (H, N, D) of one text, keys repeated for their query heads."""
    w = dict(layer.named_parameters())
    q = (x @ w["to_q.weight"].T).view(len(x), HEADS, SIZE).transpose(0, 1)
    k, v = ((x @ w[f"to_{name}.weight"].T).view(len(x), GROUPS, SIZE).transpose(0, 1) for name in "kv")
    return q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)


def dense(layer: Any, x: Tensor) -> Tensor:
    q, k, v = projected(layer, x)
    hidden = torch.ones(len(x), len(x)).triu(1).bool()
    out = (q @ k.mT / SIZE**0.5).masked_fill(hidden, float("-inf")).softmax(-1) @ v
    return out.transpose(0, 1).reshape(len(x), -1) @ dict(layer.named_parameters())["to_out.weight"].T


def spar_f(layer: Any, x: Tensor, channels: int, keys: int) -> Tensor:
    """The last token's output, by loops over key heads."""
    q, k, v = projected(layer, x)
    out = torch.zeros(HEADS, SIZE, dtype=x.dtype)
    for g in range(GROUPS):
        heads = [2 * g, 2 * g + 1]
        sizes = sum(q[h, -1].abs() for h in heads)
        best = sorted(range(SIZE), key=lambda c: -float(sizes[c]))[:channels]
        weights = []
        for h in heads:
            part = q[h, -1, best].abs().sum() / q[h, -1].abs().sum()
            weights.append((k[h][:, best] @ q[h, -1, best] / (SIZE * part) ** 0.5).softmax(0))
        both = weights[0] + weights[1]
        order = sorted(range(len(x) - 1), key=lambda j: -float(both[j]))
        chosen = [*order[: keys - 1], len(x) - 1]
        for h, weight in zip(heads, weights, strict=True):
            exact = (k[h, chosen] @ q[h, -1] / SIZE**0.5).softmax(0) @ v[h, chosen]
            alpha = weight[chosen].sum()
            out[h] = alpha * exact + (1 - alpha) * v[h].mean(0)
    return out.flatten() @ dict(layer.named_parameters())["to_out.weight"].T


@pytest.mark.paper("InstInfer", "definition")
@pytest.mark.parametrize("random", [False, True], ids=["initial", "random"])
def test_a_sequence_is_dense_attention_with_its_gradients(random: bool) -> None:
    layer = made(random)
    x = torch.randn(2, 23, DIM, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 23, DIM, dtype=torch.float64)
    wanted = [x, *layer.parameters()]
    out, want = layer(x), torch.stack([dense(layer, one) for one in x])
    torch.testing.assert_close(out, want)
    for one, other in zip(
        torch.autograd.grad((out * cotangent).sum(), wanted),
        torch.autograd.grad((want * cotangent).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.paper("InstInfer", "definition")
@pytest.mark.paper("InstInfer", "works_when")
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("random", [False, True], ids=["initial", "random"])
def test_decoding_over_stored_pages_equals_attention_in_memory(random: bool, on_disk: bool, tmp_path: Path) -> None:
    layer = made(random, folder=tmp_path / "keys" if on_disk else None)
    x = torch.randn(2, 41, DIM, dtype=torch.float64)
    with torch.no_grad():
        want = torch.stack([dense(layer, one) for one in x])
        out, state = layer.prefill(x[:, :17], layer.init_state(2))
        torch.testing.assert_close(out, want[:, :17])
        assert state.read == 0
        more, state = layer.prefill(x[:, 17:26], state)
        torch.testing.assert_close(more, want[:, 17:26])
        a_token = 2 * 2 * GROUPS * SIZE * 8  # of two texts, a key and a value of each head
        assert state.read == 17 * a_token
        for at in range(26, 41):
            before = state.read
            one, state = layer.decode(x[:, at : at + 1], state)
            torch.testing.assert_close(one, want[:, at : at + 1])
            assert state.read - before == at * a_token
        assert state.written == 41 * a_token
    assert not on_disk or not any((tmp_path / "keys").iterdir())


@pytest.mark.paper("InstInfer", "definition")
@pytest.mark.parametrize(("channels", "keys"), [(2, 5), (6, 9), (1, 2)])
def test_spar_f_is_the_formula_in_loops(channels: int, keys: int) -> None:
    layer = made(True, channels=channels, keys=keys)
    x = torch.randn(2, 37, DIM, dtype=torch.float64)
    with torch.no_grad():
        _, state = layer.prefill(x[:, :21], layer.init_state(2))
        for at in range(21, 37):
            before = state.read
            out, state = layer.decode(x[:, at : at + 1], state)
            want = torch.stack([spar_f(layer, one[: at + 1], channels, keys) for one in x])
            torch.testing.assert_close(out[:, 0], want)
            assert state.read - before == 2 * GROUPS * 8 * (at * channels + 2 * (keys - 1) * SIZE)


@pytest.mark.paper("InstInfer", "works_when")
def test_with_all_channels_and_keys_spar_f_is_exact() -> None:
    layer = made(True, channels=SIZE, keys=30)
    x = torch.randn(1, 30, DIM, dtype=torch.float64)
    with torch.no_grad():
        _, state = layer.prefill(x[:, :29], layer.init_state(1))
        out, _ = layer.by_score(*(y[:, :, -1:] for y in layer.project(x, x)), state)
        want = dense(layer, x[0])[-1]
    torch.testing.assert_close(layer.to_out(out.flatten()), want)


def test_one_state_gone_on_from_twice_gives_two_texts() -> None:
    layer = made(True)
    x = torch.randn(1, 20, DIM, dtype=torch.float64)
    with torch.no_grad():
        _, state = layer.prefill(x[:, :19], layer.init_state(1))
        layer.decode(torch.randn(1, 1, DIM, dtype=torch.float64), state)
        out, _ = layer.decode(x[:, 19:], state)
        torch.testing.assert_close(out[0], dense(layer, x[0])[19:])


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="go together"):
        made(False, channels=2)
    with pytest.raises(ValueError, match="6 channels"):
        made(False, channels=7, keys=2)
