"""Flow-Attention, Fastformer, YOSO, Hrrformer and WERSA against their papers' formulas, written out pair by pair."""

from __future__ import annotations

import itertools
from itertools import pairwise
from time import perf_counter
from typing import Any

import pytest
import torch
from tests.support.counted_work import work
from tests.support.formulas import agree, follows
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from foveate.mixers.base import Mixer, join_heads, split_heads
from foveate.mixers.linear.fastformer import Fastformer
from foveate.mixers.linear.flow import FlowAttention
from foveate.mixers.linear.hrrformer import Hrrformer, superposed, unbound
from foveate.mixers.linear.linear_transformer import LinearTransformer
from foveate.mixers.linear.wersa import WERSA, haar, random_feature_attention, unhaar
from foveate.mixers.linear.yoso import YOSO, buckets, expected_weights, yoso, yoso_expectation

DIM, HEADS = 24, 3


def make(kind: type[Mixer], *, moved: bool = True, **options: Any) -> Any:
    mixer = kind(DIM, **({"heads": HEADS} | options)).double().eval()
    for parameter in mixer.parameters() if moved else ():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return mixer


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(
            FlowAttention, {"causal": False}, marks=pytest.mark.paper("Flowformer / Flow-Attention", "works_when")
        ),
        pytest.param(
            FlowAttention, {"causal": True}, marks=pytest.mark.paper("Flowformer / Flow-Attention", "works_when")
        ),
        pytest.param(Fastformer, {}, marks=pytest.mark.paper("Fastformer", "works_when")),
        pytest.param(YOSO, {"hashes": 3}, marks=pytest.mark.paper("YOSO", "works_when")),
        pytest.param(Hrrformer, {}, marks=pytest.mark.paper("Hrrformer", "works_when")),
        (WERSA, {"features": 8}),
    ],
)
def test_counted_work_is_linear_in_tokens(kind: type[Mixer], options: dict[str, Any]) -> None:
    mixer = kind(16, heads=2, **options)
    counted = [work(lambda: mixer(torch.randn(1, n, 16))) for n in (1024, 2048, 4096)]  # noqa: B023
    assert 1.8 < counted[1] / counted[0] < 2.2 and 1.8 < counted[2] / counted[1] < 2.2


@pytest.mark.paper("Hrrformer", "works_when")
@pytest.mark.parametrize("kind", [Fastformer, YOSO, Hrrformer, WERSA])
def test_no_causal_form_is_refused(kind: type[Mixer]) -> None:
    with pytest.raises(ValueError, match="no causal form"):
        kind(64, causal=True)


# ---- Flow-Attention -----------------------------------------------------------------------------------------


def flow_weights(q: Tensor, k: Tensor, *, causal: bool) -> Tensor:
    """The matrix that multiplies v, from all pairs."""
    sinks, sources = q.shape[2], k.shape[2]
    pairs = q.sigmoid() @ k.sigmoid().transpose(2, 3)  # (B, H, N, M)
    if causal:
        seen = torch.ones(sinks, sinks, dtype=q.dtype).tril()
        number = torch.arange(1, sinks + 1, dtype=q.dtype)
        incoming = (pairs * seen).sum(3) / number  # of sink i, per source so far
        outgoing = (pairs * seen.T).sum(2) / number  # of source j, per sink so far
        conserved_in = (pairs / outgoing.unsqueeze(2) * seen).sum(3) / number
        conserved_out = (pairs / incoming.unsqueeze(3) * seen.T).sum(2) / number
        strength = conserved_out.clamp(max=1).exp()
        share = strength / strength.cumsum(-1) * number
        return (
            conserved_in.sigmoid().unsqueeze(3) * pairs * seen / (incoming * number).unsqueeze(3) * share.unsqueeze(2)
        )
    incoming, outgoing = pairs.sum(3), pairs.sum(2)
    conserved_in = (pairs / outgoing.unsqueeze(2)).sum(3)
    conserved_out = (pairs / incoming.unsqueeze(3)).sum(2)
    share = sources * conserved_out.clamp(max=1).softmax(-1)
    return (conserved_in * sinks / sources).sigmoid().unsqueeze(3) * pairs / incoming.unsqueeze(3) * share.unsqueeze(2)


