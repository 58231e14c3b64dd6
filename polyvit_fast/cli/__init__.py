"""The command line: a file for each group of commands, and `commands.py`, which runs them."""

from polyvit_fast.cli.commands import COMMANDS, main, run

__all__ = ["COMMANDS", "main", "run"]
