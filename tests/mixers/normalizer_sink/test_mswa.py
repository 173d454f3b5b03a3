"""MSWA: what a window for each head costs, and what its decoder keeps."""

from __future__ import annotations

import pytest
import torch
from tests.support.heads import agree, heads, plain
from torch import Tensor

from foveate import causal
from foveate.cache.heads import HeadsCache
from foveate.catalogue.registry import mixer
from foveate.counting import count_operations
from foveate.mixers.normalizer_sink.mswa import layer_windows, mswa_core
from foveate.options import forced_impl

HEADS, BASE = 8, 16
WINDOWS = (4, 4, 8, 8, 16, 16, 32, 32)  # of a base of 16: a quarter, half, once, twice


def model(**options: int) -> torch.nn.Module:
    return mixer("mswa", 32, heads=HEADS, window=BASE, **options).double()


def banded(mswa: torch.nn.Module, x: Tensor) -> Tensor:
    """Each head by its dense mask of one band."""
    batch, length, dim = x.shape
    q, k, v = (
        (x @ layer.weight.T).view(batch, length, -1, dim // HEADS).transpose(1, 2)
        for layer in (mswa.to_q, mswa.to_k, mswa.to_v)
    )
    k, v = (each.repeat_interleave(HEADS // each.shape[1], 1) for each in (k, v))
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
    seen = torch.stack([(distance >= 0) & (distance < width) for width in WINDOWS])
    logits = (q @ k.mT / (dim // HEADS) ** 0.5).masked_fill(~seen, float("-inf"))
    return (torch.softmax(logits, -1) @ v).transpose(1, 2).flatten(2) @ mswa.to_out.weight.T


@pytest.mark.paper("MSWA", "works_when")
@pytest.mark.parametrize("kv_heads", [HEADS, 4])
def test_one_call_is_a_band_for_each_head_forward_and_backward(kv_heads: int) -> None:
    mswa, x = model(kv_heads=kv_heads), torch.randn(2, 61, 32, dtype=torch.float64, requires_grad=True)
    out, expected = mswa(x), banded(mswa, x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    leaves, towards = [x, *mswa.parameters()], torch.randn_like(out)
    grads, wanted = (torch.autograd.grad(y, leaves, towards) for y in (out, expected))
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-8)


@pytest.mark.paper("MSWA", "works_when")
def test_work_is_in_proportion_to_the_sum_of_windows() -> None:
    mswa, length = model(), 300
    with torch.no_grad(), count_operations() as counted:
        mswa(torch.randn(1, length, 32, dtype=torch.float64))
    assert counted.pairs == sum(min(i + 1, width) for width in WINDOWS for i in range(length))
    flops = []
    for window in (64, 128, 256):
        with torch.no_grad(), forced_impl("tiles"), count_operations(inside=True) as counted:
            mixer("mswa", 32, heads=4, window=window)(torch.randn(1, 4096, 32))
        flops.append(counted.flops)
    assert 1.6 < (flops[2] - flops[1]) / (flops[1] - flops[0]) < 2.4
    layers = [sum(4 * layer_windows(base, 4)) for base in layer_windows(BASE, 4)]
    assert layer_windows(BASE, 4) == [4, 8, 16, 32] and layers == [60, 120, 240, 480]


@pytest.mark.paper("MSWA", "works_when")
def test_a_decoder_keeps_as_many_keys_of_a_head_as_its_window_holds() -> None:
    mswa, x = model(), torch.randn(1, 200, 32, dtype=torch.float64)
    kept: list[list[int]] = []
    with torch.no_grad():
        outs, state = [], mswa.init_state(1)
        for t in range(200):
            out, state = mswa.decode(x[:, t : t + 1], state)
            outs.append(out)
            assert isinstance(state, HeadsCache)
            kept.append([cache.k.shape[2] for cache in state.caches])
        torch.testing.assert_close(torch.cat(outs, 1), banded(mswa, x), rtol=1e-9, atol=1e-9)
    assert len(state.caches) == 4, "a cache for each window"
    for number, width in enumerate(sorted(set(WINDOWS))):
        lengths = [each[number] for each in kept[100:]]
        assert width - 1 <= min(lengths) and max(lengths) <= width + 32  # tokens of slack, to drop many at once
    with count_operations() as counted, torch.no_grad():
        mswa.decode(x[:, :1], state)
    assert counted.pairs == sum(WINDOWS)


@pytest.mark.paper("MSWA", "definition")
@pytest.mark.parametrize("num_heads", [3, 4, 8])
def test_mswa_gives_each_group_of_heads_its_window(num_heads: int) -> None:
    q, k, v = heads(1, num_heads, 41, 8), heads(1, 1, 41, 8), heads(1, 1, 41, 8)
    core = mswa_core(window=12, heads=num_heads)
    distance = torch.arange(41).unsqueeze(1) - torch.arange(41)
    sizes = torch.tensor([[3, 6, 12, 24][4 * head // num_heads] for head in range(num_heads)]).view(-1, 1, 1)
    agree(core(q, k, v, within=causal), plain(q, k, v, (distance >= 0) & (distance < sizes)), q, k, v)


def test_mswa_layers_cost_less_than_one_window_for_all() -> None:
    windows = [size for base in layer_windows(64, 8) for size in layer_windows(base, 8)]
    assert sum(windows) < 64 * len(windows) and max(windows) == 256 and min(windows) == 4