@pytest.mark.paper("Flowformer / Flow-Attention", "definition")
@pytest.mark.paper("Flowformer / Flow-Attention", "works_when")
@pytest.mark.parametrize(("causal", "read"), [(True, None), (False, None), (False, 23)])
def test_flow_attention_is_its_matrix(causal: bool, read: int | None) -> None:
    mixer, x = FlowAttention(DIM, HEADS, causal=causal).double(), tokens(37).requires_grad_()
    context = None if read is None else tokens(read).requires_grad_()
    source = x if context is None else context

    def formula() -> Tensor:
        q, k, v = (split_heads(y, HEADS) for y in (mixer.to_q(x), mixer.to_k(source), mixer.to_v(source)))
        return mixer.to_out(join_heads(flow_weights(q, k, causal=causal) @ v))

    follows(mixer, lambda: mixer(x, context=context), formula, *{x, source})


# ---- Fastformer ---------------------------------------------------------------------------------------------


@pytest.mark.paper("Fastformer", "definition")
def test_fastformer_is_its_formula() -> None:
    mixer, x = Fastformer(DIM, HEADS).double(), tokens(19).requires_grad_()
    width = DIM // HEADS

    def formula() -> Tensor:
        outs = []
        for q, k in zip(mixer.to_q(x), mixer.to_k(x), strict=True):
            alpha = (mixer.score_q(q) / width**0.5).exp()
            alpha = (alpha / alpha.sum(0)).repeat_interleave(width, 1)  # each head's weight for each of its channels
            p = k * (alpha * q).sum(0)
            beta = (mixer.score_p(p) / width**0.5).exp()
            beta = (beta / beta.sum(0)).repeat_interleave(width, 1)
            outs.append(mixer.transform((beta * p).sum(0) * q) + q)
        return torch.stack(outs)

    follows(mixer, lambda: mixer(x), formula, x)


@pytest.mark.paper("Fastformer", "works_when")
def test_fastformer_does_not_look_at_padding() -> None:
    mixer, x = make(Fastformer), tokens(19)
    real = torch.rand(2, 19) < 0.6
    real[:, 0] = True
    out = mixer(x.masked_fill(~real.unsqueeze(-1), 1e4), padding=real)
    for row in range(2):
        assert_close(out[row, real[row]], mixer(x[row : row + 1, real[row]])[0])
    assert (out[~real] == 0).all()


# ---- YOSO ---------------------------------------------------------------------------------------------------


def unit(*shape: int) -> Tensor:
    return normalize(torch.randn(*shape).double(), dim=-1)


@pytest.mark.paper("YOSO", "definition")
def test_sampled_attention_is_the_matrix_of_collisions() -> None:
    q, k, v = unit(2, HEADS, 9, 8), unit(2, HEADS, 13, 8), torch.randn(2, HEADS, 13, 5).double()
    planes = torch.randn(7, 3, 8).double()
    same = torch.zeros(2, HEADS, 9, 13).double()
    for hash_planes in planes:
        bits_q, bits_k = q @ hash_planes.T > 0, k @ hash_planes.T > 0
        same += (bits_q.unsqueeze(3) == bits_k.unsqueeze(2)).all(-1)
    assert 0 < same.mean() < 7
    assert_close(yoso(q, k, v, planes), same / 7 @ v)


@pytest.mark.paper("YOSO", "definition")
@pytest.mark.parametrize("read", [None, 23])
def test_yoso_normalises_queries_keys_and_outputs(read: int | None) -> None:
    """Both forms, at the parameters they start with and at random ones; values alone, as weights have no gradient."""
    x, context = tokens(19), None if read is None else tokens(read)
    source = x if context is None else context
    real = torch.rand(2, source.shape[1]) < 0.7
    real[:, 0] = True
    for form, move in itertools.product(("sample", "expectation"), (0.0, 0.1)):
        mixer = YOSO(DIM, HEADS, hashes=5, bits=3, form=form).double().eval()  # type: ignore[arg-type]
        for parameter in mixer.parameters():
            parameter.data += move * torch.randn_like(parameter)
        q, k, v = (split_heads(y, HEADS) for y in (mixer.to_q(x), mixer.to_k(source), mixer.to_v(source)))
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        weights = (1 - torch.arccos((q @ k.mT).clamp(-1, 1)) / torch.pi) ** 3
        if form == "sample":
            signs_q, signs_k = (torch.einsum("bhnd,mtd->mbhnt", y, mixer.planes) > 0 for y in (q, k))
            weights = (signs_q.unsqueeze(4) == signs_k.unsqueeze(3)).all(-1).double().mean(0)
        heads = weights * real[:, None, None] @ v
        heads = heads / heads.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        out = mixer(x, context=context, padding=real)
        expected = mixer.to_out(join_heads(heads))
        assert_close(out[real] if read is None else out, expected[real] if read is None else expected)


