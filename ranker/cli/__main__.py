"""``python -m ranker.cli``: the `ranker` command, as launchers start it."""

from ranker.cli import main

main()
