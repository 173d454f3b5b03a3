"""FlashIPA: naive invariant point attention with (N, N) tables, a stock kernel, and rigid motions."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.counted_work import largest
from tests.support.formulas import follows
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveate.catalogue.registry import mixer
from foveate.mixers.exact_io.invariant_points import Frames, PairFactors

DIM, HEADS, WIDTH, POINTS, READ, PAIR, RANK = 10, 3, 4, 2, 3, 8, 2


def made(**options: object) -> torch.nn.Module:
    sizes = {"head_dim": WIDTH, "points": POINTS, "value_points": READ, "pair_dim": PAIR}
    return mixer("flash_ipa", DIM, heads=HEADS, **{**sizes, **options}).double()


def rotations(*shape: int) -> Tensor:
    turned = torch.linalg.qr(torch.randn(*shape, 3, 3, dtype=torch.float64)).Q
    return turned * torch.linalg.det(turned)[..., None, None]


def some(batch: int, length: int, spread: float = 2.0) -> tuple[Tensor, Frames, PairFactors]:
    x = torch.randn(batch, length, DIM, dtype=torch.float64)
    frames = Frames(rotations(batch, length), spread * torch.randn(batch, length, 3, dtype=torch.float64))
    return x, frames, PairFactors(*torch.randn(2, batch, length, RANK, PAIR, dtype=torch.float64).unbind(0))


def naive(layer: torch.nn.Module, x: Tensor, frames: Frames, pair: PairFactors | None) -> Tensor:
    """Algorithm 22 with tables of displacements and a pair bias of low rank."""
    batch, length, _ = x.shape

    def made_of(linear: torch.nn.Linear, *sizes: int) -> Tensor:
        return (x @ linear.weight.T + linear.bias).view(batch, length, HEADS, *sizes)

    q, k, v = (made_of(linear, WIDTH) for linear in (layer.to_q, layer.to_k, layer.to_v))
    logits = torch.einsum("bihc,bjhc->bhij", q, k) * math.sqrt(1 / (3 * WIDTH))
    placed = []
    for linear, count in ((layer.to_q_points, POINTS), (layer.to_k_points, POINTS), (layer.to_v_points, READ)):
        own = made_of(linear, count, 3)
        placed.append(torch.einsum("bnxy,bnhpy->bnhpx", frames.rotation, own) + frames.translation[:, :, None, None])
    apart = (placed[0][:, :, None] - placed[1][:, None]).square().sum((-1, -2))  # (B, i, j, H)
    weight = torch.log(1 + torch.exp(layer.point_weights)) * math.sqrt(2 / (27 * POINTS))
    logits = logits - (0.5 * weight * apart).permute(0, 3, 1, 2)
    if pair is not None:
        left, right = (z @ layer.to_pair_bias.weight.T + layer.to_pair_bias.bias for z in pair)
        logits = logits + torch.einsum("birh,bjrh->bhij", left, right)
    weights = logits.softmax(-1)
    features = [torch.einsum("bhij,bjhc->bihc", weights, v).flatten(2)]
    points = torch.einsum("bhij,bjhpx->bihpx", weights, placed[2]) - frames.translation[:, :, None, None]
    points = torch.einsum("bnyx,bnhpy->bnhpx", frames.rotation, points).flatten(2, 3)
    features += [*points.unbind(-1), torch.sqrt(points.square().sum(-1) + 1e-8)]
    if pair is not None:
        left, right = (z @ layer.to_pair_values.weight.T + layer.to_pair_values.bias for z in pair)
        table = torch.einsum("birc,bjrc->bijc", left, right)
        features.append(torch.einsum("bhij,bijc->bihc", weights, table).flatten(2))
    return torch.cat(features, -1) @ layer.to_out.weight.T + layer.to_out.bias


@pytest.mark.paper("FlashIPA", "definition")
@pytest.mark.paper("FlashIPA", "works_when")
@pytest.mark.parametrize("paired", [True, False])
def test_it_is_naive_ipa_with_gradients(paired: bool) -> None:
    layer = made(pair_dim=PAIR if paired else 0)
    x, frames, factors = some(2, 7)
    pair = factors if paired else None
    assert not layer.to_out.weight.any()  # it begins by adding nothing
    with torch.no_grad():
        layer.to_out.weight.copy_(torch.randn_like(layer.to_out.weight))
    inputs = [y.requires_grad_() for y in (x, frames.translation, frames.rotation, *(factors if paired else ()))]
    follows(layer, lambda: layer(x, frames=frames, pair=pair), lambda: naive(layer, x, frames, pair), *inputs)


@pytest.mark.paper("FlashIPA", "works_when")
def test_a_stock_kernel_over_the_longer_tensors_gives_the_same() -> None:
    layer = made()
    torch.nn.init.normal_(layer.to_out.weight)
    x, frames, pair = some(2, 9)
    q, k, v = layer.augmented(x, frames, pair)
    sums = scaled_dot_product_attention(q, k, v, scale=1.0)
    out = layer.to_out(layer.features(sums, frames, pair))
    torch.testing.assert_close(out, naive(layer, x, frames, pair), rtol=1e-9, atol=1e-9)


@pytest.mark.paper("FlashIPA", "works_when")
def test_no_rigid_motion_changes_it_and_a_stretch_does() -> None:
    layer = made()
    torch.nn.init.normal_(layer.to_out.weight)
    x, frames, pair = some(2, 9)
    turn, shift = rotations(2, 1), 50 * torch.randn(2, 1, 3, dtype=torch.float64)
    moved = Frames(turn @ frames.rotation, (turn @ frames.translation.unsqueeze(-1)).squeeze(-1) + shift)
    here = layer(x, frames=frames, pair=pair)
    torch.testing.assert_close(layer(x, frames=moved, pair=pair), here, rtol=1e-9, atol=1e-9)
    apart = Frames(frames.rotation, 2 * frames.translation)
    assert (layer(x, frames=apart, pair=pair) - here).abs().max() > 1e-3


@pytest.mark.paper("FlashIPA", "works_when")
def test_no_table_of_tokens_by_tokens_is_formed() -> None:
    layer = mixer("flash_ipa", 8, heads=2, head_dim=4, points=1, value_points=1)
    length = 600
    assert largest(lambda: layer(torch.randn(1, length, 8))) < length * length / 4


def test_padding_and_far_origins_change_nothing() -> None:
    layer = made()
    torch.nn.init.normal_(layer.to_out.weight)
    x, frames, pair = some(1, 9)
    real = torch.arange(9).unsqueeze(0) < 6
    short = PairFactors(*(z[:, :6] for z in pair))
    alone = layer(x[:, :6], frames=Frames(*(y[:, :6] for y in frames)), pair=short)
    torch.testing.assert_close(layer(x, frames=frames, pair=pair, padding=real)[:, :6], alone)
    single = layer.float()
    far = Frames(frames.rotation.float(), frames.translation.float() + 3000)
    near = single(x.float(), frames=Frames(*(y.float() for y in frames)), pair=PairFactors(*(z.float() for z in pair)))
    moved = single(x.float(), frames=far, pair=PairFactors(*(z.float() for z in pair)))
    torch.testing.assert_close(moved, near, rtol=1e-2, atol=1e-2)


def test_refusals_in_words() -> None:
    layer = made()
    x, frames, pair = some(1, 5)
    with pytest.raises(ValueError, match="asks for pair factors"):
        layer(x, frames=frames)
    with pytest.raises(ValueError, match="pair factors are"):
        layer(x, frames=frames, pair=PairFactors(pair.left, pair.right[:, 1:]))
    with pytest.raises(ValueError, match="rotations and translations"):
        layer(x, frames=Frames(frames.translation, frames.translation), pair=pair)
    with pytest.raises(ValueError, match="multiple of 4"):
        made(pair_dim=6)
