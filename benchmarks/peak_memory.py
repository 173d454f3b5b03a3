"""Peak memory of one call, in a process of its own: what `row_claims` starts for each case.

python -m benchmarks.peak_memory native 8192     bytes beyond the inputs, of forward and backward
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch

from foveate import attend, causal


def peak() -> int:
    """The most bytes this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def attend_once(impl: str, tokens: int) -> None:
    qkv = [torch.randn(1, 2, tokens, 64, requires_grad=True) for _ in range(3)]
    attend(*qkv, causal, impl=impl).sum().backward()


def measured(impl: str, tokens: int) -> int:
    """Bytes that forward and backward take at their peak, gradients included, inputs left out."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", impl, str(tokens)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    impl, tokens = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    attend_once(impl, 128)  # libraries are loaded, kernels found
    qkv = [torch.randn(1, 2, tokens, 64, requires_grad=True) for _ in range(3)]
    before = peak()
    attend(*qkv, causal, impl=impl).sum().backward()
    print(peak() - before)


if __name__ == "__main__":
    main()
