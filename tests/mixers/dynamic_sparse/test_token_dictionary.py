"""ATD: dictionary, categories and windows, written out token by token; training; work linear in tokens."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.formulas import follows
from tests.support.on_grids import heads_of, joined
from torch import Tensor, nn

from foveate import Grid
from foveate.catalogue.registry import mixer
from foveate.counting import count_operations
from foveate.mixers.dynamic_sparse.token_dictionary import DictionaryRefinement

DIM, HEADS = 12, 3


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def read(atd: nn.Module, x: Tensor, dictionary: Tensor) -> Tensor:
    """How much of each entry each token reads."""
    logits = torch.einsum("bnr,bmr->bnm", unit(linear(atd.read_q, x)), unit(linear(atd.read_k, dictionary)))
    return torch.softmax(logits * (1 + atd.temperature.clamp(0, 1) * math.log(dictionary.shape[1])), -1)


def heads(atd: nn.Module, x: Tensor) -> list[Tensor]:
    return [
        heads_of(x, weight, bias, HEADS)
        for weight, bias in zip(atd.to_qkv.weight.chunk(3), atd.to_qkv.bias.chunk(3), strict=True)
    ]


def in_categories(atd: nn.Module, x: Tensor, similarity: Tensor, category: int) -> Tensor:
    """Sorted by what they read most, in groups; the last is filled up with the last tokens, backwards."""
    q, k, v = heads(atd, x)
    length, size = x.shape[1], min(category, x.shape[1])
    scale = torch.exp(atd.log_scale.clamp(max=math.log(100)))
    out = torch.zeros_like(q)
    for b in range(len(x)):
        most = similarity[b].argmax(-1).tolist()
        order = sorted(range(length), key=lambda i: most[i])
        missing = -length % size
        filled = order + order[::-1][:missing]
        for first in range(0, length, size):
            group = filled[first : first + size]
            for i in order[first : first + size]:
                logits = torch.einsum("hd,hjd->hj", q[b, :, i], k[b][:, group]) * scale
                out[b, :, i] = torch.einsum("hj,hjd->hd", torch.softmax(logits, -1), v[b][:, group])
    return linear(atd.of_category, joined(out))


def in_windows(atd: nn.Module, x: Tensor, dims: tuple[int, int], window: int, shift: int) -> Tensor:
    q, k, v = heads(atd, x)
    out = torch.zeros_like(q)
    place = [(i // dims[1], i % dims[1]) for i in range(x.shape[1])]
    of = [tuple((p - shift) // window for p in at) for at in place]
    for i, at in enumerate(place):
        keys = [j for j in range(len(place)) if of[j] == of[i]]
        steps = torch.tensor([[a - o + window - 1 for a, o in zip(at, place[j], strict=True)] for j in keys])
        bias = atd.table[:, steps[:, 0], steps[:, 1]]
        logits = torch.einsum("bhd,bhjd->bhj", q[:, :, i], k[:, :, keys]) / (DIM // HEADS) ** 0.5 + bias
        out[:, :, i] = torch.einsum("bhj,bhjd->bhd", torch.softmax(logits, -1), v[:, :, keys])
    return linear(atd.of_window, joined(out))


@pytest.mark.paper("ATD", "definition")
@pytest.mark.paper("ATD", "works_when")
@pytest.mark.parametrize(("dims", "category", "shift"), [((5, 6), 8, 0), ((4, 7), 7, 1), ((3, 3), 50, 2)])
def test_it_is_dictionary_categories_and_windows_written_out(dims: tuple[int, int], category: int, shift: int) -> None:
    options = {"entries": 5, "reduced": 4, "category": category, "window": 3, "shift": shift}
    atd = mixer("adaptive_token_dictionary", DIM, heads=HEADS, **options).double()
    x = torch.randn(2, dims[0] * dims[1], DIM, dtype=torch.float64, requires_grad=True)

    def formula() -> Tensor:
        dictionary = atd.dictionary.expand(2, -1, -1)
        similarity = read(atd, x, dictionary)
        out = similarity @ linear(atd.read_v, dictionary) + in_categories(atd, x, similarity, category)
        return out + in_windows(atd, x, dims, 3, shift)

    follows(atd, lambda: atd(x, layout=Grid(*dims)), formula, x)


@pytest.mark.paper("ATD", "definition")
def test_the_next_layer_s_dictionary_is_made_of_what_was_read() -> None:
    refine = DictionaryRefinement(4).double()
    dictionary = torch.randn(2, 4, DIM, dtype=torch.float64, requires_grad=True)
    similarity = torch.rand(2, 15, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 15, DIM, dtype=torch.float64, requires_grad=True)

    def formula() -> Tensor:
        by_entry = similarity.mT
        centred = by_entry - by_entry.mean(2, keepdim=True)
        normed = centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()
        weights = torch.softmax(normed * refine.norm.weight[:, None] + refine.norm.bias[:, None], -1)
        share = 1 / (1 + torch.exp(-refine.stay))
        return share * dictionary + (1 - share) * (weights @ x)

    follows(refine, lambda: refine(dictionary, similarity, x), formula, dictionary, similarity, x)


@pytest.mark.paper("ATD", "works_when")
def test_two_layers_with_a_refined_dictionary_train() -> None:
    """Each token is to tell the mean of all tokens of its kind, wherever they lie."""
    layers = nn.ModuleList(
        mixer("adaptive_token_dictionary", 12, heads=2, entries=6, category=16, window=None) for _ in range(2)
    )
    refine = DictionaryRefinement(6)
    optimiser = torch.optim.Adam([*layers.parameters(), *refine.parameters()], lr=1e-2)
    kinds_look = torch.randn(4, 12)

    def loss() -> Tensor:
        kinds = torch.randint(4, (4, 36))
        x = kinds_look[kinds] + 0.5 * torch.randn(4, 36, 12)
        same = (kinds.unsqueeze(1) == kinds.unsqueeze(2)).float()
        wanted = same @ x / same.sum(-1, keepdim=True)
        first = layers[0].read(x, layers[0].dictionary.expand(4, -1, -1), Grid(6, 6))
        h = x + first.out
        second = layers[1].read(h, refine(layers[0].dictionary.expand(4, -1, -1), first.similarity, h), Grid(6, 6))
        return (h + second.out - wanted).square().mean()

    losses = []
    for _ in range(80):
        found = loss()
        optimiser.zero_grad()
        found.backward()
        optimiser.step()
        losses.append(float(found.detach()))
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
    assert all(parameter.grad is not None for parameter in refine.parameters())


@pytest.mark.paper("ATD", "works_when")
def test_work_is_linear_in_tokens() -> None:
    atd = mixer("adaptive_token_dictionary", 12, heads=2, entries=6, category=16, window=4)
    work = []
    for side in (16, 32):
        with torch.no_grad(), count_operations() as counted:
            atd(torch.randn(1, side**2, 12), layout=Grid(side, side))
        assert counted.pairs == 2 * side**2 * (16 + 16)  # its group, its window
        work.append(counted.flops)
    assert 3.9 < work[1] / work[0] < 4.1


def test_it_begins_as_the_authors_does() -> None:
    atd = mixer("adaptive_token_dictionary", 12)
    assert (atd.heads, atd.category, atd.window, tuple(atd.dictionary.shape)) == (6, 128, 16, (64, 12))
    assert atd.read_q.out_features == 10 and atd.temperature.unique().tolist() == [0.5]
    assert float(atd.log_scale.detach()) == pytest.approx(math.log(10))
    with pytest.raises(ValueError, match="at least 1"):
        mixer("adaptive_token_dictionary", 12, category=0)
