"""The command."""

from runner.cli.command import main

__all__ = ["main"]
