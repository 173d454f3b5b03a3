"""NSA against the paper's formula, one query and one group of heads at a time: whole, decoded, packed, trained."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from tests.support.formulas import shaken
from tests.support.heads import agree, heads, join, split
from torch import Tensor, nn
from torch.nn import functional as F

from foveate import Packed, attend, causal
from foveate.catalogue.registry import mixer
from foveate.mixers.dynamic_sparse.nsa import NSA
from foveate.mixers.dynamic_sparse.nsa_branches import BlockSelector, Finished

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), -1) @ v


BLOCK, STRIDE, SIZE, COUNT, WINDOW = 4, 2, 6, 4, 5


def nsa(select: int = COUNT) -> NSA:
    model = NSA(
        32,
        heads=4,
        kv_heads=2,
        block=BLOCK,
        stride=STRIDE,
        select_block=SIZE,
        select=select,
        window=WINDOW,
        hidden=7,
    )
    assert isinstance(shaken(model), NSA)
    return model


def slow_nsa(model: NSA, x: Tensor, select: int) -> Tensor:
    """The paper's formula, one query and one group of heads at a time."""
    q, gates = split(model.to_q(x), 4), split(torch.sigmoid(model.to_gates(x)), 4)
    k, v = ([split(layer(x), 2) for layer in layers] for layers in (model.to_k, model.to_v))
    outs = torch.zeros_like(q)
    for b, group, t in itertools.product(range(x.shape[0]), range(2), range(x.shape[1])):
        mine = slice(2 * group, 2 * group + 2)
        rows = q[b, mine, t]  # (2, D): the heads of the group
        starts = range(0, t + 1 - BLOCK + 1, STRIDE)  # blocks that end at or before t
        compressed = torch.zeros_like(rows)
        importance = [0.0] * (t // SIZE + 1)
        if len(starts):
            keys = torch.stack([squeeze(model.compress_k, k[0][b, group, s : s + BLOCK]) for s in starts])
            values = torch.stack([squeeze(model.compress_v, v[0][b, group, s : s + BLOCK]) for s in starts])
            weights = torch.softmax(rows @ keys.T / math.sqrt(8), -1)
            compressed = weights @ values
            for start, weight in zip(starts, weights.detach().sum(0).tolist(), strict=True):
                for piece in range(start, start + BLOCK, STRIDE):
                    if piece // SIZE < len(importance):
                        importance[piece // SIZE] += weight
        own = t // SIZE
        kept = {0, own, max(own - 1, 0)}
        rest = sorted((c for c in range(own + 1) if c not in kept), key=lambda c: -importance[c])
        kept |= set(rest[: select - len(kept)])
        seen = torch.tensor([j for j in range(t + 1) if j // SIZE in kept])
        selected = plain(rows, k[1][b, group, seen], v[1][b, group, seen])
        recent = slice(max(t - WINDOW + 1, 0), t + 1)
        near = plain(rows, k[2][b, group, recent], v[2][b, group, recent])
        outs[b, mine, t] = (gates[b, mine, t].T.unsqueeze(-1) * torch.stack([compressed, selected, near])).sum(0)
    return model.to_out(join(outs))


def squeeze(compressor: nn.Module, tokens: Tensor) -> Tensor:
    return compressor.down(F.gelu(compressor.up((tokens + compressor.place).flatten())))


@pytest.mark.paper("NSA", "definition")
@pytest.mark.parametrize("n", [3, 4, 29, 43])
def test_nsa_is_its_formula(n: int) -> None:
    model, x = nsa(), heads(2, n, 32)
    agree(model(x), slow_nsa(model, x, COUNT), x, *model.parameters())


def test_nsa_with_every_block_selected_attends_to_everything() -> None:
    model, x = nsa(select=100), torch.randn(2, 43, 32, dtype=torch.float64)
    with torch.no_grad():
        model.to_gates.weight.zero_()
        model.to_gates.bias.view(4, 3)[:] = torch.tensor([-1e4, 1e4, -1e4])  # the selected branch alone
    q = split(model.to_q(x), 4)
    k, v = split(model.to_k[1](x), 2), split(model.to_v[1](x), 2)
    torch.testing.assert_close(model(x), model.to_out(join(attend(q, k, v, causal, impl="reference"))))


def test_nsa_keeps_only_finished_blocks_of_what_it_compresses() -> None:
    model, x = nsa(), torch.randn(1, 31, 32, dtype=torch.float64)
    state = model.init_state(1)
    for token in x.split(1, dim=1):
        state = model.decode(token, state).state
    assert state.compressed.length == (31 - BLOCK) // STRIDE + 1
    assert state.everything.seen == state.everything.k.shape[2] == 31


def test_finished_blocks_are_bounded_as_they_are_visible() -> None:
    pattern = Finished(BLOCK, STRIDE, lead=30)
    q = k = torch.randn(1, 1, 15, 8)
    assert torch.equal(pattern.select(q, k, tile=8).to_dense(), pattern.mask(15))


@pytest.mark.parametrize(
    "wrong", [{"stride": 3}, {"block": 80}, {"select": 2}, {"initial": -1}, {"window": 0}, {"kv_heads": 3}]
)
def test_nsa_refuses_blocks_that_do_not_fit(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must|at least|holds"):
        NSA(32, heads=4, **wrong)


def test_the_selector_counts_how_much_blocks_overlap() -> None:
    overlap = BlockSelector(BLOCK, STRIDE, SIZE, COUNT, 1, 2).importance(torch.eye(6), 3)  # of one block alone
    for c, s in itertools.product(range(6), range(3)):
        shared = set(range(c * STRIDE, c * STRIDE + BLOCK)) & set(range(s * SIZE, s * SIZE + SIZE))
        assert overlap[c, s] == len(shared) // STRIDE


@torch.no_grad()
def test_nsa_decodes_after_prompts_of_any_size_what_its_formula_says() -> None:
    model, x = nsa(), torch.randn(2, 43, 32, dtype=torch.float64)
    expected = slow_nsa(model, x, COUNT)
    for sizes in ((1,) * 43, (29,) + (1,) * 14, (2, 3, 1, 17, 20), (5, 1, 30, 1, 6)):
        outs, state = [], model.init_state(2)
        for piece in x.split(sizes, dim=1):
            out, state = (model.decode if piece.shape[1] == 1 else model.prefill)(piece, state)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_nsa_on_packed_and_padded_sequences_is_its_formula_on_each() -> None:
    model, x, lengths = nsa(), torch.randn(1, 43, 32, dtype=torch.float64), [3, 0, 29, 11]
    each = torch.cat([slow_nsa(model, part, COUNT) for part in x.split(lengths, dim=1)], 1)
    torch.testing.assert_close(model(x, layout=Packed(lengths)), each, rtol=1e-9, atol=1e-9)
    padding = torch.ones(1, 43, dtype=torch.bool)
    padding[:, :7], padding[:, 36:] = False, False
    inner = slow_nsa(model, x[:, 7:36], COUNT)
    torch.testing.assert_close(model(x, padding=padding), F.pad(inner, (0, 0, 7, 7)), rtol=1e-9, atol=1e-9)


def test_every_branch_its_compression_and_its_gate_learn() -> None:
    """Each gate alone open: gradients reach what its branch is made of, and the gates themselves, and nothing else."""
    x = torch.randn(1, 43, 32, dtype=torch.float64)
    for branch in range(3):
        model = nsa()
        with torch.no_grad():
            model.to_gates.weight.zero_()
            model.to_gates.bias.view(4, 3)[:] = -1e4
            model.to_gates.bias.view(4, 3)[:, branch] = 0.3
        model(x).square().sum().backward()
        reached = {
            name for name, each in model.named_parameters() if each.grad is not None and each.grad.abs().max() > 1e-9
        }
        of_branch = {f"to_k.{branch}.weight", f"to_v.{branch}.weight"}
        compression = {
            f"compress_{kind}.{part}" for kind in "kv" for part in ("place", "up.weight", "up.bias", "down.weight")
        }
        shared = {"to_q.weight", "to_out.weight", "to_gates.weight", "to_gates.bias"}
        assert reached == of_branch | shared | (compression if branch == 0 else set())


@torch.no_grad()
def test_heads_of_a_group_choose_together_by_the_sum_of_their_weights() -> None:
    """Other queries of one head change what its neighbour of the group reads, and nothing of the other group."""
    model, x = nsa(), torch.randn(1, 43, 32, dtype=torch.float64)
    model.to_gates.weight.zero_()
    model.to_gates.bias.view(4, 3)[:] = torch.tensor([-1e4, 1e4, -1e4])  # the selected branch alone
    model.to_out.weight.copy_(torch.eye(32, dtype=torch.float64))
    before = split(model(x), 4)
    model.to_q.weight.view(4, 8, 32)[0] = 5 * torch.randn(8, 32, dtype=torch.float64)
    moved = (split(model(x), 4) - before).abs().amax((0, 2, 3)) > 1e-9
    assert moved.tolist() == [True, True, False, False]


class Recall(nn.Module):
    """One layer that reads pairs of a key and a value, each pair a token, and last a key alone: what was its value?"""

    def __init__(self, name: str, keys: int, values: int, **options: int) -> None:
        super().__init__()
        self.key, self.value = nn.Embedding(keys, 32), nn.Embedding(values + 1, 32)
        self.mixer = mixer(name, 32, heads=4, kv_heads=2, **options)
        self.out = nn.Linear(32, values)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        return self.out(self.mixer(self.key(keys) + self.value(values))[:, -1])


def pairs_and_question(size: int, keys: int = 24, values: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Every key once in random order, its value, the question; the answer."""
    order, said = torch.rand(size, keys).argsort(1), torch.randint(values, (size, keys))
    asked = torch.randint(keys, (size, 1))
    question = torch.full((size, 1), values)
    return torch.cat([order, order.gather(1, asked)], 1), torch.cat([said, question], 1), said.gather(1, asked)[:, 0]


def test_nsa_learns_to_recall_as_full_attention_does() -> None:
    """Of 13 blocks it reads two besides the ends; a window and sinks of as many tokens answer half of the questions."""
    scores = {}
    sizes = {"block": 2, "stride": 1, "select_block": 2, "select": 5, "window": 3, "hidden": 32}
    for name, options in (("nsa", sizes), ("flash_attention", {})):
        model = Recall(name, 24, 8, **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(300):
            keys, values, answer = pairs_and_question(32)
            loss = F.cross_entropy(model(keys, values), answer)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        keys, values, answer = pairs_and_question(500)
        with torch.no_grad():
            scores[name] = float((model(keys, values).argmax(-1) == answer).float().mean())
    assert scores["flash_attention"] > 0.95 and scores["nsa"] > 0.85


def test_it_was_measured_faster_than_dense_attention_at_64_thousand_tokens() -> None:
    """On a CPU; no figure is of a GPU."""
    cases = json.loads((RESULTS / "nsa_cpu.json").read_text(encoding="utf-8"))["cases"]
    gains = {(case["task"], case["tokens"]): case["seconds"]["dense"] / case["seconds"]["nsa"] for case in cases}
    assert gains["decoding step", 2**16] > 1 / 0.3
    assert gains["prefill", 2**16] > 3
    assert gains["forward + backward", 2**15] > 2
