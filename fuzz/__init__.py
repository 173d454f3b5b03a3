"""A fuzzer of the operators and mixers: random calls against plain definitions in float64.

``make fuzz MINUTES=10`` or ``python -m fuzz --help``. A case is a function of a kind and a seed alone; what it finds
it raises as :class:`fuzz.judge.Disagreement`. See docs/architecture.md, "How it is kept right".
"""
