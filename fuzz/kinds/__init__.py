"""The cases: random calls and what they must give, a module an operator."""
