"""The recipe tier: what makes another model of a pretrained one, and trains it."""
