"""DeciMamba: the scan of the tokens with the greatest steps."""

from __future__ import annotations

import pytest
import torch
from tests.support.scan_formulas import (
    DIM,
    convolved,
    scanned,
    shaken,
    tokens,
)
from torch import Tensor
from torch.nn.functional import silu, softplus
from torch.testing import assert_close

from foveate.mixers.recurrent_ssm.decimamba import DeciMamba, tokens_to_keep
from foveate.mixers.recurrent_ssm.mamba import Mamba, SelectiveScan


def decimated(keep: int, mamba: Mamba, last: int = 1) -> DeciMamba:
    mixer = DeciMamba(DIM, keep=keep, last=last, state=5).double()
    mixer.load_state_dict(mamba.state_dict())
    return mixer


def most_important(ssm: SelectiveScan, u: Tensor, count: int) -> list[int]:
    """The first ``count`` of the tokens u (N, C), those of the greatest mean step first."""
    importance = softplus(ssm.to_step(ssm.to_choices(u)[..., : ssm.rank]) + ssm.step_bias).mean(-1)
    return sorted(range(count), key=lambda t: -importance[t].item())


@pytest.mark.paper("DeciMamba", "definition")
def test_decimamba_scans_the_tokens_with_the_greatest_steps_in_order() -> None:
    mamba, x = shaken(Mamba(DIM, state=5)), tokens(40)
    mixer = decimated(11, mamba, last=2)
    u, gate = mamba.to_in(x).chunk(2, -1)
    u = convolved(mamba.branch.conv, u)
    expected = torch.zeros_like(x)
    for row in range(2):
        best = most_important(mamba.branch.ssm, u[row], 38)[:9]
        kept = torch.tensor([*sorted(best), 38, 39])
        y = scanned(mamba.branch.ssm, u[row, kept].unsqueeze(0)) * silu(gate[row, kept])
        expected[row, kept] = mamba.to_out(y)[0]
    assert_close(mixer(x), expected)
    short = mixer.decimate(x)
    assert short.out.shape == (2, 11, DIM)
    assert bool((short.kept[:, 1:] > short.kept[:, :-1]).all())
    assert_close(short.out, expected.gather(1, short.kept.unsqueeze(-1).expand(-1, -1, DIM)))


def test_decimamba_that_keeps_all_is_mamba() -> None:
    mamba, x = shaken(Mamba(DIM, state=5)), tokens(20)
    assert_close(decimated(20, mamba)(x), mamba(x))
    assert_close(decimated(20, mamba).decimate(x).out, mamba(x))


def test_decoding_goes_on_from_a_decimated_prompt() -> None:
    mamba, x = shaken(Mamba(DIM, state=5)), tokens(40)
    mixer = decimated(9, mamba)
    outs, state = [], mixer.prefill(x[:, :35]).state
    for t in range(35, 40):
        out, state = mixer.decode(x[:, t : t + 1], state)
        outs.append(out)
    u, gate = mamba.to_in(x).chunk(2, -1)
    u = convolved(mamba.branch.conv, u)  # of all tokens: only the scan is decimated
    for row in range(2):
        best = most_important(mamba.branch.ssm, u[row], 34)[:8]
        seen = torch.tensor([*sorted(best), *range(34, 40)])
        y = scanned(mamba.branch.ssm, u[row, seen].unsqueeze(0))[:, -5:] * silu(gate[row, 35:])
        assert_close(torch.cat(outs, 1)[row], mamba.to_out(y)[0])
    with pytest.raises(NotImplementedError, match="does not decode"):
        mixer.init_state(1)


def test_deeper_layers_of_a_decimated_stack_are_shorter() -> None:
    x, keeps = tokens(64), tokens_to_keep(3, 32, fade=0.5, least=10)
    assert keeps == [32, 16, 10]
    for keep in keeps:
        out, kept, _ = decimated(keep, shaken(Mamba(DIM, state=5))).decimate(x)
        x = x.gather(1, kept.unsqueeze(-1).expand(-1, -1, DIM)) + out
    assert x.shape == (2, 10, DIM)


def test_counts_of_tokens_that_cannot_be_kept_are_refused() -> None:
    for message, options in (("at least 1", {"keep": 0}), ("last tokens", {"keep": 2, "last": 3})):
        with pytest.raises(ValueError, match=message):
            DeciMamba(8, **options)
    with pytest.raises(ValueError, match="share of tokens"):
        tokens_to_keep(3, 10, fade=0)
