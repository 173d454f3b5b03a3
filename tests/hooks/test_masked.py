"""Applications whose attention is plain but for who sees whom: that told pair by pair, and softmax over the table."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from foveate import Grid, attend, boolean_mask
from foveate.adapt import as_core
from foveate.catalogue import tiers
from foveate.catalogue.contracts import Hook

Sees = Callable[[int, int, int], bool]  # batch entry, query, key


def hook(name: str, **sizes: object) -> Hook:
    row = tiers.row(name)
    assert isinstance(row, tiers.HookRow)
    return row.make(**sizes)


def dense(q: Tensor, k: Tensor, v: Tensor, sees: Sees) -> Tensor:
    """Softmax over what each query sees; zeros for one that sees nothing."""
    nothing = 0 * (q.sum() + k.sum() + v.sum()) + torch.zeros(q.shape[1], v.shape[3], dtype=q.dtype)
    rows = []
    for b in range(q.shape[0]):
        for i in range(q.shape[2]):
            keys = [j for j in range(k.shape[2]) if sees(b, i, j)]
            if keys:
                logits = torch.einsum("hd,hmd->hm", q[b, :, i], k[b, :, keys]) / math.sqrt(q.shape[3])
                rows.append(torch.einsum("hm,hmd->hd", logits.softmax(-1), v[b, :, keys]))
            else:
                rows.append(nothing)
    return torch.stack(rows).unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


def compare(found: Hook, sees: Sees, batch: int = 1) -> None:
    """Values and gradients of what the hook says are those of the table, and its fast implementations give the same."""
    core, keys = as_core(found.operator, **found.options), found.keys
    shapes = (found.queries or keys, keys, keys)
    q, k, v = (torch.randn(batch, 2, length, 6, dtype=torch.float64, requires_grad=True) for length in shapes)
    outs = core(q, k, v, layout=found.layout), dense(q, k, v, sees)
    torch.testing.assert_close(*outs)
    towards = torch.randn_like(outs[0])
    for one, other in zip(*(torch.autograd.grad(out, (q, k, v), towards) for out in outs), strict=True):
        torch.testing.assert_close(one, other)
    single = core(q.float(), k.float(), v.float(), layout=found.layout)
    torch.testing.assert_close(single.double(), outs[1], rtol=1e-4, atol=1e-4)


@pytest.mark.paper("SAITS", "definition")
@pytest.mark.paper("SAITS", "works_when")
@pytest.mark.parametrize("steps", [1, 2, 13, 70])
def test_a_step_sees_all_others(steps: int) -> None:
    compare(hook("saits", steps=steps), lambda b, i, j: i != j, batch=2)


@pytest.mark.paper("SAITS", "works_when")
def test_rows_that_see_nothing_are_zeros_and_have_zero_gradients() -> None:
    """A series of which one step alone is observed: it may not see itself, and nothing else is there."""
    observed = torch.tensor([[False, True, False, False], [True, True, False, True]])
    q, k, v = (torch.randn(2, 2, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    seen = boolean_mask(observed[:, None, None].expand(-1, -1, 4, -1))
    pattern = as_core(hook("saits").operator).pattern & seen
    want = dense(q, k, v, lambda b, i, j: i != j and bool(observed[b, j]))
    expected = torch.autograd.grad(want.square().sum(), (q, k, v))
    for impl in ("reference", "tiles"):
        out = attend(q, k, v, pattern, impl=impl)
        torch.testing.assert_close(out, want)
        assert bool((out[0, :, 1] == 0).all())
        found = torch.autograd.grad(out.square().sum(), (q, k, v))
        for gradient, other in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, other)
        assert bool((found[0][0, :, 1] == 0).all())


@pytest.mark.paper("Through-The-Mask", "definition")
@pytest.mark.paper("Through-The-Mask", "works_when")
def test_tokens_see_their_own_object_and_its_own_words() -> None:
    labels, words = torch.randint(0, 4, (57,)), torch.randint(0, 3, (11,))
    compare(hook("through_the_mask", labels=labels), lambda b, i, j: bool(labels[i] == labels[j]))
    compare(hook("through_the_mask_prompts", labels=labels, words=words), lambda b, i, j: bool(labels[i] == words[j]))


@pytest.mark.paper("Through-The-Mask", "works_when")
def test_no_table_of_pairs_is_formed() -> None:
    from foveate import explain
    from foveate.counting import count_operations

    frame, row, column = Grid(64, 16, 16).coordinates(torch.arange(64 * 256))
    object_here = ((row - frame % 16).abs() < 4) & ((column - frame % 16).abs() < 4)
    found = hook("through_the_mask", labels=object_here)
    q = torch.randn(1, 1, found.keys, 8)
    pattern = as_core(found.operator).pattern
    with torch.no_grad(), count_operations(inside=True) as counted:
        attend(q, q, q, pattern, impl="tiles")
    assert counted.largest < found.keys**2 / 8
    assert explain(q, q, q, pattern).chosen != "reference"


@pytest.mark.paper("POSTER++", "definition")
@pytest.mark.paper("POSTER++", "works_when")
@pytest.mark.parametrize(("height", "width", "window"), [(8, 6, 2), (7, 5, 3), (6, 6, 6)])
def test_landmarks_ask_the_image_in_the_same_window(height: int, width: int, window: int) -> None:
    def box(at: int) -> tuple[int, int]:
        return at // width // window, at % width // window

    found = hook("poster_v2", height=height, width=width, window=window)
    assert found.layout == Grid(height, width)
    compare(found, lambda b, i, j: box(i) == box(j))


@pytest.mark.paper("MoCha", "definition")
@pytest.mark.paper("MoCha", "works_when")
@pytest.mark.parametrize(
    ("frames", "tokens", "speech", "reach"), [(4, 3, 13, 2), (5, 1, 5, 0), (3, 4, 20, 1), (6, 2, 4, 1)]
)
def test_a_frame_hears_what_is_said_around_its_moment(frames: int, tokens: int, speech: int, reach: int) -> None:
    def hears(b: int, i: int, j: int) -> bool:
        begin, end = i // tokens / frames, (i // tokens + 1) / frames  # of the frame, in shares of the clip
        return begin * speech - reach < j + 1 - 1e-9 and j < end * speech + reach - 1e-9

    compare(hook("mocha_speech", frames=frames, tokens=tokens, speech=speech, reach=reach), hears)


@pytest.mark.paper("LOVECon", "definition")
@pytest.mark.paper("LOVECon", "works_when")
@pytest.mark.parametrize(("frames", "tokens", "window"), [(7, 3, 3), (8, 2, 4), (5, 4, 2)])
def test_a_frame_sees_its_window_and_the_ends_of_the_one_before(frames: int, tokens: int, window: int) -> None:
    def sees(b: int, i: int, j: int) -> bool:
        here, there = i // tokens, j // tokens
        first = here // window * window
        return first <= there < first + window or (first > 0 and there in (first - window, first - 1))

    compare(hook("lovecon", frames=frames, tokens=tokens, window=window), sees)


@pytest.mark.paper("VideoBooth", "definition")
@pytest.mark.paper("VideoBooth", "works_when")
@pytest.mark.parametrize(("frames", "tokens", "prompt"), [(4, 3, 5), (3, 2, 0), (1, 4, 3)])
def test_a_frame_sees_the_prompt_the_first_and_the_one_before(frames: int, tokens: int, prompt: int) -> None:
    def sees(b: int, i: int, j: int) -> bool:
        return j < prompt or (j - prompt) // tokens in (0, max(i // tokens - 1, 0))

    compare(hook("videobooth", frames=frames, tokens=tokens, prompt=prompt), sees)


@pytest.mark.paper("Motion-I2V", "definition")
@pytest.mark.paper("Motion-I2V", "works_when")
def test_each_pixel_sees_itself_in_time_and_what_is_warped_there() -> None:
    """Temporal attention of every pixel, with the reference's features looked up at the end of each frame's flow."""
    frames, side = 5, 3
    found = hook("motion_i2v", frames=frames, pixels=side * side)
    video = torch.randn(frames, side, side, 6, dtype=torch.float64)
    flow = torch.randint(0, side, (frames, side, side, 2))
    warped = torch.stack([video[0][flow[t, ..., 0], flow[t, ..., 1]] for t in range(frames)])
    q = video.flatten(1, 2).transpose(0, 1).unsqueeze(1)  # (pixels, 1, F, D)
    kv = torch.cat([warped.flatten(1, 2).transpose(0, 1), q[:, 0]], 1).unsqueeze(1)
    assert found.keys == kv.shape[2] and found.queries == frames and found.batch == side * side
    out = as_core(found.operator)(q, kv, kv)
    for y in range(side):
        for x in range(side):
            keys = torch.cat([warped[:, y, x], video[:, y, x]])
            want = (video[:, y, x] @ keys.T / math.sqrt(6)).softmax(-1) @ keys
            torch.testing.assert_close(out[y * side + x, 0], want)


@pytest.mark.paper("AVIS", "definition")
@pytest.mark.paper("AVIS", "works_when")
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("frames", "window"), [(7, 3), (8, 4), (3, 5)])
def test_objects_see_objects_and_sounds_of_their_window(frames: int, window: int, shifted: bool) -> None:
    begin = window // 2 if shifted else 0

    def number(frame: int) -> int:
        return -1 if frame < begin else (frame - begin) // window

    found = hook("avis", frames=frames, objects=3, sounds=2, window=window, shifted=shifted)
    compare(found, lambda b, i, j: number(i // 3) == number(j // 5))


@pytest.mark.paper("GANO", "definition")
@pytest.mark.paper("GANO", "works_when")
def test_objects_ask_the_tokens_that_a_clip_has() -> None:
    lengths = [11, 3, 7]
    compare(hook("gano", objects=4, lengths=lengths), lambda b, i, j: j < lengths[b], batch=3)


@pytest.mark.paper("Guided Attention (EGO4D STA)", "definition")
@pytest.mark.paper("Guided Attention (EGO4D STA)", "works_when")
def test_tokens_ask_the_objects_that_were_found_if_any() -> None:
    counts = [4, 0, 2]
    compare(hook("guided_attention_sta", tokens=9, counts=counts), lambda b, i, j: j < counts[b], batch=3)


@pytest.mark.paper("DualFreq-RSWA", "definition")
def test_a_place_sees_the_window_that_slides_with_it() -> None:
    height, width, window = 9, 7, 3

    def inside(at: int, other: int, length: int) -> bool:
        first = min(max(at - window // 2, 0), length - window)
        return first <= other < first + window

    found = hook("dualfreq_rswa", height=height, width=width, window=window)
    compare(found, lambda b, i, j: inside(i // width, j // width, height) and inside(i % width, j % width, width))


@pytest.mark.paper("DualFreq-RSWA", "works_when")
def test_it_plugs_into_a_network_of_convolutions_and_trains() -> None:
    """Between two convolutions, on maps of two sizes: it sees no farther than its window, and all of it learns."""
    from torch import nn

    from foveate.catalogue.registry import mixer

    before, after = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
    layer = mixer("neighborhood_attention", 8, heads=2, kernel=3)
    for height, width in ((9, 7), (5, 12)):
        image = torch.randn(1, 3, height, width, requires_grad=True)
        features = before(image).flatten(2).transpose(1, 2)
        out = after(layer(features, layout=Grid(height, width)).transpose(1, 2).unflatten(2, (height, width)))
        (reached,) = torch.autograd.grad(out[0, :, 4, 4].sum(), image, retain_graph=True)
        window = torch.zeros(height, width, dtype=torch.bool)
        first = min(3, height - 3)  # the window of the fifth row of five ends at the edge
        window[first : first + 3, 3:6] = True
        assert torch.equal(reached[0].abs().sum(0) > 0, window)
        out.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
