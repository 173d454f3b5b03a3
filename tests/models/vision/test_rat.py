"""RAT: attention inside regions, and the model around it, written out; what knowing the regions is worth."""

from __future__ import annotations

import pytest
import torch
from tests.support.formulas import follows
from tests.support.on_grids import masked
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, pixel_shuffle

from foveate.counting import count_operations
from foveate.mixers.dynamic_sparse.region_attention import region_attention
from foveate.models.vision.rat import rat


def normed(norm: nn.Module, x: Tensor, dim: int) -> Tensor:
    centred = x - x.mean(dim, keepdim=True)
    shape = [-1 if axis == dim % x.dim() else 1 for axis in range(x.dim())]
    unit = centred / (centred.square().mean(dim, keepdim=True) + 1e-6).sqrt()
    return unit * norm.weight.view(shape) + norm.bias.view(shape)


def conv(layer: nn.Conv2d, x: Tensor, **options: int) -> Tensor:
    return conv2d(x, layer.weight, layer.bias, **options)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def naf(block: nn.Module, x: Tensor) -> Tensor:
    dim = x.shape[1]
    y = conv(block.local, conv(block.widen, normed(block.first_norm, x, 1)), padding=1, groups=2 * dim)
    y = y[:, :dim] * y[:, dim:]
    y = conv(block.narrow, y * conv(block.weigh, y.mean((2, 3), keepdim=True)))
    x = x + block.first_scale * y
    z = conv(block.mlp[0], normed(block.second_norm, x, 1))
    return x + block.second_scale * conv(block.mlp[2], z[:, :dim] * z[:, dim:])


def attended(layer: nn.Module, x: Tensor, labels: Tensor, heads: int) -> Tensor:
    """Attention among tokens of equal labels (B, N)."""
    parts = linear(layer.to_qkv, x).chunk(3, -1)
    q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in parts)
    mask = (labels.unsqueeze(1) == labels.unsqueeze(2)).unsqueeze(1)
    return linear(layer.to_out, masked(q, k, v, mask, heads**-0.5).transpose(1, 2).flatten(2))


