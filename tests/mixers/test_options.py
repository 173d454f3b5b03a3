"""Options of mixers: what a constructor shows is what it takes, and each default stands in one place."""

from __future__ import annotations

import inspect
import typing
from typing import Any

import pytest
import torch

from foveate.catalogue.options import options_of, parameters_of
from foveate.catalogue.registry import mixer, names, row
from foveate.mixers.attention import AttentionMixer, AttentionOptions, RotaryOptions
from foveate.mixers.core import AttendOptions, CoreOptions, PatternCore
from foveate.mixers.linear.deltanet import DeltaNet, DeltaOptions
from foveate.mixers.linear.lightning_attention import LightningAttention2, LightningOptions
from foveate.mixers.linear.linear_transformer import LinearOptions, LinearTransformer
from foveate.mixers.lowrank_pool.agent import AgentCore
from foveate.mixers.recurrent import HeadOptions, RecurOptions, RecurrentMixer
from foveate.mixers.recurrent_ssm.mamba import Mamba, MambaOptions, ScanOptions, StateOptions

SIZES = {"dim", "heads"}


@pytest.mark.parametrize(
    ("passed_on", "taker", "kept"),
    [
        (RecurOptions, RecurrentMixer, set()),
        (HeadOptions, RecurrentMixer, {"conv"}),
        (LinearOptions, LinearTransformer, set()),
        (LightningOptions, LightningAttention2, set()),
        (DeltaOptions, DeltaNet, set()),
        (MambaOptions, Mamba, set()),
        (ScanOptions, Mamba, {"causal"}),
        (StateOptions, Mamba, {"causal", "expand", "conv"}),
        (RotaryOptions, AttentionMixer, {"core"}),
        (AttentionOptions, AttentionMixer, {"core", "rotary"}),
    ],
)
def test_options_that_are_passed_on_are_those_of_the_taker(passed_on: Any, taker: type, kept: set[str]) -> None:
    assert set(passed_on.__annotations__) == set(parameters_of(taker)) - SIZES - kept
    types = typing.get_type_hints(passed_on)
    for name, hint in typing.get_type_hints(taker.__init__).items():
        assert types.get(name, hint) == hint


def test_a_core_takes_what_attend_does() -> None:
    attend_takes = set(inspect.signature(__import__("foveate").attend).parameters)
    assert set(AttendOptions.__annotations__) < attend_takes
    assert set(options_of(PatternCore.__call__)) == {"q", "k", "v", "within", *AttendOptions.__annotations__}
    assert set(options_of(AgentCore.__call__)) == {"q", "k", "v", "within", *CoreOptions.__annotations__}


@pytest.mark.parametrize("name", names())
def test_every_option_shown_is_one_with_the_default_shown(name: str) -> None:
    shown = parameters_of(row(name).mixer)
    assert next(iter(shown)) == "dim"
    given = {key: one.default for key, one in shown.items() if one.default is not one.empty}
    plain, told = mixer(name, 144), mixer(name, 144, **given)
    assert [(key, value.shape) for key, value in plain.state_dict().items()] == [
        (key, value.shape) for key, value in told.state_dict().items()
    ]


def test_a_mixer_of_a_pattern_shows_the_options_of_both_and_no_core() -> None:
    shown, base = inspect.signature(row("moba").mixer).parameters, parameters_of(AttentionMixer)
    assert list(shown) == ["dim", "heads", "block", "k", "kv_heads", "head_dim", "rotary", "causal"]
    assert all(shown[name].default == base[name].default for name in set(shown) & set(base))
    with pytest.raises(ValueError, match="moba has no option 'kernel'; it has heads, block, k, kv_heads"):
        mixer("moba", 16, kernel=3)


def test_a_grid_mixer_of_a_pattern_keeps_the_defaults_of_its_base() -> None:
    shown = parameters_of(row("neighborhood_attention").mixer)
    assert shown["causal"].default is False and "core" not in shown and "relative_bias" in shown


@pytest.mark.parametrize(("name", "part"), [("rodimus_plus", "memory"), ("s_mamba", "state"), ("zigma", "conv")])
def test_options_of_a_part_are_shown(name: str, part: str) -> None:
    assert part in options_of(row(name).mixer)


@pytest.mark.parametrize("name", ["gla", "mamba", "kda", "state_tuning"])
def test_an_option_that_there_is_not_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has no option 'windows'; it has "):
        mixer(name, 48, windows=3)


def test_agents_are_those_of_the_paper_in_classifiers_and_as_many_as_written_for_generators() -> None:
    assert parameters_of(row("agent_attention").mixer)["agents"].default == 49
    assert AgentCore().agents == 256
    core = row("agent_attention").core
    assert core is not None and core() == AgentCore()


def test_values_twice_and_keys_half_as_wide_follow_the_width_that_is_given() -> None:
    def widths(name: str, **options: int) -> tuple[Any, Any]:
        made: Any = mixer(name, 48, heads=4, **options)
        return made.head_dim, made.value_dim

    assert widths("retention") == (12, 24) and widths("retention", head_dim=5) == (5, 10)
    assert widths("gated_deltanet", value_dim=7) == (12, 7)
    assert widths("gla") == (6, 12) and widths("gla", value_dim=7) == (3, 7) and widths("gla", head_dim=5) == (5, 12)
    assert widths("metala", value_dim=1) == (1, 1) and widths("deltanet", head_dim=5) == (5, 5)


@pytest.mark.parametrize("name", ["gla", "mlstm", "flow_attention", "mamba2", "s5", "transnormer_llm", "rodimus"])
def test_bytes_of_a_state_are_those_of_its_tensors_after_any_tokens(name: str) -> None:
    made = mixer(name, 48)
    with torch.no_grad():
        _, state = made.prefill(torch.randn(1, 9, 48), made.init_state(1))

    def size(part: Any) -> int:
        if isinstance(part, torch.Tensor):
            return 0 if part.dtype == torch.long else part.nbytes
        return sum(map(size, part))

    assert made.state_bytes(9) == size(state) > 0
