"""Foveate's attention on a CPU against what PyTorch offers there, in the cases that its kernels are made for.

    python -m benchmarks.attend_cpu                              everything: a quarter of an hour
    python -m benchmarks.attend_cpu --case swin --case decode    two groups of cases
    python -m benchmarks.attend_cpu --quick                      small sizes, to see that it works

Every contender is first held against float64. After each case the groups measured so far are brought up to date in
the JSON; at the end the plot is drawn again.
"""

from __future__ import annotations

from benchmarks.attend_cpu_groups import GROUPS
from benchmarks.attend_cpu_measure import measure
from benchmarks.suite import Suite
from benchmarks.titles import ATTEND
from foveate.attention import ATTEND as OPERATOR

SUITE = Suite("attend_cpu", __doc__.split("\n")[0], GROUPS, ATTEND, measure, OPERATOR.names, "native")
main = SUITE.run


if __name__ == "__main__":
    main()
