"""The `foveate` command. Nothing heavy is imported before a command runs."""

from foveate.cli.app import app, main

__all__ = ["app", "main"]
