"""foveate.compat.mamba's fused blocks and gated norms are the formulas of Mamba and Mamba-2, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support.mamba_inputs import assert_same, normal
from torch import Tensor
from torch.nn.functional import silu, softplus

from foveate.compat import mamba
from foveate.compat.mamba import mamba_chunk_scan_combined, mamba_inner_fn, mamba_split_conv1d_scan_combined


def same_gradients(got: Tensor, wanted: Tensor, tensors: list[Tensor]) -> None:
    cotangent = torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad(got, tensors, cotangent), torch.autograd.grad(wanted, tensors, cotangent), strict=True
    ):
        assert_same(ours, theirs)


def distance(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


# ---- gated norms -----------------------------------------------------------------------------------------------


def plain_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, eps: float, size: int, before: bool, rms: bool
) -> Tensor:
    """Row by row, group by group."""
    gate = torch.ones_like(x) if z is None else z / (1 + (-z).exp())
    x = x if before else x * gate
    pieces = []
    for start in range(0, x.shape[-1], size):
        group = x[..., start : start + size]
        mean = torch.zeros_like(group[..., :1]) if rms else group.sum(-1, keepdim=True) / size
        variance = ((group - mean) ** 2).sum(-1, keepdim=True) / size
        pieces.append((group - mean) / (variance + eps).sqrt())
    out = torch.cat(pieces, -1) * weight + (0 if bias is None else bias)
    return out * gate if before else out


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("rms", [True, False])
def test_gated_norms_are_those_of_the_formula(size: int | None, before: bool, rms: bool) -> None:
    tensors = [normal(2, 5, 12).requires_grad_(), *(normal(12).requires_grad_() for _ in range(2)), normal(2, 5, 12)]
    x, weight, bias, z = tensors
    function = mamba.rmsnorm_fn if rms else mamba.layernorm_fn
    got = function(x, weight, bias, z, 1e-2, size, before)
    wanted = plain_norm(x, weight, bias, z, 1e-2, size or 12, before, rms)
    assert_same(got, wanted)
    same_gradients(got, wanted, [x, weight, bias])
    assert_same(
        function(x, weight, None, group_size=size), plain_norm(x, weight, None, None, 1e-6, size or 12, True, rms)
    )


def test_norm_modules_hold_the_weights_of_theirs() -> None:
    x, z = normal(2, 5, 12), normal(2, 5, 12)
    for module, names in ((mamba.RMSNormGated, ["weight"]), (mamba.LayerNorm, ["weight", "bias"])):
        norm = module(12, group_size=6, norm_before_gate=False, dtype=torch.float64)
        assert list(norm.state_dict()) == names
        wanted = {name: normal(12) for name in names}
        norm.load_state_dict(wanted)
        expected = plain_norm(x, wanted["weight"], wanted.get("bias"), z, 1e-5, 6, False, "bias" not in wanted)
        assert_same(norm(x, z), expected)
        norm.reset_parameters()
        assert_same(norm.weight, torch.ones(12, dtype=torch.float64))


def test_norms_round_once() -> None:
    """bfloat16 inputs are worked on in float32: the result is the exact one, rounded."""
    x, z, weight = torch.randn(64, 96).bfloat16(), torch.randn(64, 96).bfloat16(), torch.rand(96)
    exact = plain_norm(x.double(), weight.double(), None, z.double(), 1e-6, 32, True, True)
    got = mamba.rmsnorm_fn(x, weight, None, z, group_size=32)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=2.0**-8, atol=1e-6)


# ---- Mamba -----------------------------------------------------------------------------------------------------

CHANNELS, STATE, RANK, WIDTH = 6, 3, 2, 4


def inner_arguments(length: int = 7) -> dict[str, Tensor]:
    return {
        "xz": normal(2, 2 * CHANNELS, length),
        "conv1d_weight": normal(CHANNELS, 1, WIDTH),
        "conv1d_bias": normal(CHANNELS),
        "x_proj_weight": normal(RANK + 2 * STATE, CHANNELS) / 3,
        "delta_proj_weight": normal(CHANNELS, RANK),
        "out_proj_weight": normal(5, CHANNELS),
        "out_proj_bias": normal(5),
        "A": -torch.rand(CHANNELS, STATE, dtype=torch.float64),
        "D": normal(CHANNELS),
        "delta_bias": normal(CHANNELS),
    }


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor, activated: bool = True) -> Tensor:
    """A causal convolution of x (B, C, L), tap by tap, through silu."""
    out = bias[:, None].expand_as(x)
    for tap in range(weight.shape[-1]):
        back = weight.shape[-1] - 1 - tap
        shifted = torch.cat([torch.zeros_like(x[..., :back]), x], -1)[..., : x.shape[-1]]
        out = out + weight[:, tap, None] * shifted
    return silu(out) if activated else out


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Along the channels of (B, dim, L)."""
    return x if weight is None else x / (x.square().mean(1, keepdim=True) + eps).sqrt() * weight[:, None]


