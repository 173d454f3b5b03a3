"""SpargeAttn: both stages written out tile by tile, as the paper's algorithm runs; tuning; what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from foveate import attend, causal, full
from foveate.mixers.dynamic_sparse.sparge import SpargeCore
from foveate.mixers.dynamic_sparse.sparge_tuning import tune
from foveate.patterns.rules.similar import similar_blocks

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "prefill_methods.json"
SHAPES = [(35, 35), (13, 45), (1, 21)]  # queries and keys
TAU, THETA, LAM = (0.98, 0.8, 0.3, 0.95), (0.6, 0.2, 0.0, 0.4), (-0.7, -0.3, -2.5, -math.inf)


def inputs(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that drift, so that some blocks are alike and some are not."""
    made = []
    for heads, length in ((4, shape[0]), (2, shape[1]), (2, shape[1])):
        drift = torch.randn(2, heads, length, 6, dtype=torch.float64).cumsum(2) * 0.7
        made.append((drift + 0.6 * torch.randn_like(drift)).requires_grad_())
    return made[0], made[1], made[2]


def alike(x: Tensor) -> float:
    """The mean cosine of all pairs of tokens (n, D), each with itself among them."""
    cosines = [torch.cosine_similarity(a, b, dim=0) for a in x for b in x]
    return float(sum(cosines) / len(cosines))