def middle(group: nn.Module, image: Tensor, regions: Tensor, heads: int, window: int) -> Tensor:
    height, width = image.shape[2:]
    place = torch.arange(height * width)
    windows = (place // width // window * (width // window) + place % width // window).expand(len(image), -1)
    x = image.flatten(2).mT
    for block in group.blocks:
        for number, labels in enumerate((regions, windows)):
            normal = normed(block.norms[2 * number], x, 2)
            x = x + block.scales[number] * attended(block.attentions[number], normal, labels, heads)
            mlp = block.mlps[number]
            x = x + linear(mlp.second, gelu(linear(mlp.first, normed(block.norms[2 * number + 1], x, 2))))
    return image + conv(group.conv, x.mT.unflatten(2, (height, width)), padding=1)


def formula(model: nn.Module, images: Tensor, regions: Tensor, window: int) -> Tensor:
    """One encoder, two groups, one decoder; sizes up to whole windows at half the size, by the last row and column."""
    height, width = images.shape[2:]
    whole = [-(-size // (2 * window)) * 2 * window for size in (height, width)]
    rows, columns = ([min(p, size - 1) for p in range(most)] for size, most in zip((height, width), whole, strict=True))
    padded = images[:, :, rows][..., columns]
    coarse = regions[:, rows][..., columns][:, ::2, ::2].flatten(1)
    kept = naf(model.encoders[0][0], conv(model.stem, padded, padding=1))
    x = short = conv(model.downs[0], kept, stride=2)
    for group in model.middle:
        x = middle(group, x, coarse, 2, window)
    up = pixel_shuffle(conv(model.ups[0][0], x + short), 2)
    out = conv(model.head, naf(model.decoders[0][0], up + kept), padding=1)
    return images + out[:, :, :height, :width]


@pytest.mark.paper("RAT (R-MSA)", "definition")
def test_the_model_is_the_authors_written_out() -> None:
    model = rat(2, dim=4, encoders=(1,), decoders=(1,), middle=(2, 1), heads=2, window=2).double()
    images = torch.randn(2, 2, 9, 7, dtype=torch.float64, requires_grad=True)
    regions = torch.randint(3, (2, 9, 7))
    assert not any(scale.any() for name, scale in model.named_parameters() if "scale" in name)
    follows(model, lambda: model(images, regions), lambda: formula(model, images, regions, 2), images)


@pytest.mark.paper("RAT (R-MSA)", "definition")
@pytest.mark.paper("RAT (R-MSA)", "works_when")
@pytest.mark.parametrize("kind", ["scattered", "single pixels", "one region", "numbers left out"])
def test_regions_of_any_shape_are_a_mask_of_equal_numbers(kind: str) -> None:
    regions = {
        "scattered": torch.randint(4, (2, 5, 7)),
        "single pixels": torch.arange(35).view(1, 5, 7).flip(2).repeat(2, 1, 1),
        "one region": torch.full((2, 5, 7), 9),
        "numbers left out": torch.randint(2, (2, 5, 7)) * 1000 + 3,
    }[kind].flatten(1)
    heads = [torch.randn(2, 3, 35, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = (regions.unsqueeze(1) == regions.unsqueeze(2)).unsqueeze(1)
    follows(nn.Module(), lambda: region_attention(*heads, regions), lambda: masked(*heads, mask), *heads)
    if kind == "single pixels":
        torch.testing.assert_close(region_attention(*heads, regions), heads[2])


@pytest.mark.paper("RAT (R-MSA)", "works_when")
def test_the_cost_is_the_sum_of_squared_sizes() -> None:
    sizes = [1, 1, 3, 40, 155, 0, 100]
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[torch.randperm(300)]
    heads = [torch.randn(1, 2, 300, 8) for _ in range(3)]
    with count_operations() as counted:
        region_attention(*heads, labels.unsqueeze(0))
    assert counted.pairs == 2 * sum(size**2 for size in sizes)


@pytest.mark.paper("RAT (R-MSA)", "works_when")
def test_tiles_of_other_regions_are_not_computed() -> None:
    sizes = [64, 128, 192, 640]
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))[torch.randperm(1024)]
    heads = [torch.randn(1, 2, 1024, 8) for _ in range(3)]
    with count_operations() as counted:
        region_attention(*heads, labels.unsqueeze(0))
    assert counted.computed < 1.3 * 2 * sum(size**2 for size in sizes) < 1.3 * 0.5 * 2 * 1024**2


@pytest.mark.paper("RAT (R-MSA)", "works_when")
def test_who_knows_the_regions_restores_better_than_who_does_not() -> None:
    """Pixels of a region, scattered over the image, are of one brightness under noise: the same model, one region."""

    def loss_of(knows: bool) -> float:
        model = rat(1, dim=8, encoders=(), decoders=(), middle=(1,), heads=2, window=2)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(90):
            regions = torch.randint(4, (8, 8, 8))
            clean = torch.randn(8, 4).gather(1, regions.flatten(1)).view(8, 1, 8, 8)
            restored = model(clean + torch.randn_like(clean), regions if knows else None)
            loss = (restored - clean).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        return sum(losses[-15:])

    assert loss_of(knows=True) < 0.75 * loss_of(knows=False)


def test_what_does_not_fit_is_refused() -> None:
    model = rat(1, dim=4, encoders=(1,), decoders=(1,), middle=(1,), heads=2)
    with pytest.raises(ValueError, match="regions are"):
        model(torch.randn(1, 1, 8, 8), torch.zeros(1, 4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="as many decoders"):
        rat(encoders=(1,), decoders=(1, 1))
    with pytest.raises(ValueError, match="whole numbers"):
        region_attention(*torch.randn(3, 1, 1, 4, 2), torch.zeros(1, 4))
