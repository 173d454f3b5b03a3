"""check_method on images: what is broken is found where it is broken, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate.adapt.swap import Change
from foveate.catalogue import tiers
from foveate.testing import check_method, on_images

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Edited:
    """A method that changes the tokens between stages."""

    edit: Edit
    undone: bool = True

    def install(self, model: nn.Module) -> Change:
        encoder: Any = model.get_submodule("encoder")
        hook = encoder.layers[0].register_forward_hook(lambda _, args, out: (self.edit(out[0]), *out[1:]))
        change = Change()
        if self.undone:
            change.on_undo(hook.remove)
        return change


def drawing(x: Tensor) -> Tensor:
    return x * torch.rand(())


BROKEN: dict[str, tuple[Edit, Edit, bool, set[str]]] = {
    "sound": (lambda x: x / 2, lambda x: x, True, set()),
    "not at work": (lambda x: x, lambda x: x, True, {"full budget"}),
    "stays": (lambda x: x / 2, lambda x: x, False, {"neighbours", "undo"}),
    "mixes the batch": (lambda x: x + x.mean(0, keepdim=True), lambda x: x, True, {"neighbours"}),
    "draws": (drawing, lambda x: x, True, {"neighbours", "determinism"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found(name: str, seed: int) -> None:
    edit, at_full, undone, lacks = BROKEN[name]
    row = tiers.row("sparse_vit")
    assert isinstance(row, tiers.MethodRow)

    def make(full: bool = False) -> Edited:
        return Edited(at_full if full else edit, undone)

    own = replace(row, function=make, tiny={}, full_budget={"full": True})
    report = check_method(own, seed=seed, raise_on_failure=False)
    assert {check.name for check in report.failed} == lacks, report.failed


def test_every_property_can_fail() -> None:
    assert set().union(*(lacks for *_, lacks in BROKEN.values())) == {prop.name for prop in on_images.PROPERTIES}
