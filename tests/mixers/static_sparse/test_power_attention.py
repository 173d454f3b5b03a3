"""PowerAttention: its mask, what it reaches, and what it costs."""

from __future__ import annotations

import pytest
import torch
from tests.support.heads import agree, heads, plain, qkv, stepped

from foveate import causal
from foveate.catalogue.registry import mixer
from foveate.counting import count_operations
from foveate.mixers.base import split_heads
from foveate.mixers.static_sparse.power_attention import PowerAttention


@pytest.mark.paper("PowerAttention", "works_when")
def test_power_attention_computes_few_tiles_of_a_prompt_and_reads_few_keys_a_step() -> None:
    core, x = PowerAttention.as_core(), torch.empty(1, 1, 8192, 16, device="meta")
    with count_operations() as whole:
        core(x, x, x, within=causal)
    assert whole.computed < 0.2 * 8192 * 8193 / 2
    with count_operations() as step:
        core(x[:, :, -1:], x, x, within=causal)
    assert step.pairs < 600


@pytest.mark.paper("PowerAttention", "definition")
@pytest.mark.paper("PowerAttention", "works_when")
@pytest.mark.parametrize(("near", "block", "first"), [(3, 2, 1), (5, 4, 0), (4, 3, 5)])
def test_power_attention_is_its_mask_whole_and_step_by_step(near: int, block: int, first: int) -> None:
    q, k, v = qkv(41)
    query, key = torch.arange(41).unsqueeze(1), torch.arange(41)
    seen = (query - key < near) | (key < first)
    for power in range(6):
        seen |= query // block - key // block == 2**power
    seen &= query >= key
    agree(
        PowerAttention.as_core(window=near, block=block, sinks=first)(q, k, v, within=causal),
        plain(q, k, v, seen),
        q,
        k,
        v,
    )
    model = mixer("power_attention", 32, heads=4, kv_heads=2, window=near, block=block, sinks=first).double()
    x = heads(2, 41, 32)
    q, k, v = (
        split_heads(layer(x), number)
        for layer, number in zip((model.to_q, model.to_k, model.to_v), (4, 2, 2), strict=True)
    )
    agree(model(x), model.to_out(plain(q, k, v, seen).transpose(1, 2).flatten(2)), x, *model.parameters())
    torch.testing.assert_close(stepped(model, x), model(x))


@pytest.mark.paper("PowerAttention", "definition")
def test_power_attention_refuses_a_window_that_leaves_a_gap_before_the_blocks() -> None:
    with pytest.raises(ValueError, match="at least block=64"):
        PowerAttention.as_core(window=63)
    assert PowerAttention.as_core().pattern.text == PowerAttention.as_core(window=256, block=64, sinks=4).pattern.text


@pytest.mark.paper("PowerAttention", "works_when")
def test_power_attention_reaches_the_last_two_to_the_d_blocks_in_d_layers() -> None:
    """Token by token: each carries what it is through layers whose weights are nowhere 0 by chance."""
    block, blocks = 3, 32
    core, number = PowerAttention.as_core(window=block, block=block, sinks=0), torch.arange(block * blocks)
    carried = torch.eye(block * blocks, dtype=torch.float64).expand(1, 1, -1, -1)
    apart = number.unsqueeze(1) // block - number // block
    for depth in range(1, 6):
        q, k = torch.randn(2, 1, 1, block * blocks, 4, dtype=torch.float64)
        carried = core(q, k, carried, within=causal)
        reached = carried[0, 0] > 0
        promised = (number.unsqueeze(1) >= number) & (apart < 2**depth)
        assert bool((reached | ~promised).all()), f"not all tokens of the last {2**depth} blocks reached"
        assert not bool((reached & (number.unsqueeze(1) < number)).any())
