"""Mixers that turn their queries and keys by position."""

from __future__ import annotations

import pytest
import torch
from tests.support.heads import stepped

from foveate.catalogue.registry import mixer


@pytest.mark.paper("SWAT (LLM)", "works_when")
def test_rotary_mixers_decode_as_they_read() -> None:
    x = torch.randn(2, 41, 32, dtype=torch.float64)
    for name, options in (
        ("flash_attention", {}),
        ("swat", {"window": 7}),
        ("streaming_llm", {"sinks": 3, "window": 5}),
        ("streaming_llm", {"sinks": 0, "window": 5}),
        ("sigmoid_attention", {"qk_norm": True, "length": 50}),
        ("delta_attention", {"sinks": 1, "window": 4, "stride": 6}),
        ("moba", {"block": 5, "k": 3}),
    ):
        model = mixer(name, 32, heads=4, kv_heads=2, rotary=50.0, **options).double()
        plain_model = mixer(name, 32, heads=4, kv_heads=2, rotary=None, **options).double()
        plain_model.load_state_dict(model.state_dict())
        torch.testing.assert_close(stepped(model, x), model(x))
        assert not torch.allclose(plain_model(x), model(x)), f"{name} does not turn"
