"""The implementations of recur."""
