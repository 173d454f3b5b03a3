"""The implementations of ttt_linear and ttt_mlp."""
