"""What every method for images holds to, on a small Swin transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foveate.testing.installed import Installed, MethodSubject
from foveate.testing.report import Skip
from foveate.testing.suite import EXACT, Property, assert_equal, same_bits

SIDES = (26, 38)


class ImageSubject(MethodSubject):
    """A method for models that read images (B, 3, H, W)."""

    def images(self, batch: int = 2) -> Tensor:
        return torch.randn(batch, 3, *SIDES, dtype=torch.float64)

    def seen(self, images: Tensor, options: Mapping[str, Any] | None = None) -> Tensor:
        """The model's features (B, N, C) with the method."""
        with Installed(self, options) as model:
            return features(model, images)


def small_swin() -> nn.Module:
    """Swin of two stages, windows of 3 x 3 tokens, on images whose sides windows do not divide."""
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(
        image_size=SIDES[0],
        patch_size=2,
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=3,
        initializer_range=0.3,
        drop_path_rate=0.0,
    )
    return SwinModel(config, add_pooling_layer=False)


@torch.no_grad()
def features(model: Any, images: Tensor) -> Tensor:
    return model(images, interpolate_pos_encoding=True).last_hidden_state


def full_budget(subject: ImageSubject) -> None:
    """With all of the budget, the model computes what it did; with little, it does not."""
    if subject.full_budget is None:
        raise Skip("no options make it the model as it is")
    images = subject.images()
    plain = features(subject.model, images)
    assert_equal(subject.seen(images, subject.full_budget), plain, "features at full budget")
    if subject.full_budget != subject.tiny:
        apart = (subject.seen(images) - plain).abs().max()
        assert apart > EXACT, "with a small budget nothing changes: the method is not at work"


def undo(subject: ImageSubject) -> None:
    """Undone, the model has every bit, and computes every bit, as before; undoing again does nothing."""
    model, images = subject.model, subject.images()
    before, weights = features(model, images), {name: value.clone() for name, value in model.state_dict().items()}
    change = subject.make(**subject.tiny).install(model)
    features(model, images)
    change.undo()
    change.undo()
    after = model.state_dict()
    assert list(after) == list(weights), "the model has other parameters than before"
    changed = [name for name, value in weights.items() if not same_bits(after[name], value)]
    assert not changed, f"parameters changed: {', '.join(changed)}"
    assert same_bits(features(model, images), before), "the model computes other numbers than before"


def neighbours(subject: ImageSubject) -> None:
    """An image in a batch is what it would be alone."""
    images = subject.images(3)
    together = subject.seen(images)
    for entry in range(3):
        assert_equal(together[entry : entry + 1], subject.seen(images[entry : entry + 1]), f"image {entry} alone")


def determinism(subject: ImageSubject) -> None:
    """An image read again has every bit; random numbers of the caller are left alone."""
    images, other, model = subject.images(), subject.images(), subject.model
    state = torch.get_rng_state()
    with Installed(subject):
        first = features(model, images)
        features(model, other)
        assert same_bits(features(model, images), first), "the image read again is another"
    assert torch.equal(torch.get_rng_state(), state), "it draws from its caller's random numbers"


PROPERTIES = (
    Property("full budget", full_budget),
    Property("undo", undo),
    Property("neighbours", neighbours),
    Property("determinism", determinism),
)
