"""RefAM: maps of words written out query by query, with sinks left out or sent on inside the softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate import attend
from foveate.hooks.refam import Handling, global_sinks, refam, token_maps

SINKS, AUXILIARY = (0, 5), (7, 8, 9)


def by_hand(q: Tensor, k: Tensor, handling: Handling) -> Tensor:
    batch, heads, queries, _ = q.shape
    maps = torch.zeros(batch, k.shape[2], queries, dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                weights = [(q[b, h, i] @ key / math.sqrt(q.shape[3])).exp() for key in k[b, h // 2]]
                if handling == "redirect":
                    gained, held = sum(weights[j] for j in SINKS), sum(weights[j] for j in AUXILIARY)
                    weights = [w * (1 + gained / held) if j in AUXILIARY else w for j, w in enumerate(weights)]
                if handling != "keep":
                    weights = [0 * w if j in SINKS else w for j, w in enumerate(weights)]
                row = torch.stack(weights) / sum(weights)
                maps = maps + torch.zeros_like(maps).index_put(
                    (torch.tensor(b), torch.arange(len(row)), torch.tensor(i)), row / heads
                )
    return maps


@pytest.mark.paper("RefAM", "definition")
@pytest.mark.paper("RefAM", "works_when")
@pytest.mark.parametrize("handling", ["keep", "suppress", "redirect"])
def test_maps_of_words_are_means_over_heads_of_a_softmax_that_handles_sinks(handling: Handling) -> None:
    q = (2 * torch.randn(2, 4, 7, 5, dtype=torch.float64)).requires_grad_()
    k = (2 * torch.randn(2, 2, 10, 5, dtype=torch.float64)).requires_grad_()
    maps = token_maps(q, k, sinks=SINKS, auxiliary=AUXILIARY, handling=handling)
    want = by_hand(q, k, handling)
    torch.testing.assert_close(maps, want, rtol=1e-9, atol=1e-9)
    towards = torch.randn_like(maps)
    for one, other in zip(*(torch.autograd.grad(y, (q, k), towards) for y in (maps, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(maps.sum(1), torch.ones(2, 7, dtype=torch.float64))
    kept = token_maps(q, k, handling="keep")
    others = [j for j in range(10) if j not in (*SINKS, *AUXILIARY)]
    if handling == "redirect":
        torch.testing.assert_close(maps[:, others], kept[:, others])
    if handling != "keep":
        assert not maps[:, list(SINKS)].any()


@pytest.mark.paper("RefAM", "definition")
@pytest.mark.paper("RefAM", "works_when")
def test_the_application_attends_as_its_maps_say() -> None:
    """With values that tell words apart, outputs of attention are the maps of a head."""
    found = refam(height=3, width=4, words=6, sinks=(0, 3))
    q, k = torch.randn(1, 1, 12, 5, dtype=torch.float64), torch.randn(1, 1, 6, 5, dtype=torch.float64)
    v = torch.eye(6, dtype=torch.float64).view(1, 1, 6, 6)
    assert found.queries == 12 and not isinstance(found.operator, str)
    out = attend(q, k, v, found.operator)
    torch.testing.assert_close(out[0].mT, token_maps(q, k, sinks=(0, 3)), rtol=1e-9, atol=1e-9)


@pytest.mark.paper("RefAM", "works_when")
def test_sinks_are_found_and_what_they_drew_shows_the_region_again() -> None:
    """Word 0 draws everything; word 2 belongs to the first half of the image, stop words 4 and 5 to the rest."""
    generator = torch.randn(1, 3, 40, 8)
    q, k = generator * 0.1, torch.zeros(1, 3, 6, 8)
    q[..., 0], k[:, :, 0, 0] = 3.0, 6.0
    q[:, :, :20, 1], k[:, :, 2, 1] = 3.0, 3.0
    q[:, :, 20:, 2], k[:, :, 4:, 2] = 3.0, 2.0
    kept = token_maps(q, k, handling="keep")
    assert global_sinks(kept) == [[0]]
    drawn: tuple[tuple[Handling, list[int]], ...] = (("suppress", []), ("redirect", [4, 5]))
    for handling, sinks in drawn:
        maps = token_maps(q, k, sinks=[0], auxiliary=[4, 5], handling=handling)
        assert maps[0, 2, :20].min() > maps[0, 2, 20:].max()
        assert global_sinks(maps) == [sinks] and not maps[0, 0].any()
    redirected = token_maps(q, k, sinks=[0], auxiliary=[4, 5], handling="redirect")
    assert redirected[0, 4:].sum(0).mean() > kept[0, 0].mean()


def test_words_that_there_are_not_and_nowhere_to_go_are_refused() -> None:
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4)
    for options, words in (
        ({"sinks": [3]}, "below 3"),
        ({"sinks": [1], "auxiliary": [1], "handling": "redirect"}, "none of both"),
        ({"sinks": [0], "handling": "redirect"}, "nowhere to go"),
        ({"sinks": [0, 1, 2]}, "nowhere to go"),
        ({"sinks": [0], "handling": "drop"}, "are handled by"),
    ):
        with pytest.raises(ValueError, match=words):
            token_maps(q, k, **options)


@pytest.mark.parametrize("sinks", [(5,), (-1,), tuple(range(5))])
def test_sinks_are_some_of_the_words(sinks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="some of the words"):
        refam(2, 3, words=5, sinks=sinks)