def plain_inner(a: dict[str, Tensor], use_softplus: bool, extra: dict[str, Any]) -> Tensor:
    x, z = a["xz"][:, :CHANNELS], a["xz"][:, CHANNELS:]
    x = plain_conv(x, a["conv1d_weight"][:, 0], a["conv1d_bias"])
    eps = extra.get("b_c_dt_rms_eps", 1e-6)
    low, B, C = torch.einsum("rc,bcl->brl", a["x_proj_weight"], x).split([RANK, STATE, STATE], 1)
    delta = rms(torch.einsum("cr,brl->bcl", a["delta_proj_weight"], low), extra.get("dt_rms_weight"), eps)
    B, C = (y + extra.get(f"{n}_proj_bias", torch.zeros(STATE).double())[:, None] for n, y in (("B", B), ("C", C)))
    B, C = rms(B, extra.get("b_rms_weight"), eps), rms(C, extra.get("c_rms_weight"), eps)
    B, C = extra.get("B", B), extra.get("C", C)
    delta = delta + a["delta_bias"][:, None]
    delta = softplus(delta) if use_softplus else delta
    state, out = torch.zeros(2, CHANNELS, STATE, dtype=torch.float64), []
    for t in range(x.shape[2]):
        write = (delta * x)[:, :, t, None] * B[:, None, :, t]
        state = (delta[:, :, t, None] * a["A"]).exp() * state + write
        out.append((state * C[:, None, :, t]).sum(-1) + a["D"] * x[:, :, t])
    y = torch.stack(out, 1) * silu(z.transpose(1, 2))
    return y @ a["out_proj_weight"].T + a["out_proj_bias"]


EXTRAS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "biases": lambda: {"B_proj_bias": normal(STATE), "C_proj_bias": normal(STATE)},
    "norms": lambda: {
        "b_rms_weight": normal(STATE), "c_rms_weight": normal(STATE), "dt_rms_weight": normal(CHANNELS),
        "b_c_dt_rms_eps": 1e-2,
    },
    "given": lambda: {"B": normal(2, STATE, 7), "C": normal(2, STATE, 7)},
}  # fmt: skip


@pytest.mark.parametrize("extras", EXTRAS)
def test_mamba_inner_is_mambas_layer(extras: str) -> None:
    arguments = {name: x.requires_grad_() for name, x in inner_arguments().items()}
    extra = EXTRAS[extras]()
    got = mamba_inner_fn(**arguments, **extra)
    wanted = plain_inner(arguments, True, extra)
    assert_same(got, wanted)
    used = [x for name, x in arguments.items() if name not in ("x_proj_weight", "delta_proj_weight")]
    same_gradients(got, wanted, [*used, arguments["delta_proj_weight"]])


def test_mamba_inner_may_leave_softplus_out() -> None:
    arguments = inner_arguments()
    arguments["delta_bias"] = torch.full((CHANNELS,), 99.0, dtype=torch.float64)  # keeps delta positive
    arguments["A"] = arguments["A"] / 100
    got = mamba_inner_fn(**arguments, delta_softplus=False, checkpoint_lvl=0)
    assert_same(got, plain_inner(arguments, False, {}))


# ---- Mamba-2 ---------------------------------------------------------------------------------------------------

HEADS, HEAD, GROUPS = 4, 3, 2
DIM, CONVOLVED = HEADS * HEAD, HEADS * HEAD + 2 * GROUPS * STATE


def split_arguments(extra: int = 0, per_channel: bool = False, length: int = 7) -> dict[str, Any]:
    return {
        "zxbcdt": normal(2, length, 2 * extra + DIM + CONVOLVED + HEADS),
        "conv1d_weight": normal(CONVOLVED, WIDTH),
        "conv1d_bias": normal(CONVOLVED),
        "dt_bias": normal(HEADS),
        "A": -torch.rand(HEADS, dtype=torch.float64),
        "D": normal(HEADS, HEAD) if per_channel else normal(HEADS),
        "initial_states": normal(2, HEADS, HEAD, STATE),
    }


