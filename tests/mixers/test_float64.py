"""In float64 nothing is float32: no table, constant or buffer that a mechanism or a door makes has fewer digits."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.support.compat_inputs import CASES, FIXED, chosen, draw, options_of
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foveate import attend, causal, relu, sigmoid, softmax
from foveate.catalogue.registry import Row, rows
from foveate.compat import fla, mamba
from foveate.mixers.recurrent_ssm.mamba3d import nearest
from foveate.options import forced_impl
from foveate.patterns import Layout, Points

EXACT = torch.float64, torch.complex128


class Digits(TorchDispatchMode):
    """Notes where tensors of fewer digits than float64 come out of an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) and x.dtype not in EXACT:
                ours = [frame for frame in traceback.extract_stack() if "/foveate/" in frame.filename]
                self.found.add(f"{ours[-1].filename}:{ours[-1].lineno} {func} {x.dtype}" if ours else str(func))
        return out


@contextmanager
def all_digits() -> Iterator[None]:
    with Digits() as digits:
        yield
    assert not digits.found, "\n".join(sorted(digits.found))


def shortened(mixer: torch.nn.Module) -> list[str]:
    """Names of parameters and buffers of fewer digits."""
    kept = [*mixer.named_parameters(), *mixer.named_buffers()]
    return [name for name, x in kept if x.is_floating_point() and x.dtype != torch.float64]


def built(
    row: Row, dim: int, heads: int, form: bool, made: Callable[[Any], Any] = torch.nn.Module.double
) -> torch.nn.Module | None:
    """A double mixer of six heads, whose slopes and decays are no powers of two; None where it takes no six heads."""
    options = {"causal": form, "heads": heads} | getattr(row.mixer, "tiny", {})
    while True:
        try:
            mixer = made(row.mixer(dim, **options)).eval()
            length, layout = places(row)[0]
            mixer(torch.zeros(1, length, dim, dtype=torch.float64), layout=layout)
            return mixer
        except TypeError:
            if options.pop("heads", None) is None and options.pop("causal", None) is None:
                raise
        except ValueError:
            return None


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_mixers_in_float64_have_all_digits(row: Row) -> None:
    mixers = [built(row, dim, heads, form) for dim, heads in ((36, 6), (32, 4)) for form in forms(row)]
    mixers = [mixer for mixer in mixers if mixer is not None][: len(forms(row))]
    assert mixers
    for mixer in mixers:
        assert not shortened(mixer)
        for length, layout in places(row):
            x = torch.randn(2, length, mixer.dim, dtype=torch.float64)
            with all_digits():
                out = mixer(x, layout=layout)
            assert out.dtype == torch.float64
            with all_digits(), forced_impl("reference"):
                mixer(x, layout=layout)
            if "decode" in row.supports and mixer.causal and layout is None:
                with all_digits():
                    state = mixer.init_state(2)
                    for token in x[:, :3].unbind(1):
                        out, state = mixer.decode(token.unsqueeze(1), state)
                assert out.dtype == torch.float64


def places(row: Row) -> list[tuple[int, Layout | None]]:
    grids = getattr(row.mixer, "grids", ()) if "grid" in row.supports else ()
    flat = [grid for grid in grids if not isinstance(grid, Points)]  # clouds are float32 as they are given
    return [(grid.length, grid) for grid in flat] if grids else [(21, None)]


def forms(row: Row) -> list[bool]:
    return [form for form, name in ((True, "causal"), (False, "noncausal")) if name in row.supports]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_mixers_made_double_are_those_made_in_double(row: Row) -> None:
    """What is not in the state dict, such as a table of slopes, was not rounded on the way either."""
    for dim, heads in ((36, 6), (32, 4)):
        mixer = built(row, dim, heads, "causal" in row.supports)
        if mixer is None:
            continue
        with default_dtype(torch.float64):
            exact = built(row, dim, heads, "causal" in row.supports, torch.nn.Module.eval)
        assert exact is not None and not shortened(exact)
        exact.load_state_dict(mixer.state_dict())
        length, layout = places(row)[0]
        x = torch.randn(2, length, dim, dtype=torch.float64)
        with default_dtype(torch.float64):
            wanted = exact(x, layout=layout)
        torch.testing.assert_close(mixer(x, layout=layout), wanted, rtol=1e-12, atol=1e-12)
        return
    raise AssertionError(f"{row.name} takes neither 36 nor 32 channels")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", CASES)
def test_doors_of_fla_in_float64_have_all_digits(name: str) -> None:
    drawn = draw(heads=6)
    more = {"output_final_state": True} if "output_final_state" in options_of(name) else {}
    with all_digits():
        o, state = getattr(fla, name)(**chosen(drawn, CASES[name][0]), **FIXED.get(name, {}), **more)
    assert o.dtype == torch.float64 and (state is None or state.dtype == torch.float64)


