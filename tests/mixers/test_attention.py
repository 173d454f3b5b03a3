"""Attention mechanisms on sequences, against plain definitions of their own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.support.counted_work import largest
from tests.support.formulas import follows
from torch import Tensor

from foveate import Packed, alibi, attend, causal, key_padding, relative_table, sigmoid, softmax, window
from foveate.catalogue.registry import mixer
from foveate.counting import count_operations
from foveate.mixers.base import split_heads
from foveate.mixers.dynamic_sparse.moba import MoBA
from foveate.mixers.exact_io.chunked import ChunkedCore
from foveate.mixers.normalizer_sink.mswa import layer_windows, mswa_core
from foveate.mixers.normalizer_sink.streaming_llm import streaming_core
from foveate.mixers.static_sparse.delta_attention import DeltaCore
from foveate.mixers.static_sparse.power_attention import PowerAttention
from foveate.patterns import Pattern, Scene, Sequence, documents, full, sinks
from foveate.patterns.part import Parts
from foveate.patterns.rules.dynamic import topk_blocks


def heads(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def qkv(n: int, m: int | None = None, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Two sequences, four query heads, two key and value heads."""
    m = n if m is None else m
    return heads(2, 4, n, dim), heads(2, 2, m, dim), heads(2, 2, m, dim)


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Softmax attention over the pairs in ``seen``; nothing where a row sees no key."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(~seen, -1e300)
    return torch.softmax(logits, -1) * seen @ v


