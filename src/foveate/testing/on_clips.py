"""What every method for video holds to, on a small diffusion transformer whose tokens all see one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveate.testing.installed import Installed, MethodSubject
from foveate.testing.report import Skip
from foveate.testing.suite import EXACT, Property, assert_equal, same_bits
from foveate.testing.video_model import CHANNELS, TEXT_DIM, SmallVideoModel

GRID, TEXT, STEPS = (5, 3, 3), 4, 3
REFUSAL = (ValueError, TypeError, NotImplementedError)


class Clip(NamedTuple):
    """Noise to begin with (B, C, T, H, W), and the text that says what is to be seen (B, L, C)."""

    noise: Tensor
    text: Tensor

    def entry(self, number: int) -> Clip:
        return Clip(self.noise[number : number + 1], self.text[number : number + 1])


@dataclass(frozen=True)
class ClipSubject(MethodSubject):
    """A method for clips of one size."""

    grid: tuple[int, int, int] = GRID

    def clip(self, batch: int = 2, text: int = TEXT, frames: int = 0) -> Clip:
        """A clip to denoise, of so many frames more than the method expects."""
        dims = (self.grid[0] + frames, *self.grid[1:])
        noise = torch.randn(batch, CHANNELS, *dims, dtype=torch.float64)
        return Clip(noise, torch.randn(batch, text, TEXT_DIM, dtype=torch.float64))

    def denoised(self, clip: Clip, options: Mapping[str, Any] | None = None) -> Tensor:
        """The clip after a few steps with the method, installed for it anew."""
        with Installed(self, options) as model:
            return denoise(model, clip)


def subject_of(
    make: Callable[..., Any],
    accepted: list[str],
    tiny: Mapping[str, Any],
    full: Mapping[str, Any] | None,
    model: Callable[[], nn.Module] | None,
) -> ClipSubject:
    """A method for clips: with text among the tokens where the method takes its length as ``text``."""
    joint = "text" in accepted
    added = {"text": TEXT} if joint else {}
    grid = tiny.get("grid", GRID)
    at_full = None if full is None else {**added, **tiny, **full}
    return ClipSubject(make, {**added, **tiny}, at_full, model or (lambda: SmallVideoModel(joint)), grid)


@torch.no_grad()
def denoise(model: Any, clip: Clip, text_mask: Tensor | None = None) -> Tensor:
    """Latents after Euler's steps from noise (time 1) to the clip (time 0)."""
    x = clip.noise
    for step in range(STEPS):
        time = torch.full((len(x),), 1 - step / STEPS, dtype=x.dtype)
        x = x - model(x, time, clip.text, text_mask) / STEPS
    return x


def full_budget(subject: ClipSubject) -> None:
    """With all of the budget, a clip is denoised as without the method; with little, it is not."""
    if subject.full_budget is None:
        raise Skip("no options make it plain attention")
    clip = subject.clip()
    plain = denoise(subject.model, clip)
    assert_equal(subject.denoised(clip, subject.full_budget), plain, "the clip at full budget")
    if subject.full_budget != subject.tiny:
        apart = (subject.denoised(clip) - plain).abs().max()
        assert apart > EXACT, "with a small budget nothing changes: the method is not at work"


def undo(subject: ClipSubject) -> None:
    """Undone, the model has every bit, and computes every bit, as before; undoing again does nothing."""
    model, clip = subject.model, subject.clip()
    before, weights = denoise(model, clip), {name: value.clone() for name, value in model.state_dict().items()}
    configs = configurations(model)
    change = subject.make(**subject.tiny).install(model)
    denoise(model, clip)
    change.undo()
    change.undo()
    after = model.state_dict()
    assert list(after) == list(weights), "the model has other parameters than before"
    changed = [name for name, value in weights.items() if not same_bits(after[name], value)]
    assert not changed, f"parameters changed: {', '.join(changed)}"
    assert same_bits(denoise(model, clip), before), "the model computes other numbers than before"
    assert configurations(model) == configs, "the model's configuration changed"


def configurations(model: nn.Module) -> dict[str, Any]:
    """The configuration of every part that has one."""
    configs: dict[str, Any] = {name: getattr(module, "config", None) for name, module in model.named_modules()}
    return {name: config.to_dict() for name, config in configs.items() if hasattr(config, "to_dict")}


def neighbours(subject: ClipSubject) -> None:
    """A clip in a batch is what it would be alone."""
    clip = subject.clip(3)
    together = subject.denoised(clip)
    for entry in range(3):
        assert_equal(together[entry : entry + 1], subject.denoised(clip.entry(entry)), f"clip {entry} alone")


def padding(subject: ClipSubject) -> None:
    """Padding of a text changes nothing, whatever it holds."""
    if "text" not in subject.tiny:
        raise Skip("its attention is of the clip alone")
    clip = subject.clip()
    mask = torch.ones(clip.text.shape[:2], dtype=torch.long)
    mask[1, -2:] = 0
    other = clip.text.where(mask.bool().unsqueeze(-1), 10 * torch.randn_like(clip.text))
    with Installed(subject) as model:
        expected = denoise(model, clip, mask)
    with Installed(subject) as model:
        assert_equal(denoise(model, Clip(clip.noise, other), mask), expected, "the clip beside other padding")


def text(subject: ClipSubject) -> None:
    """The clip depends on its text."""
    clip, other = subject.clip(), subject.clip().text
    apart = (subject.denoised(clip) - subject.denoised(Clip(clip.noise, other))).abs().amax((1, 2, 3, 4))
    assert bool((apart > 1e-6).all()), "another text gives the same clip"


def determinism(subject: ClipSubject) -> None:
    """A clip denoised again has every bit, and the random numbers of its caller are left alone."""
    clip = subject.clip()
    first = subject.denoised(clip)
    torch.randn(7)
    state = torch.get_rng_state()
    again = subject.denoised(clip)
    assert torch.equal(torch.get_rng_state(), state), "it draws from the generator that its caller's noise is from"
    assert same_bits(again, first), "the clip denoised again is another"


def other_sizes(subject: ClipSubject) -> None:
    """A clip of another size is denoised, or refused with its number of tokens; the model stays as it was."""
    fitting, clip = subject.clip(), subject.clip(frames=1)
    tokens = clip.noise[0, 0].numel() + subject.tiny.get("text", 0)
    before = denoise(subject.model, fitting)
    try:
        out = subject.denoised(clip)
        assert out.shape == clip.noise.shape and out.isfinite().all(), "a clip of another size is not all numbers"
    except REFUSAL as refusal:
        assert str(tokens) in str(refusal), f"{tokens} tokens are refused without saying so: {refusal}"
    assert same_bits(denoise(subject.model, fitting), before), "after a clip of another size the model is another"


PROPERTIES = (
    Property("full budget", full_budget),
    Property("undo", undo),
    Property("neighbours", neighbours),
    Property("padding", padding),
    Property("text", text),
    Property("determinism", determinism),
    Property("other sizes", other_sizes),
)