def others() -> dict[str, Callable[[], Any]]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    q, g, channels = normal(1, 19, 6, 4), logsigmoid(normal(1, 19, 6)), logsigmoid(normal(1, 19, 6, 4))
    gate = -g
    offsets = torch.tensor([0, 5, 19])
    norm = mamba.RMSNormGated(6, dtype=torch.float64)
    return {
        "based": lambda: fla.parallel_based(q, q, q),
        "rebased": lambda: fla.parallel_rebased(q, q, q),
        "comba": lambda: fla.chunk_comba(q, q / 9, q, q / 9, g, gate, cu_seqlens=offsets),
        "gdn2": lambda: fla.chunk_gdn2(q, q / 9, q, channels, -channels, -channels),
        "product": lambda: fla.chunk_gated_delta_product(q, q / 9, q, g, gate.sigmoid(), 1),
        "lightnet": lambda: fla.chunk_lightnet(q, q, q, cu_seqlens=offsets),
        "rwkv4": lambda: fla.fused_recurrent_rwkv4(q[0, 0, 0], q[0, 0, 1], q[0], q[0], normal(19, 3, 1, 4).abs()),
        "fox": lambda: fla.parallel_forgetting_attn(q, q, q, g, cu_seqlens=offsets),
        "moba": lambda: fla.parallel_moba(q, q, q, offsets, 14, 4, 2),
        "nsa": lambda: fla.parallel_nsa(q, q, q, gate, gate, gate, block_counts=3, block_size=4, window_size=3),
        "hgrn": lambda: fla.chunk_hgrn(q[0], channels[0])[0],
        "rwkv7": lambda: fla.fused_mul_recurrent_rwkv7(q, channels, q, q, q / 9, q),
        "gates": lambda: fla.chunk_kda(
            q, q, q, q, g, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, A_log=q[0, 0, :, 0],
            use_beta_sigmoid_in_kernel=True,
        ),
        "norm": lambda: norm(q[0, 0].T.contiguous(), q[0, 1].T.contiguous()),
        "scan": lambda: mamba.selective_scan_fn(q[0], -channels[0], channels[0, 0].T[:, :3].new_full((6, 3), -0.3),
                                                normal(19, 3, 4), normal(19, 3, 4)),
        "mamba2": lambda: mamba.mamba_chunk_scan_combined(
            q, gate, g[0, 0], q[:, :, :2], q[:, :, :2], 8, D=q[0, 0, :, 0], z=q, dt_bias=g[0, 0], dt_softplus=True
        ),
        "conv": lambda: mamba.causal_conv1d_fn(q[0], normal(6, 4), activation="silu"),
        "sink": lambda: attend(q, q, q, causal, weights=softmax(sink=0.1)),
        "sigmoid": lambda: attend(q, q, q, causal, weights=sigmoid(bias=-0.1)),
        "relu": lambda: attend(q, q, q, causal, weights=relu(bias=0.1)),
    }  # fmt: skip


@pytest.mark.parametrize("name", others())
def test_other_calls_in_float64_have_all_digits(name: str) -> None:
    call = others()[name]
    with all_digits():
        out = call()
    assert {x.dtype for x in tree_leaves(out) if isinstance(x, Tensor)} == {torch.float64}


def test_sinks_and_biases_given_as_numbers_keep_their_digits() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64)
    logits = 8**-0.5 * q @ k.mT
    weights = logits.exp() / (logits.exp().sum(-1, keepdim=True) + torch.tensor(0.1).double().exp())
    exact = logits.exp() / (logits.exp().sum(-1, keepdim=True) + torch.tensor(0.1, dtype=torch.float64).exp())
    assert not torch.allclose(weights, exact, rtol=1e-10, atol=1e-12)  # what a sink in float32 would give
    torch.testing.assert_close(attend(q, k, v, weights=softmax(sink=0.1)), exact @ v, rtol=1e-12, atol=1e-12)
    got = attend(q, k, v, weights=sigmoid(bias=-0.1))
    torch.testing.assert_close(got, (logits - 0.1).sigmoid() @ v, rtol=1e-12, atol=1e-12)
    got = attend(q, k, v, weights=relu(bias=0.1))
    torch.testing.assert_close(got, (logits + 0.1).clamp(min=0) @ v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighbours_are_near_however_far_the_cloud_lies(dtype: torch.dtype) -> None:
    """Points on a line, far from the origin: products of coordinates would cancel to nothing."""
    order = torch.randperm(40)
    step, far = (2.0**-3, 2.0**14) if dtype == torch.float32 else (2.0**-14, 2.0**14)
    coords = torch.stack([far + step * order.to(dtype), torch.full((40,), far, dtype=dtype)], 1)
    found = nearest(Points(coords), 3)
    assert torch.equal(found[:, 0], torch.arange(40))
    inner = (order > 0) & (order < 39)
    assert torch.equal((order[found[inner, 1:]] - order[inner, None]).abs(), torch.ones(38, 2, dtype=torch.long))
