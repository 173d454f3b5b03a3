"""A packed cache beside one of float16: bytes, the error of a decoding step, its time, and the loss on real text.

python -m benchmarks.kv_packed [--prompt 1536] [--next 48] [--texts 6] [--repeats 50]

The loss is that of the built-in model on the tokens after a prompt that is packed. The naive choice beside it takes
the salient tokens at random, as many of them in as many bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import RESULTS, Times, seconds_of, write_json
from benchmarks.kv_budget import measured, texts
from foveate import attend
from foveate.cache.memory import Look
from foveate.cache.zipped import Precision, ZipMemory
from foveate.lab.measure import machine
from foveate.methods.cached import CachedMethod
from foveate.methods.zipcache import zipcache
from foveate.models import builtin

SETTINGS = {"prompt": 1536, "next": 48, "texts": 6, "repeats": 50}
SALIENT = (0.6, 0.2)


class AtRandom(ZipMemory):
    """Salient tokens drawn at random."""

    def saliency(self) -> Tensor:
        assert self.slots is not None
        return torch.rand(self.slots.position.shape, generator=torch.Generator().manual_seed(5))


def at_random(share: float) -> Callable[[Any], ZipMemory]:
    return lambda _: AtRandom(Precision(share, 4, 2, 100, 0.05))


def keys_and_values(model: Any, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        cache = model(tokens).past_key_values
    return [(layer.keys.half(), layer.values.half()) for layer in cache.layers]


def a_step(k: Tensor, v: Tensor, repeats: int) -> dict[str, Any]:
    """Bytes, error and time of one query's attention over a packed text of one layer."""
    memory, length = ZipMemory(Precision(0.6, 4, 2, 100, 0.05)), k.shape[2]
    q = k.repeat_interleave(2, 1)[:, :, torch.randperm(length, generator=torch.Generator().manual_seed(1))]
    with torch.no_grad():
        memory.attend(q, k, v, Look(torch.arange(length)[None], {}, padded=False))
        one = q[:, :, -1:]
        step = Look(torch.tensor([[length]]), {}, padded=False)
        want, got = attend(one, k, v), memory.look(one, step)
        times: dict[str, list[float]] = {"packed": [], "float16": []}
        for _ in range(repeats):
            times["packed"].append(seconds_of(lambda: (memory.look(one, step),)))
            times["float16"].append(seconds_of(lambda: (attend(one, k, v),)))
    return {
        "bytes": {"packed": sum(group.nbytes for group in memory.packed), "float16": k.nbytes + v.nbytes},
        "error": float((got - want).float().norm() / want.float().norm()),
        "seconds": {name: Times.of(taken).median for name, taken in times.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, default=RESULTS / "kv_packed.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, _ = builtin.load()
    pieces = texts(options.texts, options.prompt + options.next)
    record: dict[str, Any] = {"settings": {name: getattr(options, name) for name in SETTINGS}}
    record["machine"] = machine.describe()
    record["layers"] = [a_step(k, v, options.repeats) for k, v in keys_and_values(model, pieces[0])]
    record["losses"] = losses = {"whole": measured(model, None, pieces, options.prompt)}
    for share in SALIENT:
        made: dict[str, Any] = {
            f"zipcache, {share}": zipcache(salient=share),
            f"random, {share}": CachedMethod(at_random(share)),
        }
        for name, method in made.items():
            losses[name] = measured(model, method, pieces, options.prompt)
    for name, values in losses.items():
        print(f"{name:24} {sum(values) / len(values):.4f}")
    for layer in record["layers"]:
        print(layer)
    write_json(options.out, record)


if __name__ == "__main__":
    main()
