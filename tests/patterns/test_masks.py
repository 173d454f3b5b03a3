"""Patterns given as masks, functions, lists of blocks and buckets, and those for training on several texts."""

from __future__ import annotations

import gc
import pickle
import random
from copy import deepcopy

import pytest
import torch
from tests.support.pattern_examples import Case, random_boxes
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from foveate import (
    Pattern,
    attend,
    block_diffusion,
    block_mask,
    boolean_mask,
    causal,
    document_prefix,
    documents,
    explain,
    full,
    listed_blocks,
    lsh,
    mask_mod,
    parse,
    same_bucket,
    shared_prefix,
    sinks,
    spans,
    window,
)
from foveate.patterns import Sequence, to_block_mask

N, M = 37, 70


def loops(sees, shape: tuple[int, int, int, int] = (1, 1, N, M)) -> Tensor:
    """What ``sees(b, h, position of the query, position of the key)`` says of every pair."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        mask[b, h, i, j] = bool(sees(b, h, i + shape[3] - shape[2], j))
    return mask


def number_of(lengths: list[int], position: int) -> int:
    """The document of a position, documents laid end to end."""
    ends = [sum(lengths[: count + 1]) for count in range(len(lengths))]
    return sum(position >= end for end in ends)


def assert_means(pattern: Pattern, expected: Tensor) -> None:
    """The definition, what kernels run, and attention over it."""
    B, H, n, m = expected.shape
    assert torch.equal(pattern.mask(n, m).expand_as(expected), expected)
    q, k = torch.randn(B, H, n, 8), torch.randn(B, H, m, 8)
    v = torch.randn(B, H, m, 5)
    assert torch.equal(pattern.select(q, k).to_dense().expand_as(expected), expected)
    logits = (q.double() @ k.double().mT / 8**0.5).masked_fill(~expected, float("-inf"))
    truth = torch.softmax(logits, -1).nan_to_num(0) @ v.double()
    torch.testing.assert_close(attend(q, k, v, pattern).double(), truth, rtol=1e-5, atol=1e-5)


# ---- packed texts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, N, M])
def test_document_prefix(n: int) -> None:
    lengths, prefixes = [20, 0, 13, 30, 3], [4, 0, 13, 1, 0]

    def sees(b: int, h: int, i: int, j: int) -> bool:
        number = number_of(lengths, i)
        if number_of(lengths, j) != number or number == len(lengths):
            return False
        return j - sum(lengths[:number]) < prefixes[number]

    assert_means(document_prefix(lengths, prefixes), loops(sees, (1, 1, n, M)))


@pytest.mark.parametrize("n", [1, N, M])
def test_shared_prefix(n: int) -> None:
    parts = [11, 20, 0, 13, 26]

    def sees(b: int, h: int, i: int, j: int) -> bool:
        return j <= i and (j < 11 or number_of(parts, i) == number_of(parts, j))

    assert_means(shared_prefix(11, parts[1:]) & causal, loops(sees, (1, 1, n, M)))


def test_spans() -> None:
    images = [(50, 9), (4, 7), (11, 1)]

    def sees(b: int, h: int, i: int, j: int) -> bool:
        return j <= i or any(start <= i < start + count and start <= j < start + count for start, count in images)

    assert_means(causal | spans(images), loops(sees, (1, 1, M, M)))


@pytest.mark.parametrize(("length", "block"), [(35, 8), (32, 4), (9, 20), (33, 1)])
def test_block_diffusion(length: int, block: int) -> None:
    def sees(b: int, h: int, i: int, j: int) -> bool:
        clean_q, clean_k = i >= length, j >= length
        q, k = (i - length * clean_q) // block, (j - length * clean_k) // block
        if clean_k:
            return k <= q if clean_q else k < q
        return not clean_q and k == q

    assert_means(block_diffusion(length, block), loops(sees, (1, 1, 2 * length, 2 * length)))


@pytest.mark.parametrize(("length", "block"), [(30, 7), (33, 4), (9, 20)])
def test_bounds_of_block_diffusion_are_exact(length: int, block: int, seed: int) -> None:
    case = Case(block_diffusion(length, block), 2 * length, 2 * length, Sequence())
    boxes, inside = random_boxes(case, 300, seed)
    seen = case.pattern.mask(2 * length)[0, 0]
    some, every = case.resolved.bounds(boxes)
    assert torch.equal(some, (seen & inside).flatten(1).any(1))
    assert torch.equal(every, (seen | ~inside).flatten(1).all(1))


def test_long_ones_are_cheap() -> None:
    """Half a million tokens: interval reasoning leaves few tiles undecided, and never forms all pairs."""
    length = 2**19
    lengths = [length // 64] * 64
    for pattern in (
        shared_prefix(64, [length // 64] * 63 + [length // 64 - 64]) & window(64) & causal,
        document_prefix(lengths, [64] * 64),
        block_diffusion(length // 2, 32) & window(300) | spans([(9, 100), (length - 500, 300)]),
    ):
        q = torch.empty(1).expand(1, 1, length, 1)
        assert pattern.select(q, q).num_tiles < 10 * length // 64, pattern


# ---- masks and lists of blocks -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(N, M), (3, N, M), (2, 1, N, M), (2, 3, N, M)])
def test_boolean_mask(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.3
    whole = mask[(None,) * (4 - len(shape))].expand(2, 3, N, M)
    assert_means(boolean_mask(mask), whole)
    assert_means(boolean_mask(mask) & causal, whole & loops(lambda b, h, i, j: j <= i))


@pytest.mark.parametrize(("block", "q_block"), [(7, None), (16, 5), (3, 64), (100, 1)])
def test_block_mask(block: int, q_block: int | None) -> None:
    rows = q_block or block
    table = torch.rand(2, 3, -(-N // rows), -(-M // block)) < 0.4
    expected = loops(lambda b, h, i, j: table[b, h, (i - M + N) // rows, j // block], (2, 3, N, M))
    assert_means(block_mask(table, block, q_block=q_block), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize(("block", "q_block"), [(9, None), (24, 1)])
def test_listed_blocks(block: int, q_block: int | None, dtype: torch.dtype) -> None:
    rows = q_block or block
    listed = torch.randint(-2, -(-M // block), (2, 3, -(-N // rows), 4)).to(dtype)
    expected = loops(lambda b, h, i, j: j // block in listed[b, h, (i - M + N) // rows].tolist(), (2, 3, N, M))
    assert_means(listed_blocks(listed, block, q_block=q_block), expected)


def test_a_changed_tensor_is_seen() -> None:
    mask = torch.ones(N, N, dtype=torch.bool)
    listed, buckets = torch.zeros(1, 1, 4, 2, dtype=torch.int32), torch.zeros(1, 1, N, dtype=torch.int64)
    q = torch.randn(1, 2, N, 8)
    patterns = boolean_mask(mask), listed_blocks(listed, 10), same_bucket(buckets)
    for pattern in patterns:
        assert pattern.select(q, q) is pattern.select(q, q)
    mask[3, 5], listed[0, 0, 0, 1], buckets[0, 0, 2] = False, 3, 1
    seen = [pattern.select(q, q).to_dense()[0, 0] for pattern in patterns]
    assert not seen[0][3, 5] and seen[1][2, 35] and not seen[2][2, 3]


def test_block_masks_of_flex_attention() -> None:
    def mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (q_idx >= kv_idx) & (kv_idx % (h + 2) != b)

    for sizes in ((2, 3, 200, 200), (1, 2, 70, 300)):
        expected = create_mask(mod, *sizes, device="cpu")
        flex = create_block_mask(mod, *sizes, device="cpu", BLOCK_SIZE=32)
        assert_means(block_mask(flex), expected)
        assert_means(block_mask(flex) & window(9), expected & window(9).mask(*sizes[2:]))
    whole = create_block_mask(lambda b, h, q, k: q >= 0, None, None, 128, 128, device="cpu")
    assert_means(block_mask(whole), torch.ones(1, 1, 128, 128, dtype=torch.bool))
    with pytest.raises(ValueError, match="for 128 queries and 128 keys; got 120 and 128"):
        block_mask(whole).mask(120, 128)
    ours = window(40) & causal | sinks(3)
    assert torch.equal(block_mask(to_block_mask(ours, 300)).mask(300), ours.mask(300))


# ---- functions ---------------------------------------------------------------------------------------------


def test_mask_mod_is_asked_with_single_numbers() -> None:
    """As FlexAttention asks: tables may be read dim by dim, which numbers in batches would garble."""
    documents_of, shifts = torch.randint(3, (2, M)), torch.tensor([0, 2, 4])

    def mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        assert b.dim() == h.dim() == q_idx.dim() == kv_idx.dim() == 0
        return (documents_of[b][q_idx] == documents_of[b][kv_idx]) & (kv_idx <= q_idx + shifts[h])

    ids, ahead = documents_of.tolist(), shifts.tolist()
    expected = loops(lambda b, h, i, j: ids[b][i] == ids[b][j] and j <= i + ahead[h], (2, 3, N, M))
    assert_means(mask_mod(mod, batches=2, heads=3), expected)
    square = create_mask(mod, 2, 3, M, M, device="cpu")
    assert_means(mask_mod(mod, batches=2, heads=3), square)


def test_mask_mod_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.patterns.rules import functions

    pattern = mask_mod(lambda b, h, q, k: (q * 7 + k * k) % 5 < 2)
    expected = loops(lambda b, h, i, j: (i * 7 + j * j) % 5 < 2)
    monkeypatch.setattr(functions, "PAIRS", 100)
    assert_means(pattern, expected)


def test_mask_mod_reads_what_changes_and_constants_too() -> None:
    settings = {"reach": 3}
    pattern = window(20) & mask_mod(lambda b, h, q, k: (q - k).abs() < settings["reach"])
    q = torch.randn(1, 1, N, 8)
    assert torch.equal(pattern.select(q, q).to_dense(), window(2).mask(N))
    settings["reach"] = 6
    assert torch.equal(pattern.select(q, q).to_dense(), window(5).mask(N))
    assert mask_mod(lambda b, h, q, k: torch.tensor(True)).mask(9).all()
    assert mask_mod(lambda b, h, q, k: q < 4).mask(0, 9).shape == (1, 1, 0, 9)


def test_explain_says_that_mask_mod_is_slow() -> None:
    q = k = v = torch.randn(1, 1, 100, 8)
    slow = "its function is asked about every pair, at every call"
    assert slow in str(explain(q, k, v, window(9) & ~mask_mod(lambda b, h, q, k: q < k)))
    assert "slow" not in str(explain(q, k, v, window(9) & causal))


def test_mask_mod_reads_back_from_its_text() -> None:
    def parity(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q + k) % 2 == h

    pattern = mask_mod(parity, heads=2) & causal
    assert parse(str(pattern)) == pattern and torch.equal(parse(str(pattern)).mask(9), pattern.mask(9))
    assert mask_mod(parity) == mask_mod(parity) != mask_mod(parity, heads=2)
    text = str(mask_mod(lambda b, h, q, k: q < k))
    gc.collect()
    with pytest.raises(ValueError, match="none named"):
        parse(text)


class Near:
    """A mask_mod that is an object, equal to others."""

    def __init__(self, reach: int) -> None:
        self.reach = reach

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k).abs() <= self.reach

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Near)

    __hash__ = None  # type: ignore[assignment]


def test_mask_mod_of_objects_that_are_copied_and_compared() -> None:
    """Each has a name of its own, whatever it equals, and another one in every copy."""
    near, far = Near(2), Near(5)
    for pattern in (mask_mod(near), mask_mod(far), pickle.loads(pickle.dumps(mask_mod(far))), deepcopy(mask_mod(near))):
        reach = pattern.function.reach  # type: ignore[attr-defined]
        assert torch.equal(parse(str(pattern)).mask(9), window(reach).mask(9))
        assert parse(str(pattern)).function is pattern.function  # type: ignore[attr-defined]


# ---- buckets -----------------------------------------------------------------------------------------------


def test_same_bucket() -> None:
    buckets, others = torch.randint(-1, 4, (2, 3, M)), torch.randint(-1, 4, (1, 3, M))
    expected = loops(lambda b, h, i, j: buckets[b, h, i] == buckets[b, h, j] >= 0, (2, 3, N, M))
    second = loops(lambda b, h, i, j: others[0, h, i] == others[0, h, j] >= 0, (2, 3, N, M))
    assert_means(same_bucket(buckets), expected)
    assert_means(same_bucket(buckets) | same_bucket(others), expected | second)


def test_same_bucket_across() -> None:
    of_queries, of_keys = torch.randint(-1, 4, (2, 1, N)), torch.randint(-1, 4, (1, 3, M))
    expected = (of_queries.unsqueeze(3) == of_keys.unsqueeze(2)) & (of_queries >= 0).unsqueeze(3)
    assert_means(same_bucket(of_queries, of_keys), expected)


@pytest.mark.parametrize("is_causal", [True, False])
def test_lsh_is_reformers_hashing(is_causal: bool) -> None:
    """h(x) = argmax([x R; -x R]), a rotation R for each round, drawn from the seed; keys are shared by heads."""
    q, k = torch.randn(2, 4, N, 8), torch.randn(2, 2, M, 8)
    draw = torch.Generator().manual_seed(3)
    expected = loops(lambda b, h, i, j: i == j, (2, 4, N, M))
    for _ in range(3):
        rotation = torch.randn(8, 3, generator=draw)
        hashes = [torch.cat([x @ rotation, -x @ rotation], -1).argmax(-1) for x in (q, k.repeat_interleave(2, 1))]
        expected |= hashes[0].unsqueeze(3) == hashes[1].unsqueeze(2)
    if is_causal:
        expected &= loops(lambda b, h, i, j: j <= i)
    pattern = lsh(6, rounds=3, seed=3, causal=is_causal)
    assert parse(str(pattern)) == pattern and pattern.is_causal is is_causal
    assert torch.equal(pattern.select(q, k).to_dense(), expected)


def test_equal_vectors_share_a_bucket_and_opposite_ones_do_not() -> None:
    x = torch.randn(1, 1, 20, 8)
    q = torch.cat([x, 3 * x, -x], 2)
    seen = lsh(16, causal=False).select(q, q).to_dense()[0, 0]
    places = torch.arange(20)
    assert seen[places, places + 20].all() and not seen[places, places + 40].any()


# ---- all of them -------------------------------------------------------------------------------------------


def tensor_patterns() -> list[Pattern]:
    return [
        boolean_mask(torch.rand(2, 1, M, M) < 0.5),
        block_mask(torch.rand(10, 10) < 0.5, 7),
        listed_blocks(torch.randint(-1, 10, (2, 10, 2)), 7),
        same_bucket(torch.randint(0, 3, (2, 2, M))),
        same_bucket(torch.randint(0, 3, (1, 2, M)), torch.randint(0, 3, (2, 2, M))),
    ]


@pytest.mark.parametrize("number", range(5))
def test_they_read_back_from_text_and_tensors(number: int) -> None:
    pattern = tensor_patterns()[number] & ~window(2) | sinks(1)
    again = parse(str(pattern), pattern.tensors)
    assert again == pattern and torch.equal(again.mask(M), pattern.mask(M))
    assert pattern != tensor_patterns()[number] & ~window(2) | sinks(1)


@pytest.mark.parametrize("number", range(7))
def test_they_compile(number: int) -> None:
    heads = torch.tensor([0, 1])
    made = [*tensor_patterns(), mask_mod(lambda b, h, q, k: (q + k + heads[h]) % 3 == 0, heads=2), lsh(4, rounds=2)]
    pattern = made[number] & causal
    inputs = [torch.randn(2, 2, M, 8, requires_grad=True) for _ in range(3)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, pattern, softcap=5.0)

    torch._dynamo.reset()
    outs = [each(*inputs) for each in (run, torch.compile(run, fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(outs[1], outs[0])
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in outs]
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: document_prefix([3, 4], [1]), "one prefix for each document"),
        (lambda: document_prefix([3, 4], [1, 5]), "none longer"),
        (lambda: document_prefix([], []), "whole lengths"),
        (lambda: document_prefix([2], [-1]), "whole lengths"),
        (lambda: shared_prefix(0, [3]), "prefix of at least 1"),
        (lambda: shared_prefix(3, [-1]), "whole lengths"),
        (lambda: spans([]), "do not overlap"),
        (lambda: spans([(3, 4), (6, 2)]), "do not overlap"),
        (lambda: spans([(-3, 4)]), "0 or more"),
        (lambda: spans([(3, 0)]), "do not overlap"),
        (lambda: block_diffusion(0, 4), "length of at least 1"),
        (lambda: block_diffusion(4, 0), "block of at least 1"),
        (lambda: block_diffusion(4, 2).mask(9), "8 together; got 9 queries and 9 keys"),
        (lambda: boolean_mask(torch.ones(3, 3)), "boolean"),
        (lambda: boolean_mask(torch.ones(3, dtype=torch.bool)), "boolean"),
        (lambda: boolean_mask([[True]]), "boolean"),  # type: ignore[arg-type]
        (lambda: boolean_mask(torch.ones(3, 4, dtype=torch.bool)).mask(4), r"need \(4, 4\)"),
        (lambda: block_mask(torch.ones(3, 3)), "boolean"),
        (lambda: block_mask(torch.ones(3, 3, dtype=torch.bool)), "number of tokens in a block"),
        (lambda: block_mask(torch.ones(3, 3, dtype=torch.bool), 0), "block of at least 1"),
        (lambda: block_mask(torch.ones(3, 3, dtype=torch.bool), 2).mask(7), r"7 keys need \(4, 4\)"),
        (lambda: block_mask(to_block_mask(full, 128), 128), "brings its block sizes"),
        (lambda: listed_blocks(torch.ones(3, 3), 2), "whole numbers"),
        (lambda: listed_blocks(torch.ones(3, 3, dtype=torch.bool), 2), "whole numbers"),
        (lambda: listed_blocks(torch.ones(3, 3, dtype=torch.int64), 2).mask(7), "7 queries are 4"),
        (lambda: listed_blocks(torch.full((3, 1), 3), 2).mask(6), "lists block 3"),
        (lambda: same_bucket(torch.ones(1, 1, 3)), "whole numbers"),
        (lambda: same_bucket(torch.ones(1, 3, dtype=torch.int64)), "whole numbers"),
        (lambda: same_bucket(torch.ones(1, 1, 3, dtype=torch.int64)).mask(4), "buckets of 3 tokens"),
        (
            lambda: same_bucket(torch.ones(2, 1, 3, dtype=torch.int64), torch.ones(3, 1, 3, dtype=torch.int64)),
            "different numbers of batch entries",
        ),
        (lambda: lsh(5), "even num_buckets"),
        (lambda: lsh(4, rounds=0), "rounds of at least 1"),
        (lambda: mask_mod("nobody#0"), "none named"),
        (lambda: mask_mod(lambda b, h, q, k: q < k, heads=0), "heads of at least 1"),
    ],
)
def test_refuses_in_words(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "answer", [lambda b, h, q, k: True, lambda b, h, q, k: q - k, lambda b, h, q, k: q.view(1) < k]
)
def test_mask_mod_refuses_what_is_no_boolean(answer) -> None:
    with pytest.raises(TypeError, match="one boolean tensor of no dims"):
        mask_mod(answer).mask(4)
    with pytest.raises(TypeError, match="takes function"):
        mask_mod(3)  # type: ignore[arg-type]


def test_any_of_them_join_at_odd_sizes() -> None:
    for _ in range(8):
        n, m = random.randint(1, 90), random.randint(1, 90)
        mask, listed = torch.rand(2, 1, n, m) < 0.5, torch.randint(-1, -(-m // 8), (1, 2, n, 2))
        buckets = torch.randint(0, 2, (1, 1, m))
        joined = boolean_mask(mask) & ~listed_blocks(listed, 8, q_block=1) | window(3)
        expected = mask & ~(listed.unsqueeze(3) == (torch.arange(m) // 8).view(1, 1, 1, m, 1)).any(-1)
        expected = expected | window(3).mask(n, m)
        if n <= m:
            joined = joined & same_bucket(buckets)
            expected = expected & (buckets[:, :, m - n :, None] == buckets[:, :, None])
        assert_means(joined, expected)


def test_documents_and_same_bucket_agree() -> None:
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor([20, 1, 30, 19]))
    assert torch.equal(same_bucket(ids.view(1, 1, -1)).mask(M), documents([20, 1, 30, 19]).mask(M))
