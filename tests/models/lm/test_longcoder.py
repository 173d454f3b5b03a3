"""LongCoder: the model written out over one table of who sees whom, what its decoder keeps, and what memory is for."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tests.support.formulas import follows
from tests.support.masked import masked
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, layer_norm
from torch.testing import assert_close

from foveate.models.builtin import heldout_text
from foveate.models.lm import longcoder
from foveate.models.lm.longcoder import important_lines

WINDOW, BRIDGE, N = 4, 5, 38
SIZES: dict[str, Any] = {"dim": 24, "depth": 3, "heads": 2, "hidden": 40, "window": WINDOW, "length": 400}


def heads(layer: Any, x: Tensor) -> Tensor:
    return (x @ layer.weight.T + layer.bias).unflatten(-1, (2, -1)).transpose(1, 2)


def normed(module: Any, x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], module.weight, module.bias, 1e-5)


def after(layer: Any, x: Tensor, mixed: Tensor) -> Tensor:
    out = layer.attention.out
    x = normed(layer.norm, x + mixed.transpose(1, 2).flatten(2) @ out.weight.T + out.bias)
    hidden = gelu(x @ layer.fc1.weight.T + layer.fc1.bias)
    return normed(layer.mlp_norm, x + hidden @ layer.fc2.weight.T + layer.fc2.bias)


def written_out(model: Any, tokens: Tensor, memory: Tensor) -> Tensor:
    """All tokens and all bridges as the keys of one dense softmax."""
    length = tokens.shape[1]
    ends = [at for at in range(length) if (at + 1) % BRIDGE == 0]
    x = normed(model.norm, model.embed.weight[tokens] + model.places.weight[:length])
    b = normed(model.norm, model.bridge_token + model.places.weight[ends]).expand(len(x), -1, -1)
    near = torch.tensor([[0 <= i - j <= WINDOW for j in range(length)] for i in range(length)])
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    of_tokens = torch.cat(
        [
            near | memory[:, None] & earlier,
            torch.tensor([[e <= i for e in ends] for i in range(length)]).expand(len(x), -1, -1),
        ],
        2,
    ).unsqueeze(1)
    of_bridges = torch.tensor(
        [[e - BRIDGE < j <= e for j in range(length)] + [other <= e for other in ends] for e in ends]
    )
    for number, layer in enumerate(model.layers):
        own = layer.attention
        keys = torch.cat([x, b], 1)
        mixed = masked(heads(own.query, x), heads(own.key, keys), heads(own.value, keys), of_tokens)
        after_x = after(layer, x, mixed)
        if number + 1 < len(model.layers):
            q, k, v = heads(own.bridge_query, b), heads(own.bridge_key, keys), heads(own.bridge_value, keys)
            b = after(layer, b, masked(q, k, v, of_bridges))
        x = after_x
    return x @ model.embed.weight.T


@pytest.mark.paper("LongCoder", "definition")
@pytest.mark.paper("LongCoder", "works_when")
def test_it_is_one_dense_softmax_over_window_memory_and_bridges() -> None:
    model = longcoder(16, bridge=BRIDGE, **SIZES).double()
    tokens, memory = torch.randint(16, (2, N)), torch.rand(2, N) < 0.1
    memory[0, 2] = memory[1, 3] = True
    follows(model, lambda: model(tokens, memory), lambda: written_out(model, tokens, memory))
    by_id = longcoder(16, bridge=BRIDGE, memory_ids=(3, 7), **SIZES).double()
    assert_close(by_id(tokens), by_id(tokens, (tokens == 3) | (tokens == 7)))


@pytest.mark.paper("LongCoder", "works_when")
@torch.no_grad()
@pytest.mark.parametrize("prompt", [0, 31])
def test_a_decoder_keeps_the_window_memory_and_bridges(prompt: int) -> None:
    model = longcoder(16, bridge=BRIDGE, **SIZES | {"depth": 2}).double().eval()
    tokens, memory = torch.randint(16, (2, 90)), torch.rand(2, 90) < 0.06
    whole = model(tokens, memory)
    out, state = model.prefill(tokens[:, :prompt], model.init_state(2), memory[:, :prompt])
    outs = [out]
    for at in range(prompt, 90):
        out, state = model.decode(tokens[:, at : at + 1], state, memory[:, at : at + 1])
        outs.append(out)
    assert_close(torch.cat(outs, 1), whole, rtol=1e-9, atol=1e-9)
    for layer in state.layers:
        assert layer.recent.k.shape[2] <= WINDOW + 33, "a few more than the window, to drop many at once"
        assert layer.memory.length == memory.any(0).sum() and layer.bridges.length == 90 // BRIDGE
        assert layer.segment.shape[1] < BRIDGE


@pytest.mark.paper("LongCoder", "works_when")
def test_lines_that_import_or_define_are_marked() -> None:
    code = "import re\n\nclass A(B):\n    def f(self): return 1\n    x = 2\nfrom a import b\nimported = 3\n"
    assert [code[: at + 1].splitlines()[-1].split()[0] for at in important_lines(code)] == [
        "import",
        "class",
        "def",
        "from",
    ]
    assert all(code[at] == "\n" for at in important_lines(code))


MODULES = ["re", "json", "math", "random", "heapq", "copy"]


def lines() -> tuple[dict[str, int], list[list[str]]]:
    """Lines of real code as words, and a number for each word."""
    code = [re.findall(r"\w+|[^\w\s]", line) for line in heldout_text(60_000).splitlines()]
    code = [line for line in code if 4 <= len(line) <= 9 and "import" not in line and not set(line) & set(MODULES)][:60]
    words = sorted({word for line in code for word in line} | {"import", "\n", "."} | set(MODULES))
    return {word: number for number, word in enumerate(words)}, code


@pytest.mark.paper("LongCoder", "works_when")
def test_it_remembers_the_import_that_a_window_has_lost() -> None:
    """Real lines between an import and a use of it: which module is it? Without memory and bridges it is a guess."""
    numbers, code = lines()
    newline, modules = numbers["\n"], torch.tensor([numbers[name] for name in MODULES])

    def draw(batch: int) -> tuple[Tensor, Tensor]:
        picks, rows = torch.randint(len(MODULES), (batch,)), []
        for pick in picks.tolist():
            words = ["import", MODULES[pick], "\n"]
            while len(words) < 24:
                words += [*code[int(torch.randint(len(code), ()))], "."]
            rows.append([numbers[word] for word in words[:24]] + [numbers["."]])
        return torch.tensor(rows), picks

    found = []
    for options in ({"memory_ids": (newline,), "bridge": 8}, {"bridge": None}):
        torch.manual_seed(1)
        sizes: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2, "hidden": 64, "window": 5, "length": 40}
        model = longcoder(len(numbers), **sizes, **options)  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)  # so small a model starts too near to nothing
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for _ in range(100):
            tokens, picks = draw(32)
            loss = cross_entropy(model(tokens)[:, -1, modules], picks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            tokens, picks = draw(256)
            found.append((model(tokens)[:, -1, modules].argmax(-1) == picks).float().mean().item())
    assert found[0] > 0.9 and found[1] < 0.35, found


def test_more_tokens_than_positions_and_other_marks_are_refused() -> None:
    model = longcoder(16, bridge=BRIDGE, **SIZES)
    with pytest.raises(ValueError, match="400 positions; got 401 tokens"):
        model(torch.zeros(1, 401, dtype=torch.long))
    with pytest.raises(ValueError, match=r"boolean \(1, 5\); got torch.int64"):
        model(torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long))
