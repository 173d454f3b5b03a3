"""Foveate's recurrences on a CPU against what transformers, flash-linear-attention and plain PyTorch do there.

    python -m benchmarks.recur_cpu                                 everything
    python -m benchmarks.recur_cpu --case delta --case layers      two groups of cases
    python -m benchmarks.recur_cpu --quick                         small sizes, to see that it works

Every contender is first held against float64: outputs, or gradients, of some heads and channels, at every token. After
each case the groups measured so far are brought up to date in the JSON; at the end the plot is drawn again.

Operations are counted for each number of the state and each token: 1 to let it fade, 2 to write, 2 to read, 2 more for
the delta rule and for a low-rank transition, 10 for the exponential of a selective scan; a backward pass counts twice.
"""

from __future__ import annotations

from benchmarks.recur_cpu_groups import GROUPS, conclude
from benchmarks.recur_cpu_measure import measure
from benchmarks.suite import Suite
from benchmarks.titles import RECUR

IMPLS = ("auto", "native", "chunks", "reference")
SUITE = Suite("recur_cpu", __doc__.split("\n")[0], GROUPS, RECUR, measure, IMPLS, "auto", conclude)
main = SUITE.run


if __name__ == "__main__":
    main()
