"""``ranker requests``: requests of a split in a file, with the scores a server should give."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from features.schema import Split
from ranker.doctor import ensure_versions


def requests(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder made by `ranker train`")],
    out: Annotated[Path, typer.Option(help="safetensors file to make")],
    split: Annotated[Split, typer.Option(help="split of the dataset")] = "test",
    requests: Annotated[int, typer.Option(min=1, help="how many, from the split's beginning")] = 100,
) -> None:
    """Write requests as exported models read them, with the trainer's scores: to try a server on."""
    ensure_versions()
    from ranker.requests_file import write_requests

    write_requests(run, split, requests, out)
