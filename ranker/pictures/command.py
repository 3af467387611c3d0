"""`ranker picture RUN --out FOLDER`: a picture of each long-sequence block of a trained run, for one request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from matplotlib.figure import Figure

from features.batch import from_tensors
from features.errors import UserError
from features.loader import Loader
from features.progress import log
from features.schema import Split
from features.selection import resolve
from ranker.blocks import Block
from ranker.config import TrainConfig
from ranker.config_blocks import UxSidConfig
from ranker.evaluate import restore
from ranker.evaluation.predict import scoring_loader, selection_of
from ranker.model import Ranker
from ranker.pictures import hisac, hytrec, uxsid
from ranker.pictures.canvas import save
from ranker.pictures.shown import Shown, choose, show
from ranker.ranks import Ranks, join_ranks
from ranker.run import Run

DRAWN: dict[str, Callable[[Block, Shown], Figure]] = {"uxsid": uxsid.draw, "hisac": hisac.draw, "hytrec": hytrec.draw}
"""what draws a block, by its `type`"""


def picture(run_root: Path, out: Path, split: Split = "test", request: int | None = None) -> list[Path]:
    """Draw every block of a run that has a picture, as ``INDEX-TYPE-SPLIT-REQUEST.png`` below `out`.

    Args:
        request: its place in the split, in file order; None: see :func:`ranker.pictures.shown.choose`.

    Raises:
        UserError: no run, no block with a picture, no such split or request, or a request without history.
    """
    run = Run(run_root)
    kinds = [block.type for block in run.config.model.long]
    if not set(kinds) & set(DRAWN):
        have = ", ".join(kinds) or "no block"
        raise UserError(f"{run.root}: model.long has {have}; there are pictures of {', '.join(DRAWN)}")
    with join_ranks("cpu", run.config.training.threads) as ranks:
        ranker, shown = open_request(run, split, request, ranks)
        paths: list[Path] = []
        for index, kind in enumerate(kinds):
            if kind in DRAWN:
                path = out / f"{index}-{kind}-{split}-{shown.number}.png"
                save(DRAWN[kind](cast(Block, ranker.dense.long[index]), shown), path)
                log(f"written to {path}")
                paths.append(path)
    return paths


def open_request(run: Run, split: Split, request: int | None, ranks: Ranks) -> tuple[Ranker, Shown]:
    """The run's ranker with its best checkpoint, and a request as it embeds it.

    Raises:
        UserError: no such split or request, or the request has no history.
    """
    dataset = run.dataset()
    spec = resolve(run.config.features, dataset.manifest)
    config = run.config.model_copy(update={"loader": run.config.loader.model_copy(update={"requests": 1})})
    loader = scoring_loader(config, dataset, split, selection_of(config, dataset, spec), ranks)
    number = choose(dataset, split, _group(config)) if request is None else _existing(request, loader, split)
    batch = from_tensors(spec, loader.epoch(0)[number])
    if int(batch.end) == int(batch.start):
        raise UserError(f"--request {number}: it has no history; choose another, or leave the choice to the command")
    ranker = cast(Ranker, restore(run, ranks).eval().module)
    return ranker, show(ranker, batch, spec, dataset, split, number)


def _existing(request: int, loader: Loader, split: Split) -> int:
    if not 0 <= request < loader.steps():
        raise UserError(f"--request {request}: {split} has the requests 0 … {loader.steps() - 1:,}")
    return request


def _group(config: TrainConfig) -> str:
    """What the candidates of a request should differ in: what UxSID probes with, else the first code, else the item."""
    probes = [block.probe for block in config.model.long if isinstance(block, UxSidConfig)]
    return [*probes, *config.features.codes, "item"][0]
