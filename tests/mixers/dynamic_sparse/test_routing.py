"""Routing attention: clusters by loops, centroids by their update, and what is known of the future."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from foveate.catalogue.registry import mixer
from foveate.counting import count_operations

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
DIM, HEADS, WIDTH = 24, 4, 6


def model(*, random: bool = True, **options: object) -> torch.nn.Module:
    made = mixer("routing_transformer", DIM, heads=HEADS, **options).double()
    if random:
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return made


def normalised(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def by_heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (-1, WIDTH)).transpose(1, 2)


def clusters_of(x: Tensor, centroids: Tensor) -> list[list[int]]:
    """The tokens of x (N, D) that each centroid takes: the nearest n / C, rounded up, in order."""
    size = math.ceil(len(x) / len(centroids))
    nearness = (centroids @ x.detach().T).tolist()
    return [sorted(sorted(range(len(x)), key=lambda i: -row[i])[:size]) for row in nearness]


def routed_head(q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, is_causal: bool) -> Tensor:
    """Dense attention masked to each cluster, averaged over the clusters of a token; (N, D)."""
    of_queries, of_keys = clusters_of(q, centroids), clusters_of(k, centroids)
    rows = []
    for i in range(len(q)):
        found = []
        for queries, keys in zip(of_queries, of_keys, strict=True):
            if i in queries:
                mask = torch.tensor([j in keys and not (is_causal and j > i) for j in range(len(k))])
                logits = (k @ q[i] / math.sqrt(WIDTH)).masked_fill(~mask, float("-inf"))
                found.append(torch.softmax(logits, 0) @ v if mask.any() else torch.zeros_like(v[0]))
        rows.append(sum(found) / len(found) if found else torch.zeros_like(v[0]))
    return torch.stack(rows)


def formula(made: torch.nn.Module, x: Tensor, centroids: Tensor, window: int, local: int, is_causal: bool) -> Tensor:
    q, v, length = by_heads(x @ made.to_q.weight.T), by_heads(x @ made.to_v.weight.T), x.shape[1]
    k = by_heads(x @ made.to_k.weight.T) if made.to_k is not None else q
    distance = torch.arange(length)[:, None] - torch.arange(length)
    near = (distance.abs() < window) & (distance >= 0 if is_causal else torch.tensor(True))
    heads = []
    for h in range(HEADS):
        for b in range(len(x)):
            if h < local:
                logits = (q[b, h] @ k[b, h].T / math.sqrt(WIDTH)).masked_fill(~near, float("-inf"))
                heads.append(logits.softmax(-1) @ v[b, h])
            else:
                keys = q[b, h] if is_causal else k[b, h]
                one = normalised(q[b, h]), normalised(keys), v[b, h]
                heads.append(routed_head(*one, centroids[h - local], is_causal))
    out = torch.stack(heads).unflatten(0, (HEADS, len(x))).transpose(0, 1)
    return out.transpose(1, 2).flatten(2) @ made.to_out.weight.T


@pytest.mark.paper("Routing-Transformer", "definition")
@pytest.mark.paper("Routing-Transformer", "works_when")
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("clusters", "local", "random"), [(4, 2, True), (3, 0, True), (4, 2, False)])
def test_the_mixer_is_masked_dense_attention_in_clusters(
    is_causal: bool, clusters: int, local: int, random: bool
) -> None:
    made = model(clusters=clusters, local_heads=local, window=5, causal=is_causal, random=random).eval()
    x = torch.randn(2, 35, DIM, dtype=torch.float64, requires_grad=True)
    expected, out = formula(made, x, made.centroids.clone(), 5, local, is_causal), made(x)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    leaves, towards = [x, *made.parameters()], torch.randn_like(out)
    for one, other in zip(*(torch.autograd.grad(y, leaves, towards) for y in (out, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.paper("Routing-Transformer", "works_when")
@pytest.mark.parametrize("is_causal", [True, False])
def test_while_training_centroids_run_after_their_tokens_and_in_evaluation_they_stay(is_causal: bool) -> None:
    made = model(clusters=5, local_heads=2, decay=0.75, causal=is_causal)
    x, before = torch.randn(2, 30, DIM, dtype=torch.float64), made.centroids.clone()
    made.eval()(x)
    assert torch.equal(made.centroids, before)
    made.train()(x)
    q = normalised(by_heads(x @ made.to_q.weight.T))[:, 2:]
    k = q if is_causal else normalised(by_heads(x @ made.to_k.weight.T))[:, 2:]
    for h in range(2):
        wanted = []
        for tokens in (q[:, h].flatten(0, 1), k[:, h].flatten(0, 1)):
            nearest = (tokens @ before[h].T).argmax(1)
            own = [tokens[nearest == c] for c in range(5)]
            wanted.append(torch.stack([y.mean(0) if len(y) else before[h, c] for c, y in enumerate(own)]))
        expected = 0.75 * before[h] + 0.25 * (wanted[0] + wanted[1]) / 2
        torch.testing.assert_close(made.centroids[h], expected, rtol=1e-9, atol=1e-9)
    assert "centroids" in made.state_dict()


@pytest.mark.paper("Routing-Transformer", "works_when")
def test_one_cluster_is_attention_with_shared_queries_and_keys() -> None:
    made, x = model(clusters=1, local_heads=0).eval(), torch.randn(2, 23, DIM, dtype=torch.float64)
    q, v = normalised(by_heads(x @ made.to_q.weight.T)), by_heads(x @ made.to_v.weight.T)
    logits = (q @ q.mT / math.sqrt(WIDTH)).masked_fill(~torch.ones(23, 23).tril().bool(), float("-inf"))
    expected = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2) @ made.to_out.weight.T
    torch.testing.assert_close(made(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.paper("Routing-Transformer", "works_when")
def test_positions_are_causal_but_later_tokens_decide_who_is_in_a_cluster() -> None:
    """No weight on a later value; the published leak is there, and the row says so."""
    made, x = model(clusters=4, local_heads=2).eval(), torch.randn(1, 32, DIM, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(made(x)[:, :20].square().sum(), x)
    assert not gradient[:, 20:].any() and gradient[:, :20].any()
    changed = torch.cat([x[:, :20], 3 * torch.randn_like(x[:, 20:])], 1)
    assert not torch.allclose(made(changed)[:, :20], made(x)[:, :20])
    assert "leak" in type(made).row.notes and "leak" in type(made).exempt["causality"]
    with pytest.raises(NotImplementedError, match="does not decode"):
        made.init_state(1)


@pytest.mark.paper("Routing-Transformer", "works_when")
def test_with_as_many_clusters_as_the_root_of_the_length_its_pairs_grow_by_the_power_one_and_a_half() -> None:
    pairs = {}
    for root in (8, 16, 32):
        made = mixer("routing_transformer", 8, heads=2, clusters=root, local_heads=0, causal=False).eval()
        with torch.no_grad(), count_operations() as counted:
            made(torch.randn(1, root**2, 8))
        pairs[root] = counted.pairs
    assert pairs == {root: 2 * root**3 for root in pairs}


@pytest.mark.paper("Routing-Transformer", "works_when")
def test_it_was_measured_in_less_than_quadratic_time() -> None:
    cases = json.loads((RESULTS / "dynamic_text_cpu.json").read_text(encoding="utf-8"))["cases"]
    own = {
        case["tokens"]: case["seconds"] for case in cases if (case["mechanism"], case["task"]) == ("routing", "forward")
    }
    assert own[65536]["sparse"] < 10.5 * own[16384]["sparse"]  # 8 times by the power of one and a half, 16 by two
    assert own[65536]["dense"] > 4 * own[65536]["sparse"]


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="got 0, 2 and"):
        model(clusters=0)
    with pytest.raises(ValueError, match="got 16, 4 and"):
        model(local_heads=4)
    with pytest.raises(ValueError, match="got 0"):
        model(window=0)