def plain_split(
    a: dict[str, Any], extra: int, norm: dict[str, Any], limit: float, activated: bool = True
) -> tuple[Tensor, Tensor]:
    first, second, z, xBC, dt = a["zxbcdt"].split([extra, extra, DIM, CONVOLVED, HEADS], -1)
    xBC = plain_conv(xBC.transpose(1, 2), a["conv1d_weight"], a["conv1d_bias"], activated).transpose(1, 2)
    x, B, C = xBC.split([DIM, GROUPS * STATE, GROUPS * STATE], -1)
    x, step = x.unflatten(-1, (HEADS, HEAD)), softplus(dt + a["dt_bias"]).clamp(max=limit)
    B, C = (y.unflatten(-1, (GROUPS, STATE)).repeat_interleave(HEADS // GROUPS, 2) for y in (B, C))
    state, out = a["initial_states"], []
    D = a["D"] if a["D"].dim() == 2 else a["D"][:, None]
    for t in range(x.shape[1]):
        fade = (step[:, t] * a["A"]).exp()[..., None, None]
        state = fade * state + (step[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        out.append((state * C[:, t, :, None]).sum(-1) + D * x[:, t])
    y = torch.stack(out, 1).flatten(-2)
    if norm:
        y = plain_norm(y, norm["rmsnorm_weight"], None, z, norm["rmsnorm_eps"], DIM // GROUPS, norm["before"], True)
    else:
        y = y * silu(z)
    return torch.cat([silu(first) * second, y], -1), state


@pytest.mark.parametrize("norm", [None, True, False])
@pytest.mark.parametrize("extra", [0, 5])
def test_the_split_scan_is_mamba2s_layer(norm: bool | None, extra: int) -> None:
    arguments = split_arguments(extra, per_channel=norm is None)
    tensors = [x.requires_grad_() for x in arguments.values()]
    normed = {} if norm is None else {"rmsnorm_weight": normal(DIM), "rmsnorm_eps": 1e-2}
    more = normed | ({} if norm is None else {"norm_before_gate": norm, "headdim": HEAD})
    out_weight, out_bias = normal(5, extra + DIM), normal(5)
    got, states = mamba_split_conv1d_scan_combined(
        **arguments, chunk_size=4, ngroups=GROUPS, return_final_states=True, dt_limit=(0.0, 1.5),
        outproj_weight=out_weight, outproj_bias=out_bias, **more,
    )  # fmt: skip
    wanted, last = plain_split(arguments, extra, normed | {"before": norm} if normed else {}, 1.5)
    assert_same(got, wanted @ out_weight.T + out_bias)
    assert_same(states, last)
    same_gradients(got, wanted @ out_weight.T + out_bias, tensors)


def test_the_split_scan_begins_again_where_seq_idx_changes() -> None:
    arguments = split_arguments(length=9) | {"initial_states": None}
    seq_idx = torch.tensor([[0] * 4 + [1] * 5, [0] * 2 + [1] * 7])
    more: dict[str, Any] = {"chunk_size": 4, "ngroups": GROUPS, "headdim": HEAD}
    got = mamba_split_conv1d_scan_combined(**arguments, seq_idx=seq_idx, **more)
    for row, cut in ((0, 4), (1, 2)):
        for part in (slice(0, cut), slice(cut, 9)):
            alone = arguments | {"zxbcdt": arguments["zxbcdt"][row : row + 1, part]}
            alone["initial_states"] = torch.zeros(1, HEADS, HEAD, STATE, dtype=torch.float64)
            assert_same(got[row, part], plain_split(alone, 0, {}, float("inf"))[0][0])


@pytest.mark.parametrize("activation", [None, "swish"])
def test_the_split_scan_may_leave_the_activation_out(activation: str | None) -> None:
    arguments = split_arguments()
    got = mamba_split_conv1d_scan_combined(
        **arguments, chunk_size=4, ngroups=GROUPS, headdim=HEAD, activation=activation
    )
    assert_same(got, plain_split(arguments, 0, {}, float("inf"), activation is not None)[0])


# ---- dtypes ----------------------------------------------------------------------------------------------------


def scan_arguments(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "x": torch.randn(1, 300, 2, 3).to(dtype),
        "dt": torch.randn(1, 300, 2).to(dtype),
        "A": -torch.rand(2) / 50,
        "B": torch.randn(1, 300, 1, 4).to(dtype),
        "C": torch.randn(1, 300, 1, 4).to(dtype),
    }


def final(arguments: dict[str, Tensor], state_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    return mamba_chunk_scan_combined(
        **arguments, chunk_size=8, dt_softplus=True, return_final_states=True, state_dtype=state_dtype
    )


def test_states_are_never_less_precise_than_state_dtype() -> None:
    arguments = scan_arguments(torch.float32)
    _, exact = final({name: x.double() for name, x in arguments.items()}, None)
    out, states = final(arguments, torch.float64)
    assert out.dtype == torch.float32 and states.dtype == torch.float64
    assert_same(states, exact)
    for dtype in (None, torch.bfloat16, torch.float16, torch.float32):
        out, states = final(arguments, dtype)
        assert out.dtype == states.dtype == torch.float32
        torch.testing.assert_close(states.double(), exact, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="floating dtype"):
        final(arguments, torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_take_half_precision(dtype: torch.dtype) -> None:
    inner = {name: x if name == "A" else x.to(dtype) for name, x in inner_arguments().items()}
    inner["A"] = inner["A"].float()
    exact = plain_inner({name: x.double() for name, x in inner.items()}, True, {})
    got = mamba_inner_fn(**inner)
    assert got.dtype == dtype
    assert distance(got, exact) < 0.1
    split = {name: x.to(dtype) for name, x in split_arguments().items()}
    split |= {name: split[name].float() for name in ("A", "dt_bias", "D")}
    out, states = mamba_split_conv1d_scan_combined(
        **split, chunk_size=4, ngroups=GROUPS, headdim=HEAD, return_final_states=True
    )
    wanted, last = plain_split({name: x.double() for name, x in split.items()}, 0, {}, float("inf"))
    assert out.dtype == dtype and states.dtype == torch.float32
    assert distance(out, wanted) < 0.1 and distance(states, last) < 0.1


def test_no_tokens_at_all() -> None:
    assert mamba_inner_fn(**inner_arguments(length=0)).shape == (2, 0, 5)
    arguments = split_arguments(length=0)
    out, states = mamba_split_conv1d_scan_combined(
        **arguments, chunk_size=4, ngroups=GROUPS, headdim=HEAD, return_final_states=True
    )
    assert out.shape == (2, 0, DIM) and torch.equal(states, arguments["initial_states"])
    nothing = arguments | {"initial_states": None, "seq_idx": torch.zeros(2, 0, dtype=torch.int)}
    assert mamba_split_conv1d_scan_combined(**nothing, chunk_size=4, ngroups=GROUPS, headdim=HEAD).shape == (2, 0, DIM)


# ---- refusals --------------------------------------------------------------------------------------------------


def inner(**changes: Any) -> Any:
    return mamba_inner_fn(**inner_arguments() | changes)


def split(**changes: Any) -> Any:
    return mamba_split_conv1d_scan_combined(
        **split_arguments() | {"ngroups": GROUPS, "headdim": HEAD, "chunk_size": 4} | changes
    )


REFUSED: list[tuple[str, Callable[[], Any], type[Exception]]] = [
    ("group_size", lambda: mamba.rmsnorm_fn(normal(2, 12), normal(12), None, group_size=5), ValueError),
    ("weight must be", lambda: mamba.rmsnorm_fn(normal(2, 12), normal(6), None), ValueError),
    ("z must be", lambda: mamba.layernorm_fn(normal(2, 12), normal(12), None, normal(12, 2)), ValueError),
    ("A must be real", lambda: inner(A=normal(6, 3) + 0j), NotImplementedError),
    ("xz must be", lambda: inner(xz=normal(2, 7, 12)), ValueError),
    ("x_proj_weight must be", lambda: inner(x_proj_weight=normal(9, 6)), ValueError),
    ("checkpoint_lvl", lambda: inner(checkpoint_lvl=2), ValueError),
    ("leave out B", lambda: inner(B=normal(2, 3, 7), b_rms_weight=normal(3)), ValueError),
    ("leave out C", lambda: inner(C=normal(2, 3, 7), c_rms_weight=normal(3)), ValueError),
    ("an rms weight must be", lambda: inner(dt_rms_weight=normal(3)), ValueError),
    ("pass headdim", lambda: split(headdim=None), ValueError),
    ("ngroups must divide", lambda: split(ngroups=3), ValueError),
    ("conv1d_weight must have", lambda: split(conv1d_weight=normal(23, 4)), ValueError),
    ("zxbcdt must be", lambda: split(zxbcdt=normal(2, 7)), ValueError),
    ("outproj_bias", lambda: split(outproj_bias=normal(5)), ValueError),
    ("activation must be", lambda: split(activation="gelu"), NotImplementedError),
    ("beside seq_idx", lambda: split(seq_idx=torch.zeros(2, 7, dtype=torch.int)), NotImplementedError),
]  # fmt: skip


@pytest.mark.parametrize(("words", "call", "kind"), REFUSED, ids=[words for words, *_ in REFUSED])
def test_what_cannot_be_honoured_is_refused_in_words(words: str, call: Callable[[], Any], kind: type) -> None:
    with pytest.raises(kind, match=words):
        call()
