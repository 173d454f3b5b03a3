"""SPA: selection, packs and attention within an image, by loops; nothing passes between images; time by the share."""

from __future__ import annotations

import pytest
import torch
from tests.support.formulas import follows
from tests.support.on_grids import measured
from torch import Tensor, nn

from foveate.catalogue.registry import mixer
from foveate.counting import count_operations
from foveate.mixers.dynamic_sparse.spa import packed

DIM, HEADS = 12, 3


def formula(spa: nn.Module, x: Tensor, threshold: float, keep: float | None) -> Tensor:
    """Image by image: attention among the tokens selected alone, times their gates."""
    outs = []
    for tokens in x:
        gate = torch.sigmoid(tokens @ spa.gate.weight.T + spa.gate.bias).squeeze(1)
        found = gate.detach().tolist()
        chosen = [i for i, g in enumerate(found) if g > threshold]
        if keep is not None:
            chosen = sorted(range(len(found)), key=lambda i: -found[i])[: -int(-keep * len(found) // 1)]
        out = torch.zeros_like(tokens)
        if chosen:
            inside = tokens[chosen]
            q, k, v = (
                (inside @ each.weight.T).view(len(chosen), HEADS, -1).transpose(0, 1)
                for each in (spa.to_q, spa.to_k, spa.to_v)
            )
            mixed = torch.softmax(q @ k.mT / (DIM // HEADS) ** 0.5, -1) @ v
            out = out.index_put(
                (torch.tensor(chosen),),
                (mixed.transpose(0, 1).flatten(1) @ spa.to_out.weight.T) * gate[chosen].unsqueeze(1),
            )
        outs.append(out)
    return torch.stack(outs)


@pytest.mark.paper("SPA (Select and Pack Attention)", "definition")
@pytest.mark.paper("SPA (Select and Pack Attention)", "works_when")
@pytest.mark.parametrize(("threshold", "keep"), [(0.5, None), (0.6, None), (0.5, 0.3), (0.5, 1.0)])
def test_it_is_attention_image_by_image_among_the_selected(threshold: float, keep: float | None) -> None:
    spa = mixer("select_and_pack", DIM, heads=HEADS, threshold=threshold, keep=keep).double()
    x = torch.randn(4, 19, DIM, dtype=torch.float64, requires_grad=True)
    follows(spa, lambda: spa(x), lambda: formula(spa, x, threshold, keep), x)


@pytest.mark.paper("SPA (Select and Pack Attention)", "works_when")
def test_images_that_share_a_pack_do_not_see_one_another() -> None:
    spa = mixer("select_and_pack", DIM, heads=HEADS, keep=0.3).double()
    x = torch.randn(3, 20, DIM, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        chosen = spa.selected(spa.gate(x).sigmoid().squeeze(2))
    assert packed(chosen, 20).entry.shape == (1, 18)  # all three in one
    (gradient,) = torch.autograd.grad(spa(x)[0].square().sum(), x)
    assert gradient[0].any() and not gradient[1:].any()


@pytest.mark.parametrize("rows", [[3, 5, 2, 7, 0, 4], [0, 0], [7, 7, 7]])
def test_packs_hold_every_token_selected_once_and_images_whole(rows: list[int]) -> None:
    selected = torch.stack([torch.arange(7).roll(number) < count for number, count in enumerate(rows)])
    packs = packed(selected, 7)
    inside = packs.entry >= 0
    pairs = sorted(zip(packs.entry[inside].tolist(), packs.position[inside].tolist(), strict=True))
    assert pairs == [tuple(at) for at in torch.nonzero(selected).tolist()]
    assert packs.entry.shape[1] <= 7
    for image, count in enumerate(rows):
        assert max((packs.entry == image).sum(1).tolist(), default=0) == count


@pytest.mark.paper("SPA (Select and Pack Attention)", "works_when")
def test_the_gate_learns_from_labels_and_from_the_task() -> None:
    spa = mixer("select_and_pack", DIM, heads=HEADS).double()
    x = torch.randn(2, 9, DIM, dtype=torch.float64, requires_grad=True)
    labels = torch.rand(2, 9) < 0.5

    def loss() -> Tensor:
        p = torch.sigmoid(x @ spa.gate.weight.T + spa.gate.bias).squeeze(2)
        return -torch.where(labels, p.log(), (1 - p).log()).mean()

    follows(spa, lambda: spa.selection_loss(x, labels), loss, x)
    spa(x).square().sum().backward()
    assert spa.gate.weight.grad is not None and bool(spa.gate.weight.grad.any())
    none = mixer("select_and_pack", DIM, heads=HEADS, threshold=1.0).double()
    assert not none(x).any()


@pytest.mark.paper("SPA (Select and Pack Attention)", "works_when")
def test_the_saving_follows_the_share_selected() -> None:
    """Pairs by its square, projections by the share; time was measured at half of the tokens and at a quarter."""
    for keep in (0.25, 0.5, 1.0):
        spa = mixer("select_and_pack", 32, heads=2, keep=keep)
        with torch.no_grad(), count_operations() as counted:
            spa(torch.randn(2, 64, 32))
        assert counted.pairs == 2 * 2 * (64 * keep) ** 2
        products = 2 * 2 * 64 * keep * 4 * 32**2 + 2 * 2 * 64 * 32  # four projections of the selected, gates of all
        assert counted.flops == 2 * 2 * 16 * counted.pairs + products
    quarter, half = (
        {(line["task"], line["tokens"]): line["ratio"] for line in measured(row)}
        for row in ("select_and_pack", "select_and_pack, half")
    )
    assert set(quarter) == set(half) and len(quarter) == 4
    for task in ("forward", "forward + backward"):  # as many times as fast as the share is small, at least
        assert quarter[task, 3136] > 4 and half[task, 3136] > 2


def test_what_cannot_be_is_refused() -> None:
    for options in ({"threshold": -0.1}, {"keep": 0.0}):
        with pytest.raises(ValueError, match="threshold is a probability"):
            mixer("select_and_pack", DIM, heads=HEADS, **options)
