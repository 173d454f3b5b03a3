"""Mamba's block and its selective scan, against the paper's formulas token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.scan_formulas import (
    DIM,
    convolved,
    scanned,
    shaken,
    tokens,
)
from torch.nn.functional import silu, softplus
from torch.testing import assert_close

from foveate.mixers.recurrent_ssm.mamba import Mamba, SelectiveScan
from foveate.mixers.recurrent_ssm.mamba2 import Mamba2


def test_mamba_is_a_gated_selective_scan() -> None:
    mixer, x = shaken(Mamba(DIM, state=5)), tokens(23)
    u, gate = mixer.to_in(x).chunk(2, -1)
    expected = scanned(mixer.branch.ssm, convolved(mixer.branch.conv, u)) * silu(gate)
    assert_close(mixer(x), mixer.to_out(expected))


def test_mamba_is_masked_attention() -> None:
    mixer, x = shaken(Mamba(DIM, state=5)), tokens(23)
    u, gate = mixer.to_in(x).chunk(2, -1)
    matrix = mixer.attention_matrix(x)
    assert torch.equal(matrix, matrix.tril())
    y = (matrix @ convolved(mixer.branch.conv, u).mT.unsqueeze(-1)).squeeze(-1).mT
    assert_close(mixer.to_out(y * silu(gate)), mixer(x))


def test_its_attention_has_the_gradients_of_the_scan() -> None:
    ssm, u = shaken(SelectiveScan(6, state=3)), torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    towards = torch.randn(2, 9, 6, dtype=torch.float64)
    wanted = [u, *ssm.parameters()]
    y = (ssm.matrix(u) @ u.mT.unsqueeze(-1)).squeeze(-1).mT
    found = torch.autograd.grad((y * towards).sum(), wanted)
    assert_close(found, torch.autograd.grad((ssm(u).out * towards).sum(), wanted))


@pytest.mark.parametrize("groups", [0, 1, 2])
def test_blocks_are_those_of_transformers(groups: int) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": DIM, "state_size": 5, "num_hidden_layers": 1}
    if groups:
        heads = {"num_heads": 4, "head_dim": DIM // 2, "n_groups": groups, "chunk_size": 8}
        config = transformers.Mamba2Config(**sizes, **heads)
        mixer = shaken(Mamba2(DIM, heads=4, groups=groups, state=5)).float()
        theirs = transformers.models.mamba2.modeling_mamba2.Mamba2Mixer(config, 0)
        names = {"step_bias": "dt_bias", "scale": "norm.weight"}
    else:
        mixer = shaken(Mamba(DIM, state=5)).float()
        theirs = transformers.models.mamba.modeling_mamba.MambaMixer(transformers.MambaConfig(**sizes), 0)
        names = {"to_choices": "x_proj", "to_step": "dt_proj", "step_bias": "dt_proj.bias"}
        names |= {"branch.": "", "ssm.": ""}
    weights = {}
    for name, value in mixer.state_dict().items():
        for ours, other in {"to_in": "in_proj", "to_out": "out_proj", "conv.": "conv1d.", **names}.items():
            name = name.replace(ours, other)
        weights[name] = value
    theirs.load_state_dict(weights)
    x = tokens(23).float()
    with torch.no_grad():
        assert_close(mixer(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
def test_steps_start_where_the_paper_starts_them(kind: Any) -> None:
    mixer = kind(512, **({"heads": 512} if kind is Mamba2 else {}))
    ssm = mixer if kind is Mamba2 else mixer.branch.ssm
    step = softplus(ssm.step_bias)
    assert step.min() > 0.00099 and step.max() < 0.101
    assert step.log().std().item() == pytest.approx(4.605 / 12**0.5, rel=0.2)


def test_a_hidden_token_neither_writes_nor_fades() -> None:
    ssm, u = shaken(SelectiveScan(6, state=3)), torch.randn(1, 30, 6, dtype=torch.float64)
    real = torch.rand(1, 30) < 0.6
    assert_close(ssm(u, key_mask=real).out[real], ssm(u[real].unsqueeze(0)).out[0])


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
def test_half_precision_states_are_float32(kind: Any) -> None:
    mixer = kind(16).bfloat16()
    out, state = mixer.prefill(torch.randn(2, 9, 16).bfloat16(), mixer.init_state(2))
    assert out.dtype == state.tail.dtype == torch.bfloat16
    assert state[0].dtype == torch.float32


def test_refusals_say_what_to_do() -> None:
    wrongs: list[tuple[str, Any]] = [
        ("at least one number", lambda: Mamba(8, state=0)),
        ("at least one token", lambda: Mamba(8, conv=0)),
        ("at least once", lambda: Mamba(8, expand=0)),
        ("no noncausal form", lambda: Mamba(8, causal=False)),
    ]
    for message, wrong in wrongs:
        with pytest.raises(ValueError, match=message):
            wrong()