def first_stage(q: Tensor, k: Tensor, tau: float, theta: float, size: tuple[int, int], is_causal: bool) -> Tensor:
    """Pairs (N, M) of blocks that are not skipped; later keys are hidden."""
    (q_block, k_block), offset = size, k.shape[0] - q.shape[0]
    centred = k - k.mean(0)
    blocks = [range(a, min(a + k_block, len(k))) for a in range(0, len(k), k_block)]
    seen = torch.zeros(len(q), len(k), dtype=torch.bool)
    for number in range(offset // q_block, (len(k) - 1) // q_block + 1):
        rows = [i for i in range(len(q)) if (i + offset) // q_block == number]
        may = [c for c, block in enumerate(blocks) if not is_causal or block[0] <= rows[-1] + offset]
        judged = [c for c in may if alike(centred[list(blocks[c])]) > theta]
        kept = {0, *(c for c in may if c not in judged)}
        if alike(q[rows]) <= theta:
            kept |= set(may)
        elif judged:
            logits = torch.stack([q[rows].mean(0) @ k[list(blocks[c])].mean(0) for c in judged]) * q.shape[1] ** -0.5
            share, held = logits.softmax(0).tolist(), 0.0
            for place, at in enumerate(sorted(range(len(judged)), key=lambda at: -share[at])):
                held += share[at]
                if held <= tau or place == 0:
                    kept.add(judged[at])
        for i in rows:
            for c in kept:
                for j in blocks[c]:
                    seen[i, j] = not is_causal or j <= i + offset
    return seen


def online(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, lam: float, size: tuple[int, int], slice_rows: int
) -> tuple[Tensor, int, int]:
    """The paper's loop over tiles with running maxima and sums; how many slices of tiles, and how many skipped."""
    (_, k_block), offset, out, tiles, skipped = size, len(k) - len(q), [], 0, 0
    plain, shown = (q @ k.T * q.shape[1] ** -0.5).tolist(), seen.tolist()
    for row in range(len(q)):
        best, total, acc = torch.tensor(-math.inf, dtype=q.dtype), torch.zeros((), dtype=q.dtype), 0 * v[0]
        group = [i for i in range(len(q)) if (i + offset) // slice_rows == (row + offset) // slice_rows]
        running = dict.fromkeys(group, -math.inf)
        for begin in range(0, len(k), k_block):
            keys = [j for j in range(begin, min(begin + k_block, len(k))) if any(shown[i][j] for i in group)]
            if not keys:
                continue
            below = []
            for i in group:
                own = [plain[i][j] for j in keys if shown[i][j]]
                running[i] = max(running[i], *own) if own else running[i]
                below += [max(own) - running[i]] if own else []
            tiles, skip = tiles + (row == group[0]), max(below) < lam
            skipped += skip and row == group[0]
            mine = [j for j in keys if shown[row][j]]
            if mine:
                logits = k[mine] @ q[row] * q.shape[1] ** -0.5
                new = torch.maximum(best, logits.max().detach())
                weights, scaled = (logits - new).exp(), (best - new).exp()
                total = total * scaled + weights.sum()
                acc = acc * scaled + (0 if skip else weights @ v[mine])
                best = new
        out.append(acc / total)
    return torch.stack(out), tiles, skipped


@pytest.mark.paper("SpargeAttn", "definition")
@pytest.mark.paper("SpargeAttn", "works_when")
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize(
    ("shape", "size", "rows"), [(SHAPES[0], (8, 5), 4), (SHAPES[1], (6, 4), 2), (SHAPES[2], (4, 3), 2)]
)
def test_both_stages_are_the_papers_loop_for_each_head_its_numbers(
    shape: tuple[int, int], size: tuple[int, int], rows: int, is_causal: bool
) -> None:
    q, k, v = inputs(shape)
    within = causal if is_causal else full
    core = SpargeCore(TAU, THETA, LAM, *size, rows)
    want, first, second = torch.zeros_like(q), [], []
    for h in range(4):
        tiles = left = skipped = 0
        for b in range(2):
            own = q[b, h], k[b, h // 2], v[b, h // 2]
            seen = first_stage(own[0].detach(), own[1].detach(), TAU[h], THETA[h], size, is_causal)
            found = similar_blocks(TAU[h], THETA[h], q_block=size[0], k_block=size[1], causal=is_causal)
            chosen = found.select(q[b : b + 1, h : h + 1], k[b : b + 1, h // 2 : h // 2 + 1]).to_dense()[0, 0]
            assert torch.equal(chosen, seen)
            out, some, none = online(*own, seen, LAM[h], size, rows)
            all_seen = torch.ones_like(seen).tril(shape[1] - shape[0]) if is_causal else torch.ones_like(seen)
            tiles += online(*own, all_seen, -math.inf, size, rows)[1]
            left, skipped = left + some, skipped + none
            want = want + torch.zeros_like(q).index_put((torch.tensor(b), torch.tensor(h)), out)
        first.append(1 - left / tiles)
        second.append(skipped / left)
    out = core(q, k, v, within=within)
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)
    towards = torch.randn_like(out)
    for one, other in zip(*(torch.autograd.grad(y, (q, k, v), towards) for y in (out, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    found = core.skipped(q, k, within=within)
    torch.testing.assert_close(found.tiles, torch.tensor(first, dtype=torch.double))
    torch.testing.assert_close(found.values, torch.tensor(second, dtype=torch.double))
    assert second[3] == 0
    assert max(first) > 0.1 and (shape != SHAPES[1] or max(second) > 0.02)


@pytest.mark.paper("SpargeAttn", "works_when")
@pytest.mark.parametrize("within", [causal, full], ids=str)
@pytest.mark.parametrize("lam", [-math.inf, -1e9])
def test_tau_and_theta_of_1_and_no_lam_are_plain_attention(within: object, lam: float) -> None:
    q, k, v = inputs((77, 90))
    core = SpargeCore(1.0, 1.0, lam, 8, 4, 4)
    torch.testing.assert_close(core(q, k, v, within=within), attend(q, k, v, within), rtol=1e-12, atol=1e-12)
    found = core.skipped(q, k, within=within)
    assert not found.tiles.any() and not found.values.any()


@pytest.mark.paper("SpargeAttn", "works_when")
@pytest.mark.parametrize("within", [causal, full], ids=str)
def test_blocks_whose_tokens_differ_are_never_skipped(within: object) -> None:
    """Blocks of keys 2 and 5 and of queries 1 hold opposite tokens; the others each one token over and over."""
    q, k = (torch.randn(1, 2, 8, 1, 6).expand(-1, -1, -1, 8, -1).clone() for _ in range(2))
    for x, numbers in ((k, (2, 5)), (q, (1,))):
        for number in numbers:
            x[:, :, number] *= 20
            x[:, :, number, ::2] *= -1
    q, k = q.flatten(2, 3), k.flatten(2, 3)
    k = k - k.mean(2, keepdim=True)
    seen = SpargeCore(1e-6, 0.2, q_block=8, k_block=8, rows=8, sink=False).pattern & within
    tiles = seen.select(q, k).to_dense().expand(-1, 2, -1, -1).unflatten(3, (8, 8)).unflatten(2, (8, 8)).any(5).any(3)
    lower = torch.ones(8, 8, dtype=torch.bool).tril() if within == causal else torch.ones(8, 8, dtype=torch.bool)
    assert bool(tiles[:, :, :, [2, 5]][:, :, lower[:, [2, 5]]].all())
    assert bool(tiles[:, :, 1][:, :, lower[1]].all())
    others = [row for row in range(8) if row != 1]
    assert bool((tiles[:, :, others][..., [0, 1, 3, 4, 6, 7]].sum(-1) <= 1).all())


@pytest.mark.paper("SpargeAttn", "works_when")
@pytest.mark.parametrize("within", [causal, full], ids=str)
def test_tuned_numbers_keep_to_the_error_asked_for_and_skip(within: object) -> None:
    q, k, v = (x.detach().float() for x in inputs((96, 96)))
    skipped = []
    for error, more in ((0.02, 0.03), (0.1, 0.2)):
        found = tune(
            q,
            k,
            v,
            error=error,
            with_values=more,
            within=within,
            thetas=(0.0, 0.4),
            steps=6,
            q_block=8,
            k_block=4,
            rows=4,
        )
        exact = attend(q, k, v, within)
        out = found.core(q, k, v, within=within)
        apart = (out - exact).abs().sum((0, 2, 3)) / exact.abs().sum((0, 2, 3))
        assert bool((apart <= more + 1e-6).all())
        torch.testing.assert_close(found.errors.float(), apart)
        whole = 1 - (1 - found.skipped.tiles) * (1 - found.skipped.values)
        skipped.append(float(whole.mean()))
    assert skipped[1] >= skipped[0] > 0 and skipped[1] > 0.2


@pytest.mark.paper("SpargeAttn", "works_when")
def test_tuning_on_the_built_in_models_own_activations_keeps_to_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.adapt import use
    from foveate.models import builtin

    model, tokenizer = builtin.load()
    ids = torch.tensor([tokenizer(builtin.heldout_text(3000)).input_ids[:256]])
    kept: list[tuple[Tensor, ...]] = []

    class Seeing:
        pattern = causal

        def __call__(self, *heads: Tensor, **options: object) -> Tensor:
            kept.append(heads)
            return attend(*heads, causal)

    use(model, Seeing())
    with torch.no_grad():
        model(ids, use_cache=False)
    q, k, v = kept[-1]
    found = tune(q, k, v, thetas=(0.0,), steps=4, q_block=32, k_block=16, rows=16)
    out, exact = found.core(q, k, v, within=causal), attend(q, k, v, causal)
    assert bool(((out - exact).abs().sum((0, 2, 3)) / exact.abs().sum((0, 2, 3)) <= 0.0801).all())
    assert found.skipped.tiles.max() > 0.1


@pytest.mark.paper("SpargeAttn", "works_when")
def test_blocks_skipped_save_time_in_long_prompts_as_was_measured() -> None:
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    assert found["length"] >= 16384

    def mean(method: str, field: str) -> float:
        own = [line[field] for line in found["lines"] if line["method"] == method]
        return sum(own) / len(own)

    for method in ("sparge_attention 0.9", "sparge_attention tuned"):
        saved = 1 - mean(method, "share_of_pairs")
        assert saved > 0.15 and mean(method, "seconds") < (1 - 0.8 * saved) * mean(method, "dense")
    assert mean("sparge_attention tuned", "recall") > 0.95 and mean("sparge_attention tuned", "error") < 0.07


def test_wrong_numbers_are_refused() -> None:
    q, k, v = inputs((5, 5))
    with pytest.raises(ValueError, match="rows divide"):
        SpargeCore(rows=7)
    with pytest.raises(ValueError, match="at most 0"):
        SpargeCore(lam=0.5)
    with pytest.raises(ValueError, match="0 < tau <= 1"):
        SpargeCore(tau=0.0)
    with pytest.raises(ValueError, match="3 for 4"):
        SpargeCore(lam=(-1.0, -1.0, -1.0))(q, k, v)
    with pytest.raises(ValueError, match="3 for 4"):
        SpargeCore(tau=(0.5, 0.5, 0.5))(q, k, v)
    with pytest.raises(ValueError, match="plain softmax"):
        SpargeCore(lam=-1.0)(q, k, v, softcap=3.0)
