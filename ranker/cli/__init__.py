"""The command line: every command reads a config or a run, does one thing, and says what it did.

A command imports what it needs when it runs, so that help and `ranker doctor` are quick and work when torch does not.
What the user can put right is printed as one message, with exit code 2; `RANKER_TRACEBACK=1` shows where it came from.
"""

from ranker.cli.root import main

__all__ = ["main"]
