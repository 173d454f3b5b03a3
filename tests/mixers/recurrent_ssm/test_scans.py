"""Scans along several paths against naive recurrences, and what makes each path what it is."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tests.mixers.recurrent_ssm.test_mamba import DIM, convolved, scanned, shaken, tokens
from tests.support.counted_work import work
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.testing import assert_close

from foveate import Grid, Packed, Points
from foveate.layouts import zigzag
from foveate.mixers.base import Mixer
from foveate.mixers.recurrent_ssm.audio_mamba import BidirectionalMamba
from foveate.mixers.recurrent_ssm.dual_path import DualPathMamba, overlap_add, segment
from foveate.mixers.recurrent_ssm.mamba import Branch, Mamba
from foveate.mixers.recurrent_ssm.mamba3d import LocalNormPooling, Mamba3D, nearest
from foveate.mixers.recurrent_ssm.s_mamba import SMamba
from foveate.mixers.recurrent_ssm.videomamba import VideoMamba
from foveate.mixers.recurrent_ssm.viper import FiLM, ViperScan
from foveate.mixers.recurrent_ssm.vmamba import VMamba
from foveate.mixers.recurrent_ssm.zigma import ZigMa


def passed(branch: nn.Module, u: Tensor) -> Tensor:
    """One pass of a branch, by hand."""
    assert isinstance(branch, Branch)
    return scanned(branch.ssm, convolved(branch.conv, u))


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def gated(mamba: Mamba, x: Tensor) -> Tensor:
    """A whole Mamba block, by hand."""
    u, gate = mamba.to_in(x).chunk(2, -1)
    return mamba.to_out(passed(mamba.branch, u) * silu(gate))


def both_ways(block: BidirectionalMamba, x: Tensor) -> Tensor:
    """A bidirectional block, by hand."""
    u, gate = block.to_in(x).chunk(2, -1)
    y = passed(block.passes[0], u) + passed(block.passes[1], u.flip(1)).flip(1)
    return block.to_out(y * silu(gate))


def along(index: Tensor, run: Any, u: Tensor) -> Tensor:
    """Run over tokens in an order, each answer put where its token lives."""
    return run(u[:, index])[:, index.argsort()]


def convolved_around(conv: Any, x: Tensor, grid: Grid) -> Tensor:
    """Each channel with the 3 nearest tokens along each axis, tap by tap; zeros lie outside."""
    image = x.mT.unflatten(2, grid.dims)
    out = torch.zeros_like(image) if conv.bias is None else conv.bias.view(-1, *(1 for _ in grid.dims)).expand_as(image)
    padded = nn.functional.pad(image, (1, 1) * grid.num_axes)
    for tap in itertools.product(range(3), repeat=grid.num_axes):
        where = tuple(slice(at, at + side) for at, side in zip(tap, grid.dims, strict=True))
        weight = conv.weight[(slice(None), 0, *tap)]
        out = out + padded[(slice(None), slice(None), *where)] * weight.view(-1, *(1 for _ in grid.dims))
    return out.flatten(2).mT


def agree(mixer: nn.Module, out: Tensor, expected: Tensor, x: Tensor) -> None:
    """Values, and gradients of the tokens and of all parameters."""
    assert_close(out, expected)
    towards, wanted = torch.randn_like(out), [x, *mixer.parameters()]
    mine, plain = (torch.autograd.grad((each * towards).sum(), wanted) for each in (out, expected))
    assert_close(mine, plain)
    assert all(bool((gradient != 0).any()) for gradient in mine)


def as_it_begins(module: nn.Module) -> Any:
    """In float64, with the parameters it starts with."""
    return module.double()


begun_and_shaken = pytest.mark.parametrize("begun", [as_it_begins, shaken])

# ---- both ways -----------------------------------------------------------------------------------------


@pytest.mark.paper("AuM (Audio Mamba)", "definition")
@pytest.mark.paper("AuM (Audio Mamba)", "works_when")
@begun_and_shaken
def test_bidirectional_mamba_is_two_scans(begun: Any) -> None:
    mixer, x = begun(BidirectionalMamba(DIM, state=5)), tokens(23).requires_grad_()
    agree(mixer, mixer(x), both_ways(mixer, x), x)


@pytest.mark.parametrize("kind", [BidirectionalMamba, SMamba])
def test_documents_are_walked_backwards_each_on_its_own(kind: Any) -> None:
    mixer, x, lengths = shaken(kind(DIM, state=5)), tokens(30), [4, 0, 19, 7]
    expected = torch.cat([mixer(piece) for piece in x.split(lengths, 1)], 1)
    assert_close(mixer(x, layout=Packed(lengths)), expected)


@pytest.mark.paper("VideoMamba (ST-SSM)", "definition")
@begun_and_shaken
def test_videomamba_turns_space_and_time_round(begun: Any) -> None:
    grid, x = Grid(3, 4, 5), tokens(60).requires_grad_()
    space, time = torch.arange(60), torch.arange(60).view(3, 20).T.flatten()
    for first, forwards in (("space", space), ("time", time)):
        mixer = begun(VideoMamba(DIM, first=first, state=5))
        u, gate = mixer.to_in(x).chunk(2, -1)
        y = along(forwards, lambda v: passed(mixer.passes[0], v), u)  # noqa: B023
        y = y + along(forwards.flip(0), lambda v: passed(mixer.passes[1], v), u)  # noqa: B023
        agree(mixer, mixer(x, layout=grid), mixer.to_out(y * silu(gate)), x)


@pytest.mark.parametrize(
    ("kind", "sides"),
    [
        pytest.param(BidirectionalMamba, (), marks=pytest.mark.paper("AuM (Audio Mamba)", "works_when")),
        pytest.param(VideoMamba, (4, 4), marks=pytest.mark.paper("VideoMamba (ST-SSM)", "works_when")),
        (VMamba, (16,)),
        (ZigMa, (16,)),
        (SMamba, ()),
    ],
)
def test_counted_work_grows_linearly(kind: Any, sides: tuple[int, ...]) -> None:
    mixer, counted = kind(DIM, state=4), []
    for count in (32, 64, 128):
        layout = Grid(count, *sides) if sides else None
        x = torch.randn(1, 16 * count, DIM)
        counted.append(work(lambda: mixer(x, layout=layout)))  # noqa: B023
    assert 1.9 < counted[1] / counted[0] < 2.1 and 1.9 < counted[2] / counted[1] < 2.1


# ---- images, zigzags -----------------------------------------------------------------------------------


@pytest.mark.paper("VMamba / SS2D", "definition")
@begun_and_shaken
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("grid", [Grid(5, 7), Grid(2, 3, 4)], ids=str)
def test_vmamba_scans_an_image_in_all_directions(grid: Grid, gate: bool, begun: Any) -> None:
    mixer, x = begun(VMamba(DIM, axes=grid.num_axes, state=5, gate=gate)), tokens(grid.length).requires_grad_()
    u, opened = (x @ mixer.to_in.weight.mT).split(2 * DIM, -1) if gate else (x @ mixer.to_in.weight.mT, None)
    u = silu(convolved_around(mixer.conv, u, grid))
    place = torch.arange(grid.length).view(grid.dims)
    ways = [(0, 1), (1, 0)] if grid.num_axes == 2 else [(0, 1, 2), (0, 2, 1), (1, 2, 0)]  # the last axis is walked
    paths = [place.permute(way).flatten() for way in ways]
    paths += [path.flip(0) for path in paths]
    assert len(paths) == len(mixer.passes)
    y = sum(along(path, lambda v: scanned(ssm, v), u) for path, ssm in zip(paths, mixer.passes, strict=True))  # noqa: B023
    normed = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    y = normed * mixer.norm.weight + mixer.norm.bias
    agree(mixer, mixer(x, layout=grid), mixer.to_out(y if opened is None else y * silu(opened)), x)


def test_every_pixel_of_vmamba_sees_every_other() -> None:
    grid, mixer = Grid(4, 5), shaken(VMamba(DIM, state=5))
    x = tokens(20, batch=1).requires_grad_()
    out = mixer(x, layout=grid)
    for pixel in range(20):
        (gradient,) = torch.autograd.grad(out[0, pixel].sum(), x, retain_graph=True)
        assert bool((gradient[0].abs().sum(-1) > 0).all())


def serpentines(height: int, width: int) -> list[Tensor]:
    """The eight paths that turn round at each border: from each corner, along the rows or along the columns."""
    paths = []
    for along_columns, last_row, last_column in itertools.product((False, True), repeat=3):
        places = torch.arange(height * width).view(height, width)
        places = places.flip([axis for axis, far in enumerate((last_row, last_column)) if far])
        lines = [line.tolist() for line in (places.T if along_columns else places)]
        paths.append(torch.tensor([at for i, line in enumerate(lines) for at in (line[::-1] if i % 2 else line)]))
    return paths


@pytest.mark.paper("ZigMa", "definition")
def test_zigma_cycles_over_the_eight_serpentines() -> None:
    height, width = 5, 7
    paths, used, x = serpentines(height, width), [], tokens(35)
    for path in paths:
        assert path.sort().values.tolist() == list(range(35))
        steps = (path[1:] // width - path[:-1] // width).abs() + (path[1:] % width - path[:-1] % width).abs()
        assert (steps == 1).all()  # neighbours on the path are neighbours on the grid
    for depth in range(10):
        mixer = shaken(ZigMa(DIM, layer=depth, state=5))
        out = mixer(x, layout=Grid(height, width))
        same = [torch.allclose(out, along(path, lambda u: gated(mixer.mamba, u), x)) for path in paths]  # noqa: B023
        assert sum(same) == 1
        used.append(same.index(True))
    assert sorted(used[:8]) == list(range(8)) and used[8:] == used[:2]


@pytest.mark.parametrize("layer", [0, 3, 7, 9])
def test_zigma_is_mamba_along_the_zigzag_of_its_layer(layer: int) -> None:
    grid, mixer, x = Grid(5, 7), shaken(ZigMa(DIM, layer=layer, state=5)), tokens(35)
    index = zigzag(grid)[layer % 8].index
    assert_close(mixer(x, layout=grid), along(index, mixer.mamba, x))


def test_zigma_takes_videos_apart() -> None:
    grid, x = Grid(3, 4, 5), tokens(60)
    kinds = []
    for layer in range(8):
        mixer = shaken(ZigMa(DIM, layer=layer, state=5))
        changed = x.clone()
        changed[:, 20:40] += torch.randn(2, 20, DIM).double()  # the middle frame
        moved = (mixer(changed, layout=grid) - mixer(x, layout=grid)).abs().sum((0, 2)).view(3, 20)
        if bool((moved[[0, 2]] == 0).all()):
            kinds.append("space")
            frame = mixer.mamba(x[:, :20, :][:, mixer.path(grid)[0].index[:20]])
            assert_close(mixer(x, layout=grid)[:, mixer.path(grid)[0].index[:20]], frame)
        else:
            kinds.append("time")
            pixel = x[:, 7::20]
            forwards = layer % 6 == 2
            line = mixer.mamba(pixel) if forwards else mixer.mamba(pixel.flip(1)).flip(1)
            assert_close(mixer(x, layout=grid)[:, 7::20], line)
    assert kinds == ["space", "space", "time"] * 2 + ["space", "space"]
    spatial = [ZigMa(8, layer=layer).path(grid)[0].index[:20].tolist() for layer in (0, 1, 3, 4, 6, 7, 9, 10)]
    assert len({tuple(path) for path in spatial}) == 8


# ---- time series, speech, points, text and images ------------------------------------------------------


@pytest.mark.paper("S-Mamba", "definition")
@begun_and_shaken
def test_s_mamba_is_two_blocks(begun: Any) -> None:
    mixer, x = begun(SMamba(DIM, state=5)), tokens(9).requires_grad_()
    agree(mixer, mixer(x), gated(mixer.forwards, x) + gated(mixer.backwards, x.flip(1)).flip(1), x)


@pytest.mark.parametrize("size", [2, 6, 16])
def test_overlapping_chunks_have_an_exact_inverse(size: int) -> None:
    for length in (1, 5, 16, 37):
        x = torch.randn(2, length, 3)
        chunks = segment(x, size)
        assert torch.equal(overlap_add(chunks, length), x)
        counted = overlap_add(torch.ones_like(chunks), length)
        assert torch.equal(counted, torch.ones_like(x))
        assert torch.equal(chunks[:, 1:, : size // 2], chunks[:, :-1, size // 2 :])


@pytest.mark.paper("Dual-path Mamba", "definition")
def test_dual_path_mamba_goes_inside_chunks_and_across() -> None:
    mixer, x = shaken(DualPathMamba(DIM, chunk=8, expand=1, state=3)), tokens(29)
    hop, count = 4, 9
    whole = torch.cat([torch.zeros(2, hop, DIM).double(), x, torch.zeros(2, 7, DIM).double()], 1)
    chunks = torch.stack([whole[:, at * hop : at * hop + 8] for at in range(count)], 1)
    first = rms(chunks) * mixer.norms[0].weight
    inside = torch.stack([both_ways(mixer.inside, first[:, at]) for at in range(count)], 1)
    second = rms(chunks + inside) * mixer.norms[1].weight
    across = torch.stack([both_ways(mixer.across, second[:, :, place]) for place in range(8)], 2)
    total = torch.zeros_like(whole)
    for at in range(count):
        total[:, at * hop : at * hop + 8] += (inside + across)[:, at] / 2
    assert_close(mixer(x), total[:, hop : hop + 29])


def test_dual_paths_reach_everywhere() -> None:
    mixer = shaken(DualPathMamba(DIM, chunk=4, expand=1, state=3))
    x = tokens(40, batch=1).requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(x)[0, 20].sum(), x)
    assert bool((gradient.abs().sum(-1) > 0).all())


def test_the_nearest_points_are_found() -> None:
    layout = Points(torch.rand(50, 3))
    distances = (layout.coords[:, None] - layout.coords).norm(dim=-1)
    assert torch.equal(nearest(layout, 5), distances.argsort(1)[:, :5])
    assert nearest(Grid(2, 2), 9).shape == (4, 4)


@pytest.mark.paper("Mamba3D", "definition")
def test_local_norm_pooling_by_hand() -> None:
    pool, x, layout = shaken(LocalNormPooling(DIM)), tokens(17), Points(torch.rand(17, 2))
    neighbours = nearest(layout, 4)
    out = torch.empty(2, 17, 2 * DIM, dtype=x.dtype)
    for row in range(2):
        relative = torch.stack([x[row, neighbours[i]] - x[row, i] for i in range(17)])
        relative = relative / (relative.square().mean().sqrt() + 1e-5)
        for i in range(17):
            features = torch.cat([relative[i], x[row, i].expand(4, -1)], -1) * pool.scale + pool.shift
            out[row, i] = (features * features.exp()).sum(0) / features.exp().sum(0)
    assert_close(pool(x, neighbours), silu(pool.to_out(pool.norm(out))))


@pytest.mark.paper("Mamba3D", "definition")
@pytest.mark.parametrize("backward", ["reversed", "channels"])
def test_mamba3d_scans_tokens_and_channels(backward: str) -> None:
    layout, x = Points(torch.rand(17, 3)), tokens(17)
    mixer = shaken(Mamba3D(DIM, backward=backward, expand=1, state=3))
    local = mixer.pool(mixer.norms[0](x), nearest(layout, 4))
    u, gate = mixer.to_in(mixer.norms[1](x + local)).chunk(2, -1)
    reading = u[..., torch.arange(DIM - 1, -1, -1)]
    if backward == "channels":
        lines = [passed(mixer.over_features, reading[:, i].unsqueeze(-1)) for i in range(17)]
        second = torch.stack(lines, 1).squeeze(-1)
    else:
        second = passed(mixer.over_features, reading)
    y = passed(mixer.over_tokens, u) + second.flip(-1)
    assert_close(mixer(x, layout=layout), local + mixer.to_out(y * silu(gate)))
    wanted = [*mixer.parameters()]
    for gradient in torch.autograd.grad(mixer(x, layout=layout).square().sum(), wanted):
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.paper("Viper-F1", "definition")
def test_viper_modulates_its_scan_by_what_each_token_matches() -> None:
    mixer = shaken(ViperScan(DIM, top=3, match=6, state=4))
    x, patches = tokens(9), tokens(20)
    query, key = mixer.to_query(x), mixer.to_key(patches)
    matched = torch.zeros(2, 9, 6, dtype=x.dtype)
    for row in range(2):
        for t in range(9):
            cosine = torch.cosine_similarity(query[row, t].unsqueeze(0), key[row], dim=-1)
            best = cosine.argsort(descending=True)[:3]
            weights = (cosine[best] / 0.1).softmax(0)
            matched[row, t] = weights @ mixer.to_value(patches[row, best])

    def film(layer: FiLM, y: Tensor) -> Tensor:
        gamma, beta = layer.to_both(matched).chunk(2, -1)
        return (1 + gamma) * y + beta

    u, gate = mixer.to_in(x).chunk(2, -1)
    u, ssm = silu(film(mixer.enter, u)), mixer.ssm
    low, write, read = ssm.to_choices(u).split([ssm.rank, 4, 4], -1)
    step, write, read = film(mixer.dynamics, torch.cat([ssm.to_step(low), write, read], -1)).split([DIM, 4, 4], -1)
    step = torch.log1p((step + ssm.step_bias).exp())
    state, outs = torch.zeros(2, DIM, 4, dtype=x.dtype), []
    for t in range(9):
        state = torch.exp(-step[:, t, :, None] * ssm.A_log.exp()) * state
        state = state + (step[:, t] * u[:, t]).unsqueeze(-1) * write[:, t, None, :]
        outs.append((state * read[:, t, None, :]).sum(-1) + ssm.D * u[:, t])
    y = torch.stack(outs, 1) * silu(gate)
    out, expected = mixer(x, context=patches), film(mixer.leave, mixer.to_out(y))
    assert_close(out, expected)
    mine, plain = (torch.autograd.grad(each.square().sum(), [*mixer.parameters()]) for each in (out, expected))
    assert_close(mine, plain)


def test_counted_work_of_viper_grows_linearly() -> None:
    mixer, patches = ViperScan(DIM, top=3, match=6, state=4), torch.randn(1, 20, DIM)
    counted = [work(lambda: mixer(torch.randn(1, n, DIM), context=patches)) for n in (512, 1024, 2048)]  # noqa: B023
    assert 1.9 < counted[1] / counted[0] < 2.1 and 1.9 < counted[2] / counted[1] < 2.1


def test_viper_looks_at_its_best_patches_only() -> None:
    mixer = shaken(ViperScan(DIM, top=2, match=6, state=4))
    x, patches = tokens(3), tokens(20).requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(x, context=patches).square().sum(), patches)
    assert int((gradient.abs().sum(-1) > 0).sum(1).max()) <= 3 * 2
    assert mixer(x, context=patches[:, :0]).isfinite().all()


def test_refusals_say_what_to_do() -> None:
    x = torch.randn(1, 12, 8)
    wrongs: list[tuple[str, Any]] = [
        ("lives on a grid of 3 axes", lambda: VideoMamba(8)(x, layout=Grid(3, 4))),
        ("lives on a grid of 2 axes", lambda: VMamba(8)(x)),
        ("lives on a grid of 2 or 3 axes", lambda: ZigMa(8)(x)),
        ("space", lambda: VideoMamba(8, first="height")),
        ("axes is 2", lambda: VMamba(8, axes=4)),
        ("odd number", lambda: VMamba(8, conv=2)),
        ("from 0", lambda: ZigMa(8, layer=-1)),
        ("even number", lambda: DualPathMamba(8, chunk=5)),
        ("neighbours", lambda: Mamba3D(8)(x)),
        ("itself", lambda: Mamba3D(8, neighbours=0)),
        ("channels", lambda: Mamba3D(8, backward="tokens")),
        ("positive", lambda: ViperScan(8, top=0)),
        ("no causal form", lambda: BidirectionalMamba(8, causal=True)),
    ]
    for message, wrong in wrongs:
        with pytest.raises(ValueError, match=message):
            wrong()


def test_they_are_mixers() -> None:
    for kind in (BidirectionalMamba, VideoMamba, VMamba, ZigMa, SMamba, DualPathMamba, Mamba3D, ViperScan):
        assert issubclass(kind, Mixer) and kind.row.mixer is kind
