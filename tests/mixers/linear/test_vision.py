"""MALA, RALA, L2ViT, LiT and SwiftFormer against their papers' formulas, pair by pair, and inside backbones."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.support.counted_work import work
from tests.support.formulas import agree, follows
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, cross_entropy, elu, gelu, pad
from torch.testing import assert_close

from foveate import Grid
from foveate.layers.local_conv import LocalConv
from foveate.mixers.base import Mixer, join_heads, split_heads
from foveate.mixers.linear.efficient_additive_attention import EfficientAdditiveAttention
from foveate.mixers.linear.l2vit_attention import L2ViTAttention
from foveate.mixers.linear.lit_attention import LiTAttention
from foveate.mixers.linear.mala import MagnitudeAwareLinearAttention
from foveate.mixers.linear.rala import RankAugmentedLinearAttention
from foveate.mixers.linear.relu import relu_attention
from foveate.models.vision.backbones import l2vit, ravlt, swiftformer
from foveate.models.vision.pyramid import Pyramid

DIM, HEADS = 24, 3
GRID = Grid(5, 7)

KINDS = (
    MagnitudeAwareLinearAttention,
    RankAugmentedLinearAttention,
    L2ViTAttention,
    LiTAttention,
    EfficientAdditiveAttention,
)


def make(kind: type[Mixer], *, moved: bool = True, **options: Any) -> Any:
    mixer = kind(DIM, **options).double().eval()
    for parameter in mixer.parameters() if moved else ():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return mixer


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def heads_of(mixer: Any, x: Tensor) -> tuple[Tensor, ...]:
    return split_heads(mixer.to_qkv(x), 3 * mixer.heads).chunk(3, 1)


def on_image(conv: LocalConv, x: Tensor, dims: tuple[int, int]) -> Tensor:
    """The depthwise convolution, written out with images."""
    image = x.transpose(1, 2).unflatten(2, dims)
    out = conv2d(image, conv.weight, conv.bias, padding=conv.kernel // 2, groups=x.shape[2])
    return out.flatten(2).transpose(1, 2)


def turned(x: Tensor, layout: Grid | None, base: float = 10_000.0) -> Tensor:
    """Rotary positions: of each axis's channels, c and c + half are a complex number, turned by the place."""
    number = torch.arange(x.shape[2])
    places = (number,) if layout is None else (number // layout.dims[1], number % layout.dims[1])
    parts = []
    for part, place in zip(x.chunk(len(places), -1), places, strict=True):
        half = part.shape[-1] // 2
        angles = place.double().unsqueeze(-1) * base ** (-torch.arange(half, dtype=torch.float64) / half)
        spun = torch.complex(part[..., :half], part[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        parts += [spun.real, spun.imag]
    return torch.cat(parts, -1)


# ---- MALA ---------------------------------------------------------------------------------------------------


def mala_weights(mixer: Any, x: Tensor, layout: Grid | None, *, causal: bool = False) -> Tensor:
    """The N x N form: β s_ij - γ, with the number of keys that each query sees in place of N."""
    q, k, _ = heads_of(mixer, x)
    q, k = elu(q) + 1, elu(k) + 1
    num = x.shape[1]
    seen = torch.ones(num, num, dtype=x.dtype).tril() if causal else torch.ones(num, num, dtype=x.dtype)
    number = seen.sum(-1, keepdim=True)
    plain = q @ k.transpose(2, 3) * seen / (number * mixer.head_dim**0.5)
    spun = plain
    if mixer.rotary is not None:
        spun = turned(q, layout, mixer.rotary) @ turned(k, layout, mixer.rotary).transpose(2, 3)
        spun = spun * seen / (number * mixer.head_dim**0.5)
    total = plain.sum(-1, keepdim=True)
    return ((1 + 1 / total) * spun - total / number) * seen


@pytest.mark.paper("MALA", "definition")
@pytest.mark.paper("MALA", "works_when")
@pytest.mark.parametrize("rotary", [None, 100.0])
@pytest.mark.parametrize("layout", [None, GRID])
def test_mala_equals_its_matrix(rotary: float | None, layout: Grid | None) -> None:
    mixer = MagnitudeAwareLinearAttention(DIM, HEADS, rotary=rotary).double()
    x = tokens(35).requires_grad_()

    def formula() -> Tensor:
        *_, v = heads_of(mixer, x)
        heads = mala_weights(mixer, x, layout) @ v
        local = on_image(mixer.local, join_heads(v), GRID.dims if layout else (1, 35))
        return mixer.to_out((join_heads(heads) + local) * mixer.to_gate(x))

    follows(mixer, lambda: mixer(x, layout=layout), formula, x)


@pytest.mark.paper("MALA", "definition")
@pytest.mark.paper("MALA", "works_when")
@pytest.mark.parametrize("rotary", [None, 100.0])
def test_causal_mala_equals_its_matrix(rotary: float | None) -> None:
    mixer = MagnitudeAwareLinearAttention(DIM, HEADS, rotary=rotary, causal=True).double()
    x = tokens(41).requires_grad_()

    def formula() -> Tensor:
        *_, v = heads_of(mixer, x)
        heads = mala_weights(mixer, x, None, causal=True) @ v
        taps = mixer.local.weight
        local = conv1d(pad(join_heads(v).mT, (taps.shape[-1] - 1, 0)), taps, groups=DIM).mT
        return mixer.to_out((join_heads(heads) + local) * mixer.to_gate(x))

    follows(mixer, lambda: mixer(x), formula, x)


@pytest.mark.paper("MALA", "works_when")
@pytest.mark.parametrize("causal", [False, True])
def test_malas_weights_sum_to_one_and_sharpen_with_the_query(causal: bool) -> None:
    mixer, v = make(MagnitudeAwareLinearAttention, heads=HEADS, rotary=None, causal=causal), torch.eye(35).double()
    q, k = (elu(torch.randn(2, HEADS, 35, mixer.head_dim).double()) + 1 for _ in range(2))
    v = v.expand(2, HEADS, 35, 35)  # so that outputs are the weights
    spreads, plain = [], []
    for magnitude in (1.0, 2.0, 4.0, 8.0):
        weights = mixer.attention(magnitude * q, k, v, None, None)
        assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        spreads.append(weights.std(-1)[:, :, 2:])
        divided = magnitude * q @ k.transpose(2, 3)
        plain.append((divided / divided.sum(-1, keepdim=True)).std(-1))
    assert all((wide > narrow).all() for narrow, wide in pairwise(spreads))
    assert_close(plain[0], plain[-1])  # which division by the sum does not


def test_mala_is_causal_on_sequences_only() -> None:
    mixer = make(MagnitudeAwareLinearAttention, heads=HEADS, causal=True)
    with pytest.raises(ValueError, match="causal on sequences only"):
        mixer(tokens(35), layout=GRID)
    with pytest.raises(ValueError, match="3 axes"):
        make(MagnitudeAwareLinearAttention, heads=HEADS)(tokens(30), layout=Grid(2, 3, 5))
    assert make(MagnitudeAwareLinearAttention, heads=HEADS, axes=3)(tokens(30), layout=Grid(2, 3, 5)).isfinite().all()


# ---- RALA ---------------------------------------------------------------------------------------------------


@pytest.mark.paper("RALA / RAVLT", "definition")
def test_rala_equals_its_matrix() -> None:
    mixer, x = make(RankAugmentedLinearAttention, heads=HEADS), tokens(35)
    q, k, v = heads_of(mixer, x)
    q, k = elu(q) + 1, elu(k) + 1
    scores = q.mean(2, keepdim=True) @ k.transpose(2, 3) * mixer.head_dim**-0.5
    alpha = 35 * scores.softmax(-1)  # (B, H, 1, M)
    spun = turned(q, GRID) @ turned(k, GRID).transpose(2, 3)
    weights = alpha * spun / (alpha * (q @ k.transpose(2, 3))).sum(-1, keepdim=True)
    local = on_image(mixer.local, join_heads(v), (5, 7))
    assert_close(mixer(x, layout=GRID), mixer.to_out((join_heads(weights @ v) + local) * mixer.to_gate(x)))


def effective_rank(matrices: Tensor) -> float:
    """Exponential of the entropy of the singular values, on average."""
    values = torch.linalg.svdvals(matrices.detach())
    shares = values / values.sum(-1, keepdim=True)
    return float((-(shares * shares.clamp_min(1e-30).log()).sum(-1)).exp().mean())


@pytest.mark.parametrize(
    ("background", "bright", "raises"),
    [(1350, 1.0, True), (1455, 1.0, True), (1455, 2.0, True), (1485, 2.0, True), (0, 1.0, False), (0, 3.0, False)],
)
def test_rala_raises_the_rank_of_the_sum_over_keys_where_most_are_alike(
    background: int, bright: float, raises: bool
) -> None:
    """Among keys that have nothing in common its weights favour some, and the rank falls instead."""
    before, after = [], []
    for _ in range(4):
        mixer = make(RankAugmentedLinearAttention, heads=HEADS, rotary=None)
        plain = 0.3 * tokens(1).expand(-1, background, -1) + 0.1 * tokens(background)
        q, k, v = mixer.features(torch.cat([plain, bright * tokens(1500 - background)], dim=1))
        before.append(effective_rank(k.transpose(2, 3) @ v))
        after.append(effective_rank((k * mixer.key_weights(q, k, None)).transpose(2, 3) @ v))
    assert (sum(after) > sum(before)) == raises


def test_ralas_gate_raises_the_rank_of_the_outputs() -> None:
    mixer = make(RankAugmentedLinearAttention, heads=1, local=1)
    mixer.local.weight.data.zero_()
    mixer.local.bias.data.zero_()
    for layer in (mixer.to_qkv, mixer.to_gate, mixer.to_out):
        layer.bias.data.zero_()
    x = torch.randn(1, 60, 3).double() @ torch.randn(3, DIM).double()  # tokens of rank 3
    q, k, v = mixer.features(x)
    heads = mixer.attention(q, k, v, None, None)
    assert torch.linalg.matrix_rank(heads[0, 0]) == 3
    assert torch.linalg.matrix_rank(mixer(x)[0]) == 9  # that of products of 3 and 3


# ---- L2ViT and LiT ------------------------------------------------------------------------------------------


@pytest.mark.paper("L2ViT", "works_when")
@pytest.mark.parametrize("least", [1e-6, 20.0])
def test_keys_first_equals_queries_first(least: float) -> None:
    q, k = torch.randn(2, HEADS, 9, 8).double(), torch.randn(2, HEADS, 37, 8).double()
    v = torch.randn(2, HEADS, 37, 5).double()
    weights = q.relu() @ k.relu().transpose(2, 3)
    total = weights.sum(-1, keepdim=True)
    assert total.min() < 20 < total.max()
    assert_close(relu_attention(q, k, v, least=least), weights / total.clamp_min(least) @ v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_over_many_bright_tokens_do_not_overflow(dtype: torch.dtype) -> None:
    q, k = (8 * torch.rand(1, 2, 9000, 8)).to(dtype).split([8, 8992], dim=2)
    v = (1 + torch.rand(1, 2, 8992, 4)).to(dtype)
    assert (q.float() @ k.float().transpose(2, 3)).sum(-1).min() > torch.finfo(torch.float16).max
    out = relu_attention(q, k, v, least=100)
    assert out.dtype == dtype
    assert_close(out.double(), relu_attention(q.double(), k.double(), v.double(), least=100), rtol=0.02, atol=0)


def test_gradients_of_relu_attention_away_from_its_kinks() -> None:
    q, k = ((0.1 + torch.rand(1, 2, 5, 3).double()) * torch.randn(1, 2, 5, 3).sign() for _ in range(2))
    v = torch.randn(1, 2, 5, 4).double()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *qkv: relu_attention(*qkv, least=0.5), inputs)


@pytest.mark.paper("L2ViT", "definition")
@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("loud", [0.2, 12.0])
def test_l2vit_is_linear_attention_then_concentration(moved: bool, loud: float) -> None:
    """Of quiet tokens, whose weights sum to less than 100, and of loud ones."""
    mixer, x = make(L2ViTAttention, moved=moved, heads=HEADS), (loud * tokens(35)).requires_grad_()
    if not moved:
        assert_close(
            mixer.temperature.detach(), torch.full((HEADS, 1, 1), 8**-0.5, dtype=torch.float64), rtol=1e-6, atol=0
        )
    for buffer in mixer.local.norm.buffers():
        buffer.data += torch.rand(buffer.shape).to(buffer.dtype)
    q, k, v = heads_of(mixer, x)
    weights = q.relu() @ k.relu().transpose(2, 3)
    heads = mixer.temperature * (weights / weights.sum(-1, keepdim=True).clamp_min(100)) @ v
    out = mixer.to_out(join_heads(heads))
    hidden = gelu(on_image(mixer.local.first, mixer.norm(out), (5, 7)))
    norm = mixer.local.norm
    hidden = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    assert bool((weights.sum(-1) > 100).any()) == (loud > 1)
    agree(mixer(x, layout=GRID), out + on_image(mixer.local.second, hidden, (5, 7)), x, mixer)


def by_statistics(norm: nn.Module, x: Tensor) -> Tensor:
    """A batch norm of images (B, C, ...) in eval mode."""
    shape = (-1, *(1,) * (x.dim() - 2))
    mean, var, weight, bias = (y.view(shape) for y in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    return (x - mean) / (var + norm.eps).sqrt() * weight + bias


def by_token(norm: nn.Module, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def in_windows(mixer: Any, x: Tensor, dims: tuple[int, int], side: int) -> Tensor:
    """Softmax attention between tokens whose rows and columns lie in the same window."""
    q, k, v = (split_heads(layer(x), mixer.heads) for layer in (mixer.to_q, mixer.to_k, mixer.to_v))
    row, column = torch.arange(dims[0] * dims[1]) // dims[1] // side, torch.arange(dims[0] * dims[1]) % dims[1] // side
    apart = (row.unsqueeze(1) != row) | (column.unsqueeze(1) != column)
    weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(apart, -torch.inf).softmax(-1)
    return mixer.to_out(join_heads(weights @ v))


def in_whole(mixer: Any, x: Tensor) -> Tensor:
    q, k, v = heads_of(mixer, x)
    weights = q.relu() @ k.relu().transpose(2, 3)
    return mixer.to_out(join_heads(mixer.temperature * (weights / weights.sum(-1, keepdim=True).clamp_min(100)) @ v))


def concentrated(local: Any, x: Tensor, dims: tuple[int, int]) -> Tensor:
    hidden = gelu(on_image(local.first, x, dims))
    return on_image(local.second, by_statistics(local.norm, hidden.transpose(1, 2)).transpose(1, 2), dims)


def l2vit_block(block: Any, x: Tensor, dims: tuple[int, int], local: bool) -> Tensor:
    place, attention, third, mlp = block
    x = x + on_image(place.inner, x, dims)
    normed = by_token(attention.norm, x)
    x = x + (in_windows(attention.inner, normed, dims, 3) if local else in_whole(attention.inner, normed))
    x = x + (on_image(third.inner, x, dims) if local else concentrated(third.inner, by_token(third.norm, x), dims))
    return x + mlp.inner.second(gelu(mlp.inner.first(by_token(mlp.norm, x))))


@pytest.mark.paper("L2ViT", "definition")
def test_the_model_l2vit_is_its_blocks() -> None:
    model: Any = l2vit(3, dims=(8, 12), depths=(2, 2), heads=(2, 3), window=3, channels=1).double().eval()
    for value in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
        value.data += 0.2 * torch.rand_like(value)
    images = torch.randn(2, 1, 24, 36).double().requires_grad_()
    first, norm, _, second, batch_norm, pixel_norm = model.shrinks[0]
    x = by_statistics(norm, conv2d(images, first.weight, first.bias, stride=2, padding=1)).relu()
    x = by_statistics(batch_norm, conv2d(x, second.weight, second.bias, stride=2, padding=1))
    x = by_token(pixel_norm, x.flatten(2).transpose(1, 2))
    for stage, dims in enumerate(((6, 9), (3, 5))):
        if stage:
            image = by_token(model.shrinks[1].norm, x).transpose(1, 2).unflatten(2, (6, 9))
            image = conv2d(pad(image, (0, 1)), model.shrinks[1].weight, model.shrinks[1].bias, stride=2)
            x = image.flatten(2).transpose(1, 2)
        for index in range(2):
            x = l2vit_block(model.stages[stage][index], x, dims, local=index == 0)
    agree(model(images), model.head(by_token(model.neck, x).mean(1)), images, model)


@pytest.mark.paper("L2ViT", "definition")
@pytest.mark.paper("SwiftFormer", "definition")
@pytest.mark.parametrize("build", [l2vit, swiftformer])
def test_backbones_start_as_their_authors_start_them(build: Callable[..., Pyramid]) -> None:
    """Weights N(0, 0.02), no biases."""
    model = build(dims=(32, 64), depths=(2, 2), **({"heads": (2, 2)} if build is l2vit else {}))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | LocalConv):
            assert module.bias is None or module.bias.eq(0).all()
            if module.weight.numel() > 200:
                assert 0.014 < module.weight.std() < 0.026 and abs(module.weight.mean()) < 0.008
    scales = [b.scale.mean().item() for b in model.stages[0][-1] if b.scale is not None]  # type: ignore[index, union-attr]
    assert scales == ([] if build is l2vit else pytest.approx([1.0, 1e-5, 1e-5]))


class Nothing(nn.Module):
    """What stands in the place of an attention that is left out."""

    def forward(self, x: Tensor, layout: Grid | None = None) -> Tensor:
        return torch.zeros_like(x)


def loss_of_far_corner(whole: bool, steps: int = 60) -> float:
    """How well the right edge of a wide image knows whether the left one is bright: the mean loss of the last steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, losses = l2vit(2, dims=(16,), depths=(2,), heads=(2,), window=3, channels=1), []
        for branch in [branch for block in model.stages[0] for branch in block] * (not whole):  # type: ignore[union-attr]
            branch.inner = Nothing() if isinstance(branch.inner, L2ViTAttention) else branch.inner  # type: ignore[union-attr]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(steps):
            images, labels = 0.3 * torch.randn(16, 1, 13, 111), torch.randint(2, (16,))
            images[..., :24] += (2.0 * labels - 1).view(16, 1, 1, 1)
            loss = cross_entropy(model.head(model.features(images)[-1][..., -3:].mean((2, 3))), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10


@pytest.mark.paper("L2ViT", "works_when")
def test_l2vit_learns_what_windows_and_convolutions_alone_cannot() -> None:
    assert loss_of_far_corner(whole=True) < 0.2 < 0.5 < loss_of_far_corner(whole=False)


@pytest.mark.paper("LiT", "definition")
def test_lit_is_linear_attention_beside_a_convolution_of_the_values() -> None:
    mixer, x = LiTAttention(DIM).double(), tokens(35).requires_grad_()

    def formula() -> Tensor:
        q, k, v = split_heads(mixer.to_qkv(x), 6).chunk(3, 1)  # two heads
        weights = q.relu() @ k.relu().transpose(2, 3)
        heads = weights / weights.sum(-1, keepdim=True).clamp_min(1e-6) @ v  # some queries like no key
        return mixer.to_out(join_heads(heads) + on_image(mixer.local, join_heads(v), (5, 7)))

    follows(mixer, lambda: mixer(x, layout=GRID), formula, x)
    assert mixer.local.weight.shape[-2:] == (5, 5)


@pytest.mark.paper("L2ViT", "works_when")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_holds_at_high_resolution(kind: type[Mixer], dtype: torch.dtype) -> None:
    """A plain sum of |x| |x| over these 128 x 128 tokens is beyond float16."""
    mixer, x = kind(16), 8 * torch.randn(1, 128 * 128, 16)
    assert x.abs().sum(1).square().sum().half().isinf()
    exact = mixer.eval()(x, layout=Grid(128, 128))
    out = mixer.to(dtype)(x.to(dtype), layout=Grid(128, 128)).float()
    assert out.isfinite().all()
    assert (out - exact).norm() < 0.1 * exact.norm()


# ---- SwiftFormer --------------------------------------------------------------------------------------------


@pytest.mark.paper("SwiftFormer", "definition")
@pytest.mark.paper("SwiftFormer", "works_when")
@pytest.mark.parametrize("moved", [True, False])
def test_additive_attention_is_its_formula(moved: bool) -> None:
    mixer, x = make(EfficientAdditiveAttention, moved=moved), tokens(35).requires_grad_()
    q, k = mixer.to_q(x), mixer.to_k(x)
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    expected = torch.empty_like(x)
    for row in range(2):
        scores = torch.stack([token @ mixer.score for token in q[row]]) / DIM**0.5
        weights = scores / scores.square().sum().sqrt()
        summed = sum(weight * token for weight, token in zip(weights, q[row], strict=True))
        expected[row] = mixer.to_out(mixer.project(summed * k[row]) + q[row])
    agree(mixer(x), expected, x, mixer)


# ---- costs and backbones ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(MagnitudeAwareLinearAttention, {}, marks=pytest.mark.paper("MALA", "works_when")),
        pytest.param(MagnitudeAwareLinearAttention, {"causal": True}, marks=pytest.mark.paper("MALA", "works_when")),
        (RankAugmentedLinearAttention, {}),
        pytest.param(L2ViTAttention, {}, marks=pytest.mark.paper("L2ViT", "works_when")),
        (LiTAttention, {}),
        pytest.param(EfficientAdditiveAttention, {}, marks=pytest.mark.paper("SwiftFormer", "works_when")),
    ],
)
def test_counted_work_is_linear_in_tokens(kind: type[Mixer], options: dict[str, Any]) -> None:
    mixer, counted = kind(16, **options), []
    for rows in (32, 64, 128):
        layout = None if options else Grid(rows, 32)
        counted.append(work(lambda: mixer(torch.randn(1, 32 * rows, 16), layout=layout)))  # noqa: B023
    assert 1.8 < counted[1] / counted[0] < 2.2 and 1.8 < counted[2] / counted[1] < 2.2


def test_convolutions_refuse_what_has_no_centre() -> None:
    with pytest.raises(ValueError, match="odd"):
        LocalConv(4, 4)
    with pytest.raises(ValueError, match="axes"):
        LocalConv(4, 3, axes=4)


@pytest.mark.paper("SwiftFormer", "works_when")
@pytest.mark.parametrize(
    ("build", "millions"),
    [(ravlt, (25, 27)), (swiftformer, (3.1, 3.6)), (l2vit, (28, 32))],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_backbones_have_their_papers_sizes(build: Callable[..., Pyramid], millions: tuple[float, float]) -> None:
    with torch.device("meta"):
        model = build()
    assert len(model.stages) == 4
    assert millions[0] < sum(p.numel() for p in model.parameters()) / 1e6 < millions[1]


@pytest.mark.paper("L2ViT", "works_when")
def test_l2vit_alternates_windows_and_the_whole() -> None:
    names = [
        type(block[1].inner).__name__
        for stage in l2vit(2, dims=(8, 8), depths=(2, 4), heads=(1, 1)).stages
        for block in stage
    ]
    assert names == ["FlashWindowAttention", "L2ViTAttention"] * 3


@pytest.mark.paper("SwiftFormer", "works_when")
@pytest.mark.parametrize(
    ("build", "options"),
    [
        (ravlt, {"heads": (1, 2), "linear_stages": 1}),
        (swiftformer, {}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_backbones_learn(build: Callable[..., Pyramid], options: dict[str, Any]) -> None:
    """Is the bright spot in the upper or in the lower half? Odd sizes, a few steps, always the same."""
    torch.manual_seed(0)
    model = build(2, dims=(16, 24), depths=(2, 2), channels=1, **options)
    for module in model.modules():  # a branch that starts at 1e-5 learns nothing in a few steps
        if getattr(module, "scale", None) is not None and isinstance(module.scale, nn.Parameter):
            module.scale.data.fill_(1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        images, labels = 0.1 * torch.randn(16, 1, 29, 34), torch.randint(2, (16,))
        rows = 14 * labels + torch.randint(2, 12, (16,))
        images[torch.arange(16), 0, rows, torch.randint(2, 32, (16,))] += 10
        loss = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) / 5 < 0.8 * sum(losses[:3]) / 3
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