def test_yoso_has_its_papers_sizes() -> None:
    assert YOSO(DIM, HEADS).planes.shape == (32, 8, DIM // HEADS)


@pytest.mark.paper("YOSO", "definition")
@pytest.mark.paper("YOSO", "works_when")
def test_collisions_tend_to_their_chance() -> None:
    q, k, v = unit(1, 2, 11, 6), unit(1, 2, 17, 6), torch.randn(1, 2, 17, 4).double()
    true = yoso_expectation(q, k, v, 4)
    assert_close(true, (1 - torch.arccos(q @ k.transpose(2, 3)) / torch.pi) ** 4 @ v)
    errors = []
    for hashes in (16, 256, 4096):
        tries = [yoso(q, k, v, torch.randn(hashes, 4, 6).double()) - true for _ in range(16)]
        errors.append(float(torch.stack(tries).square().mean().sqrt()))
    for coarse, fine in pairwise(errors):
        assert coarse / 6.5 < fine < coarse / 2.5  # a quarter, as 1 / sqrt(m)


def published_gradients(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, bits: int, grad: Tensor
) -> tuple[Tensor, ...]:
    """The estimate with these weights: τ/2 (g_i·v_j) w_ij in the place of the derivative by q_i·k_j."""
    slopes = bits / 2 * (grad @ v.transpose(2, 3)) * weights
    return slopes @ k, slopes.transpose(2, 3) @ q, weights.transpose(2, 3) @ grad


@pytest.mark.paper("YOSO", "works_when")
def test_gradients_are_the_published_ones() -> None:
    inputs = [
        unit(1, 2, 11, 6),
        unit(1, 2, 17, 6),
        torch.randn(1, 2, 17, 21).double(),
    ]  # more values than are summed at once
    q, k, v = (x.requires_grad_() for x in inputs)
    planes, grad = torch.randn(5, 4, 6).double(), torch.randn(1, 2, 11, 21).double()
    codes_q, codes_k = buckets(q, planes), buckets(k, planes)
    sampled = (codes_q.unsqueeze(-1) == codes_k.unsqueeze(-2)).double().mean(0)
    for out, weights in ((yoso(q, k, v, planes), sampled), (yoso_expectation(q, k, v, 4), expected_weights(q, k, 4))):
        mine = torch.autograd.grad(out, (q, k, v), grad)
        for one, other in zip(mine, published_gradients(q, k, v, weights, 4, grad), strict=True):
            assert_close(one, other.detach())


def test_gradients_of_samples_tend_to_the_expectations() -> None:
    inputs = [unit(1, 1, 7, 6), unit(1, 1, 9, 6), torch.randn(1, 1, 9, 3).double()]
    q, k, v = (x.requires_grad_() for x in inputs)
    grad = torch.randn(1, 1, 7, 3).double()
    true = torch.autograd.grad(yoso_expectation(q, k, v, 3), (q, k, v), grad)
    for hashes, allowed in ((64, 0.6), (4096, 0.12)):
        mine = torch.autograd.grad(yoso(q, k, v, torch.randn(hashes, 3, 6).double()), (q, k, v), grad)
        for one, other in zip(mine, true, strict=True):
            assert (one - other).norm() < allowed * other.norm()


def kinds_and_payloads(codes: Tensor, batch: int = 8, length: int = 24) -> tuple[Tensor, Tensor]:
    """Tokens of one of a few kinds with payloads, and the mean payload of each token's kind."""
    kinds = torch.randint(len(codes), (batch, length))
    payloads = torch.randn(batch, length, codes.shape[1])
    alike = (kinds.unsqueeze(2) == kinds.unsqueeze(1)).float()
    return torch.cat([codes[kinds], payloads], -1), alike / alike.sum(-1, keepdim=True) @ payloads


def test_yoso_learns_which_tokens_are_alike() -> None:
    """On new tokens in every step, far below what weights that are all alike would reach."""
    mixer, half = YOSO(DIM, heads=HEADS, hashes=8, bits=4), DIM // 2
    codes = torch.linalg.qr(torch.randn(half, half))[0][:3] * half**0.5
    optimizer = torch.optim.Adam(mixer.parameters(), lr=1e-2)
    for _ in range(150):
        x, target = kinds_and_payloads(codes)
        loss = (mixer(x)[..., half:] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, target = kinds_and_payloads(codes, batch=64)
    uniform = x[..., half:].mean(1, keepdim=True)
    with torch.no_grad():
        assert (mixer(x)[..., half:] - target).square().mean() < 0.4 * (uniform - target).square().mean()


def test_yoso_draws_anew_while_training_alone() -> None:
    mixer, x = YOSO(DIM, heads=HEADS, hashes=8, bits=4), tokens(17).float()
    assert not torch.equal(mixer(x), mixer(x))
    mixer.eval()
    assert torch.equal(mixer(x), mixer(x))


@pytest.mark.parametrize("options", [{"hashes": 0}, {"bits": 40}, {"form": "exact"}])
def test_yoso_refuses_what_makes_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"yoso takes|form is"):
        YOSO(DIM, heads=HEADS, **options)


# ---- Hrrformer ----------------------------------------------------------------------------------------------


def circulant(x: Tensor) -> Tensor:
    """The matrix of circular convolution with x (..., D)."""
    size = x.shape[-1]
    steps = (torch.arange(size).unsqueeze(1) - torch.arange(size)) % size
    return x[..., steps]


@pytest.mark.paper("Hrrformer", "works_when")
@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("inverse", ["exact", "pseudo"])
def test_binding_is_circular_convolution(inverse: Any, size: int) -> None:
    q, k, v = torch.randn(3, 2, HEADS, 13, size).double().unbind(0)
    bound = (circulant(k) @ v.unsqueeze(-1)).squeeze(-1).sum(2, keepdim=True)  # (B, H, 1, D)
    assert_close(torch.fft.irfft(superposed(k, v), n=size), bound)
    matrix = circulant(q)
    matrix = torch.linalg.inv(matrix) if inverse == "exact" else matrix.transpose(-1, -2)
    assert_close(
        unbound(q, superposed(k, v), inverse), (matrix @ bound.unsqueeze(-1)).squeeze(-1), atol=1e-6, rtol=1e-6
    )


@pytest.mark.paper("Hrrformer", "definition")
@pytest.mark.parametrize("inverse", ["exact", "pseudo"])
@pytest.mark.parametrize("moved", [True, False])
def test_hrrformer_weighs_values_by_how_well_they_are_found(inverse: Any, moved: bool) -> None:
    mixer, x = make(Hrrformer, moved=moved, inverse=inverse), tokens(13).requires_grad_()
    assert Hrrformer(DIM).inverse == "exact"
    q, k, v = split_heads(mixer.to_qkv(x), 3 * HEADS).chunk(3, 1)
    bound = (circulant(k) @ v.unsqueeze(-1)).squeeze(-1).sum(2)
    matrix = circulant(q)
    matrix = torch.linalg.inv(matrix) if inverse == "exact" else matrix.transpose(-1, -2)
    found = (matrix @ bound[:, :, None, :, None]).squeeze(-1)
    scores = (found * v).sum(-1) / (found.norm(dim=-1) * v.norm(dim=-1))
    expected = mixer.to_out(join_heads(scores.softmax(2).unsqueeze(-1) * v))
    agree(mixer(x), expected, x, mixer, rtol=1e-6, atol=1e-6)


@pytest.mark.paper("Hrrformer", "works_when")
def test_hrrformer_leaves_out_padding_with_the_exact_inverse() -> None:
    mixer, x = make(Hrrformer), tokens(13)
    real = torch.arange(13).expand(2, -1) < 8
    assert_close(mixer(x, padding=real)[:, :8], mixer(x[:, :8]))


@pytest.mark.paper("Hrrformer", "works_when")
def test_hrrformer_reads_a_hundred_thousand_tokens() -> None:
    mixer = Hrrformer(16, heads=2)
    out = mixer(torch.randn(1, 100_000, 16))
    out.square().sum().backward()
    assert out.isfinite().all() and mixer.to_qkv.weight.grad.isfinite().all()


# ---- WERSA --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [0, 1, 3, 6])
def test_haar_is_orthonormal_and_comes_back(levels: int) -> None:
    x = torch.randn(2, 37, 5).double()
    parts = haar(x, levels)
    assert len(parts) == levels + 1
    assert_close(sum(part.square().sum() for part in parts), x.square().sum())
    assert_close(unhaar(parts, 37), x)


def test_haar_coefficients_are_those_of_the_wavelets() -> None:
    x = torch.randn(8, 1).double()
    details = haar(x, 2)
    steps = torch.tensor([1, 1, -1, -1, 0, 0, 0, 0]).double() / 2
    assert_close(details[1].flatten(), torch.stack([steps @ x, steps.roll(4) @ x]).flatten())
    assert_close(details[0].flatten(), (x[0::2] - x[1::2]).flatten() / 2**0.5)
    assert_close(details[2].flatten(), x.view(2, 4).sum(1) / 2)


@pytest.mark.parametrize(
    ("size", "rate", "within"),
    [(1 / 3, 8**0.5 / 1.6, 0.02), (0.6, 8**0.5 / 1.6, 0.04), (1.0, 1.4, 0.15), (2.0, 1.1, 0.7)],
)
def test_wersa_without_filters_is_random_feature_attention_which_tends_to_softmax(
    size: float, rate: float, within: float
) -> None:
    """As 1 / sqrt(features) at small logits; at great ones, where few features outweigh all others, more slowly."""
    mixer, x = WERSA(DIM, heads=HEADS).double(), size * tokens(13)
    q, k, v = split_heads(mixer.to_qkv(x), 3 * HEADS).chunk(3, 1)
    exact = (q @ k.transpose(2, 3) * (DIM // HEADS) ** -0.5).softmax(-1) @ v
    wanted = mixer.to_out(join_heads(exact)).detach()
    errors = []
    for features in (64, 512, 4096):
        tries = []
        for _ in range(24):
            mixer.planes = torch.randn(features, DIM // HEADS).double()
            tries.append((mixer(x) - wanted).detach())
        errors.append(float(torch.stack(tries).square().mean().sqrt() / wanted.square().mean().sqrt()))
    assert all(fine < coarse / rate for coarse, fine in pairwise(errors))
    assert errors[-1] < within


def test_wersa_filters_scale_by_scale() -> None:
    mixer, x = make(WERSA, levels=2), tokens(16)
    filters = mixer.to_filters(x.mean(1)).sigmoid() * mixer.scales
    q, k, v = split_heads(mixer.to_qkv(x), 3 * HEADS).chunk(3, 1)
    size, basis = 16, []
    for level in range(2):
        width = 2 ** (level + 1)
        step = torch.cat([torch.ones(width // 2), -torch.ones(width // 2), torch.zeros(size - width)]) / width**0.5
        basis.append(torch.stack([step.roll(width * i) for i in range(size // width)]))
    basis.append(torch.stack([(torch.arange(size) // 4 == i) / 2.0 for i in range(4)]))
    kernel = sum(
        filters[:, level, None, None] * (part.T @ part).double() for level, part in enumerate(basis)
    )  # (B, N, N)
    bandwidth = (DIM // HEADS) ** 0.25 * torch.nn.functional.softplus(mixer.bandwidth)
    heads = random_feature_attention(*(kernel.unsqueeze(1) @ y / bandwidth for y in (q, k)), v, mixer.planes)
    assert_close(mixer(x), mixer.to_out(join_heads(heads)))


def test_a_global_wavelet_transform_mixes_the_future_into_the_past() -> None:
    """Why WERSA has no causal form."""
    x = torch.randn(16, 3)
    changed = torch.cat([x[:15], x[15:] + 1])
    halved = [haar(y, 4) for y in (x, changed)]
    outs = [unhaar([0.5 * part for part in parts[:-1]] + parts[-1:], 16) for parts in halved]
    assert (outs[0][0] - outs[1][0]).abs().max() > 1e-3


def kept_for_backward(mixer: Mixer, length: int) -> int:
    """Numbers that autograd keeps from a forward over so many tokens, which then runs backward too."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = mixer(torch.randn(1, length, 8))
        out.sum().backward()
    assert out.isfinite().all()
    return sum(sizes)


@pytest.mark.parametrize(
    "kind",
    [
        WERSA,
        pytest.param(Hrrformer, marks=pytest.mark.paper("Hrrformer", "works_when")),
        Fastformer,
        pytest.param(LinearTransformer, marks=pytest.mark.paper("Linear Transformer", "works_when")),
    ],
)
def test_memory_is_linear_up_to_128_thousand_tokens(kind: type[Mixer]) -> None:
    mixer = kind(8, heads=2, **({"features": 8} if kind is WERSA else {}))
    assert kept_for_backward(mixer, 2**17) < 2.1 * kept_for_backward(mixer, 2**16)


@pytest.mark.long
@pytest.mark.parametrize("kind", [WERSA, Hrrformer, Fastformer])
def test_time_is_linear_up_to_128_thousand_tokens(kind: type[Mixer]) -> None:
    mixer, took = kind(32, heads=2), []
    for length in (2**14, 2**17):
        x, runs = torch.randn(1, length, 32), []
        for _ in range(3):
            start = perf_counter()
            mixer(x).sum().backward()
            runs.append(perf_counter() - start)
        took.append(min(runs))
    assert took[1] < 16 * took[0]  # 8 times the tokens; pairs would take 64 times as long