def agree(got: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    """Equal values and equal gradients."""
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    upstream = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(x, inputs, upstream, allow_unused=True) for x in (got, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-9)


def turned(x: Tensor, places: Tensor, base: float) -> Tensor:
    """Rotary positions: channels c and c + D / 2 are a complex number, turned by the place."""
    half = x.shape[-1] // 2
    angles = places.double().unsqueeze(-1) * base ** (-torch.arange(half, dtype=torch.float64) / half)
    number = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([number.real, number.imag], -1)


def standard(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def stepped(model: torch.nn.Module, x: Tensor) -> Tensor:
    state, outs = model.init_state(x.shape[0]), []
    for token in x.split(1, dim=1):
        out, state = model.decode(token, state)
        outs.append(out)
    return torch.cat(outs, dim=1)


# ---- parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [causal, window(4, 1) | sinks(2), documents([10, 3, 24]), topk_blocks(4, 2)])
def test_a_part_of_a_pattern_is_that_part_of_its_mask(pattern: Pattern) -> None:
    q, k, _ = qkv(29, 37)
    scene = Scene(29, 37, Sequence(), q.detach(), k.detach())
    parts = Parts.of(pattern, scene)
    whole = parts.part(slice(0, 29), slice(0, 37)).mask(29, 37)
    for step, (first, last), (left, right) in itertools.product((1, 3), ((0, 29), (5, 21)), ((0, 37), (7, 30))):
        part = parts.part(slice(first, last, step), slice(left, right))
        expected = whole[:, :, first:last:step, left:right]
        count = expected.shape[2]
        assert torch.equal(part.mask(count, right - left), expected)
        cut = part.select(q[:, :, :count], k[:, :, left:right], tile=8).to_dense()
        assert torch.equal(cut.expand_as(expected), expected)


def test_chunks_that_no_query_sees_are_left_out() -> None:
    parts = Parts.of(window(4, 0), Scene(40, 40))
    chunks = [slice(start, start + 10) for start in range(0, 40, 10)]
    assert parts.worth(slice(22, 30), chunks) == chunks[1:3]
    nothing = Parts.of(key_padding(torch.zeros(2, 40, dtype=torch.bool)), Scene(40, 40))
    assert nothing.worth(slice(0, 40), chunks) == chunks[:1]


# ---- exact attention in chunks ----------------------------------------------------------------------------


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


# ---- sigmoid ----------------------------------------------------------------------------------------------


@pytest.mark.paper("Sigmoid-Attention", "definition")
@pytest.mark.parametrize(("length", "slanted", "kv_heads"), [(None, False, 4), (100, False, 2), (None, True, 2)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_sigmoid_attention_is_its_formula(length: int | None, slanted: bool, kv_heads: int, is_causal: bool) -> None:
    options = {"kv_heads": kv_heads, "length": length, "alibi": slanted, "qk_norm": True, "causal": is_causal}
    model, x = mixer("sigmoid_attention", 32, heads=4, **options).double(), heads(2, 21, 32)
    real = torch.arange(21).expand(2, -1) < torch.tensor([[21], [13]])
    seen = real[:, None, None] & (torch.ones(21, 21).tril().bool() if is_causal else torch.ones(21, 21).bool())
    count = seen.sum(-1, keepdim=True) if length is None else torch.tensor(length)
    slopes = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256]).double().view(4, 1, 1) * slanted
    age = (torch.arange(21).unsqueeze(1) - torch.arange(21)).abs()

    def formula() -> Tensor:
        q, k, v = (
            split_heads(layer(x), n) for layer, n in ((model.to_q, 4), (model.to_k, kv_heads), (model.to_v, kv_heads))
        )
        q, k = (
            standard(q) * model.norm_q.weight + model.norm_q.bias,
            standard(k) * model.norm_k.weight + model.norm_k.bias,
        )
        k, v = (y.repeat_interleave(4 // kv_heads, 1) for y in (k, v))
        weights = torch.sigmoid(q @ k.mT / math.sqrt(8) - slopes * age - count.double().log()) * seen
        return model.to_out((weights @ v).transpose(1, 2).flatten(2)) * real.unsqueeze(-1)

    follows(model, lambda: model(x, padding=real), formula, x)


@pytest.mark.paper("Sigmoid-Attention", "works_when")
@pytest.mark.parametrize("is_causal", [True, False])
def test_tiled_sigmoid_attention_is_dense(is_causal: bool) -> None:
    n, within = 300, causal if is_causal else full
    q, k, v = qkv(n)
    slopes, ages = torch.tensor([0.5, 0.25, 0.1, 0.01]).double(), torch.arange(n).unsqueeze(1) - torch.arange(n)
    keys, values = (y.repeat_interleave(2, 1) for y in (k, v))
    logits = q @ keys.mT / math.sqrt(8) - slopes.view(4, 1, 1) * ages.abs() - math.log(n)
    weights = torch.sigmoid(logits)
    expected = (weights.tril() if is_causal else weights) @ values
    options = {"bias": alibi(slopes), "weights": sigmoid(bias=-math.log(n))}
    agree(attend(q, k, v, within, **options), expected, q, k, v)
    past, rest = sinks(130), ~sinks(130)  # of the keys, two parts that share none
    parts = [attend(q, k, v, within & part, **options) for part in (past, rest)]
    torch.testing.assert_close(parts[0] + parts[1], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.paper("Sigmoid-Attention", "works_when")
def test_sigmoid_attention_holds_no_matrix_of_all_pairs() -> None:
    model, n = mixer("sigmoid_attention", 32, heads=2, length=100), 3000
    x = torch.randn(1, n, 32, requires_grad=True)
    assert largest(lambda: model(x)) < n**2 // 8  # forward and backward


# ---- windows ----------------------------------------------------------------------------------------------


@pytest.mark.paper("SWAT (LLM)", "works_when")
def test_rotary_mixers_decode_as_they_read() -> None:
    x = torch.randn(2, 41, 32, dtype=torch.float64)
    for name, options in (
        ("flash_attention", {}),
        ("swat", {"window": 7}),
        ("streaming_llm", {"sinks": 3, "window": 5}),
        ("streaming_llm", {"sinks": 0, "window": 5}),
        ("sigmoid_attention", {"qk_norm": True, "length": 50}),
        ("delta_attention", {"sinks": 1, "window": 4, "stride": 6}),
        ("moba", {"block": 5, "k": 3}),
    ):
        model = mixer(name, 32, heads=4, kv_heads=2, rotary=50.0, **options).double()
        plain_model = mixer(name, 32, heads=4, kv_heads=2, rotary=None, **options).double()
        plain_model.load_state_dict(model.state_dict())
        torch.testing.assert_close(stepped(model, x), model(x))
        assert not torch.allclose(plain_model(x), model(x)), f"{name} does not turn"


@pytest.mark.paper("StreamingLLM", "definition")
def test_streaming_positions_count_inside_the_cache() -> None:
    sinks, window, n = 2, 5, 19
    model = mixer("streaming_llm", 32, heads=4, sinks=sinks, window=window, rotary=20.0).double()
    x = heads(1, n, 32)
    q, k, v = (split_heads(layer(x), 4) for layer in (model.to_q, model.to_k, model.to_v))
    rows = []
    for i in range(n):
        kept = torch.tensor([j for j in range(i + 1) if j < sinks or j > i - window])
        at = torch.arange(len(kept))
        query, keys = turned(q[:, :, i : i + 1], at[-1:], 20.0), turned(k[:, :, kept], at, 20.0)
        rows.append(plain(query, keys, v[:, :, kept], torch.ones(1, len(kept)).bool()))
    expected = model.to_out(torch.cat(rows, 2).transpose(1, 2).flatten(2))
    agree(model(x), expected, x)


def test_streaming_decodes_at_constant_memory() -> None:
    """What a step keeps, down to the storage its tensors are views of, and the largest tensor that it makes."""
    model = mixer("streaming_llm", 32, heads=4, sinks=2, window=6)
    state, kept, made = model.init_state(1), [], []
    for _ in range(60):
        with torch.no_grad():
            with count_operations(inside=True) as counted:
                model.decode(torch.randn(1, 1, 32), state)
            state = model.decode(torch.randn(1, 1, 32), state).state
        leaves = state.tokens.tensors
        kept.append(
            sum({leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in leaves}.values())
        )
        made.append(counted.largest)
    assert max(kept[50:]) == max(kept[:50]) == kept[-1] == model.state_bytes(60) == model.state_bytes(10**6)
    assert max(made[50:]) <= max(made[:50])
    assert {0, 1, 55, 56, 57, 58, 59} <= set(state.positions().tolist())


@pytest.mark.paper("SWAT (LLM)", "definition")
@pytest.mark.paper("SWAT (LLM)", "works_when")
@pytest.mark.parametrize("half", [2, 3])
@pytest.mark.parametrize("rotary", [None, 30.0])
def test_swat_is_its_formula(half: int, rotary: float | None) -> None:
    model = mixer("swat", 16 * half, heads=2 * half, window=6, rotary=rotary).double()
    x, places = heads(2, 23, 16 * half), torch.arange(23)
    distance = places.unsqueeze(1) - places
    steep = [2.0 ** (-8 * number / half) for number in range(1, half + 1)]
    slopes = torch.tensor([*steep, *(-slope for slope in steep)], dtype=torch.float64).view(-1, 1, 1)

    def formula() -> Tensor:
        q, k, v = (split_heads(layer(x), 2 * half) for layer in (model.to_q, model.to_k, model.to_v))
        q, k = (q, k) if rotary is None else (turned(y, places, rotary) for y in (q, k))
        weights = torch.sigmoid(q @ k.transpose(2, 3) / math.sqrt(8) - slopes * distance.abs())
        out = (weights * ((distance >= 0) & (distance < 6))) @ v
        return model.to_out(out.transpose(1, 2).flatten(2))

    follows(model, lambda: model(x), formula, x)


@pytest.mark.paper("SWAT (LLM)", "works_when")
@torch.no_grad()
def test_swat_decodes_from_a_cache_of_its_window() -> None:
    """As it reads, while what is kept, down to the storage, does not grow with the text."""
    model, x = mixer("swat", 32, heads=4, kv_heads=2, window=7).double(), torch.randn(1, 120, 32, dtype=torch.float64)
    state, outs, kept = model.init_state(1), [], []
    for token in x.split(1, dim=1):
        out, state = model.decode(token, state)
        outs.append(out)
        leaves = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in state.tokens.tensors}
        kept.append(sum(leaves.values()))
    torch.testing.assert_close(torch.cat(outs, 1), model(x))
    assert max(kept[60:]) == max(kept[:60]) == model.state_bytes(120) == model.state_bytes(10**6)


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


# ---- static and chosen blocks -----------------------------------------------------------------------------


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


@pytest.mark.paper("MoBA", "definition")
def test_moba_is_its_formula() -> None:
    block, count, n = 5, 3, 33
    q, k, v = qkv(n)
    means = torch.stack([part.mean(2) for part in k.detach().split(block, 2)], 2).repeat_interleave(2, 1)
    seen = torch.zeros(2, 4, n, n, dtype=torch.bool)
    for b, h, i in itertools.product(range(2), range(4), range(n)):
        own = i // block
        scores = [(float(q[b, h, i].detach() @ means[b, h, c]), c) for c in range(own)]
        for chosen in [own, *(c for _, c in sorted(scores, reverse=True)[: count - 1])]:
            seen[b, h, i, chosen * block : min((chosen + 1) * block, i + 1)] = True
    agree(MoBA.as_core(block=block, k=count)(q, k, v, within=causal), plain(q, k, v, seen), q, k, v)


# ---- delta correction -------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("alike", "least", "most"), [(8, 0.0, 0.7), (1, 1.1, 1.5)])
def test_delta_correction_brings_sparse_attention_nearer_to_full_where_queries_are_alike(
    alike: int, least: float, most: float
) -> None:
    """What one query misses says what the next ones do if these look for the same; else it is a second error."""
    q = 2 * torch.randn(1, 4, 400 // alike, 16, dtype=torch.float64).repeat_interleave(alike, 2)
    q, k, v = q + 0.1 * torch.randn_like(q), *torch.randn(2, 1, 4, 400, 16, dtype=torch.float64)
    base = streaming_core(sinks=4, window=32)
    exact, sparse = attend(q, k, v, causal), base(q, k, v, within=causal)
    corrected = DeltaCore(base, 8)(q, k, v, within=causal)
    assert least < (corrected - exact).norm() / (sparse - exact).norm() < most


def test_delta_correction_keeps_packed_sequences_apart() -> None:
    core, lengths = DeltaCore(stride=4), [9, 0, 14]
    q, k, v = torch.randn(3, 1, 2, 23, 8, dtype=torch.float64)
    parts = [core(*each, within=causal) for each in zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)]
    torch.testing.assert_close(core(q, k, v, within=causal, layout=Packed(lengths)), torch.cat(parts, 2))
