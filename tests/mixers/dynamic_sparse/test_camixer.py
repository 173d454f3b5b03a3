"""CAMixer: router, both paths and the convolutions behind them, written out; drawing in training; work by the ratio."""

from __future__ import annotations

import pytest
import torch
from tests.support.formulas import follows
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, leaky_relu

from foveate import Grid
from foveate.catalogue.registry import mixer
from foveate.counting import count_operations

DIM, L = 12, 3


def conv(layer: nn.Conv2d, x: Tensor, **options: int) -> Tensor:
    return conv2d(x, layer.weight, layer.bias, **options)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def windows(dims: tuple[int, int]) -> list[tuple[slice, slice]]:
    return [(slice(r, r + L), slice(c, c + L)) for r in range(0, dims[0], L) for c in range(0, dims[1], L)]


def sampled(image: Tensor, offsets: Tensor) -> Tensor:
    """Pixel by pixel: the four pixels around the place, those beyond the border taken on it."""
    batch, _, height, width = image.shape
    out = torch.zeros_like(image)
    for b in range(batch):
        for r in range(height):
            for c in range(width):
                x = (c + offsets[b, 0, r, c]).clamp(0, width - 1)
                y = (r + offsets[b, 1, r, c]).clamp(0, height - 1)
                left, top = int(x.detach().floor()), int(y.detach().floor())
                right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
                fx, fy = x - left, y - top
                upper = image[b, :, top, left] * (1 - fx) + image[b, :, top, right] * fx
                lower = image[b, :, bottom, left] * (1 - fx) + image[b, :, bottom, right] * fx
                out[b, :, r, c] = upper * (1 - fy) + lower * fy
    return out


def routed(router: nn.Module, values: Tensor, dims: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    side = torch.linspace(-1, 1, L, dtype=values.dtype)
    rows, columns = side.repeat(dims[0] // L)[:, None].expand(dims), side.repeat(dims[1] // L).expand(dims)
    given = torch.cat((values, torch.stack((rows, columns)).expand(len(values), -1, -1, -1)), 1)
    x = conv(router.inner, given)
    centred = x - x.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    x = leaky_relu(normed * router.norm.weight[:, None, None] + router.norm.bias[:, None, None], 0.1)
    offsets = 8 * torch.tanh(conv(router.offsets[2], leaky_relu(conv(router.offsets[0], x), 0.1)))
    flat = torch.stack([x.mean(1)[:, r, c].flatten(1) for r, c in windows(dims)], 1)
    scores = torch.softmax(linear(router.windows[2], leaky_relu(linear(router.windows[0], flat), 0.1)), -1)
    channel = torch.sigmoid(conv(router.channel, x.mean((2, 3), keepdim=True)))
    return scores, offsets, torch.sigmoid(conv(router.spatial, x, padding=1)), channel


def formula(layer: nn.Module, x: Tensor, dims: tuple[int, int], complex_of: list[list[bool]]) -> Tensor:
    """The mixer, if these windows of each image attend."""
    image, values = x.mT.unflatten(2, dims), linear(layer.to_v, x).mT.unflatten(2, dims)
    _, offsets, spatial, channel = routed(layer.router, values, dims)
    keys = image + sampled(image, offsets)
    mixed = values * spatial
    for b, takes in enumerate(complex_of):
        for (r, c), takes_part in zip(windows(dims), takes, strict=True):
            if takes_part:
                q = linear(layer.to_q, image[b, :, r, c].flatten(1).T)
                k = linear(layer.to_k, keys[b, :, r, c].flatten(1).T)
                v = values[b, :, r, c].flatten(1).T
                attended = torch.softmax(q @ k.T, -1) @ v
                mixed = mixed.clone()
                mixed[b, :, r, c] = attended.T.unflatten(1, (L, L))
    near = conv(layer.near, mixed, padding=1, groups=DIM)
    out = gelu(conv(layer.far, near, padding=2, dilation=2, groups=DIM)) * channel + mixed
    return linear(layer.to_out, out.flatten(2).mT)


def best(layer: nn.Module, x: Tensor, dims: tuple[int, int], ratio: float) -> list[list[bool]]:
    with torch.no_grad():
        scores = routed(layer.router, linear(layer.to_v, x).mT.unflatten(2, dims), dims)[0][:, :, 0].tolist()
    count = int(len(scores[0]) * ratio)
    ranked = [sorted(range(len(row)), key=lambda w: -row[w])[:count] for row in scores]
    return [[w in row for w in range(len(scores[0]))] for row in ranked]


@pytest.mark.paper("CAMixerSR", "definition")
@pytest.mark.paper("CAMixerSR", "works_when")
@pytest.mark.parametrize(("dims", "ratio"), [((6, 9), 0.5), ((3, 15), 0.25), ((6, 6), 1.0), ((3, 6), 0.0)])
def test_evaluated_it_is_both_paths_written_out(dims: tuple[int, int], ratio: float) -> None:
    layer = mixer("camixer", DIM, window=L, ratio=ratio).double().eval()
    x = torch.randn(2, dims[0] * dims[1], DIM, dtype=torch.float64, requires_grad=True)

    def written() -> Tensor:
        return formula(layer, x, dims, best(layer, x, dims, ratio))

    follows(layer, lambda: layer(x, layout=Grid(*dims)), written, x, rtol=1e-6)


@pytest.mark.paper("CAMixerSR", "works_when")
def test_in_training_windows_are_drawn_and_the_router_learns() -> None:
    """What it gives is both paths for some windows; over many draws, the windows' share is their score."""
    dims = (3, 6)
    layer = mixer("camixer", DIM, window=L).double().train()
    x = torch.randn(1, 18, DIM, dtype=torch.float64)
    cases = {(a, b): formula(layer, x, dims, [[a, b]]).detach() for a in (False, True) for b in (False, True)}
    drawn = []
    for _ in range(150):
        out = layer(x, layout=Grid(*dims)).detach()
        drawn += [case for case, wanted in cases.items() if torch.allclose(out, wanted, rtol=1e-9, atol=1e-9)]
    assert len(drawn) == 150
    scores = routed(layer.router, linear(layer.to_v, x).mT.unflatten(2, dims), dims)[0][0, :, 0]
    for window in range(2):
        share = sum(case[window] for case in drawn) / 150
        assert abs(share - float(scores[window].detach())) < 0.2
    layer(x, layout=Grid(*dims)).square().sum().backward()
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in layer.router.windows.parameters())


@pytest.mark.paper("CAMixerSR", "works_when")
def test_attention_s_work_follows_the_ratio() -> None:
    pairs = {}
    for ratio in (0.0, 0.25, 0.5, 1.0):
        layer = mixer("camixer", DIM, window=4, ratio=ratio).eval()
        with torch.no_grad(), count_operations() as counted:
            layer(torch.randn(2, 256, DIM), layout=Grid(16, 16))
        pairs[ratio] = counted.pairs
    assert pairs == {ratio: int(2 * 16 * ratio) * 16**2 for ratio in pairs}


def test_grids_of_cut_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="not whole windows of 8"):
        mixer("camixer", DIM)(torch.randn(1, 72, DIM), layout=Grid(8, 9))
    with pytest.raises(ValueError, match="share of windows"):
        mixer("camixer", DIM, ratio=1.5)
