"""Windowed attention in pure torch against SDPA with the equivalent mask, forward and forward + backward.

python -m benchmarks.attend_tiles [--length 8192] [--window 256] [--heads 8] [--dim 64] [--repeats 7]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.contest import Case, Run, contest, publish
from foveate import attend, causal, sinks, window
from foveate.patterns import Pattern


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("length", 8192), ("window", 256), ("heads", 8), ("dim", 64), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.manual_seed(0)
    shape = (1, options.heads, options.length, options.dim)
    local = window(options.window) & causal
    cases = []
    for pattern in (local, local | sinks(4)):
        cases += compare(pattern, shape, options.repeats)
    title = f"{options.heads} heads of {options.dim}, {options.length} tokens, float32"
    print("written to", publish("attend_tiles", title, cases, settings=vars(options)))


def compare(pattern: Pattern, shape: tuple[int, ...], repeats: int) -> list[Case]:
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    cotangent = torch.randn(shape)
    mask = pattern.mask(shape[2])

    def tiles(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, pattern, impl="tiles")

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def forward(function) -> Run:  # type: ignore[no-untyped-def]
        def run() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(*inputs),)

        return run

    def trained(function) -> Run:  # type: ignore[no-untyped-def]
        return lambda: torch.autograd.grad(function(*inputs), inputs, cotangent)

    return [
        one(f"{pattern}, forward", forward(tiles), forward(masked), 1e-5, repeats),
        one(f"{pattern}, forward + backward", trained(tiles), trained(masked), 1e-4, max(3, repeats // 2)),
    ]


def one(name: str, ours: Run, theirs: Run, tolerance: float, repeats: int) -> Case:
    return contest(name, {"tiles": ours, "SDPA with mask": theirs}, theirs, tolerance=tolerance, repeats=repeats)


if __name__ == "__main__":
    main()
