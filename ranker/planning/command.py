"""``ranker plan``: which rank would hold what of a run's tables on a cluster that one need not have."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console

from features.dataset import Dataset
from features.selection import resolve
from ranker.config import TrainConfig
from ranker.planning.cluster import Cluster
from ranker.planning.estimate import estimate
from ranker.planning.misfit import DoesNotFit
from ranker.planning.question import Question, read_rows
from ranker.planning.remedies import remedies
from ranker.planning.report import content_of, needs, show, show_remedies
from ranker.ranks import quiet_libraries


def plan(config: TrainConfig, cluster: Cluster, rows: Sequence[str] = (), as_json: bool = False) -> None:
    """Print the plan of a run's tables, or what would make it possible.

    Args:
        rows: ``FEATURE=ROWS``, for vocabularies that are to be of another size than the dataset's.

    Raises:
        UserError: no plan is possible, or a config that does not fit the dataset.
    """
    quiet_libraries()
    dataset = Dataset(config.dataset)
    spec = resolve(config.features, dataset.manifest)
    question = Question(config, dataset, cluster, read_rows(rows, spec))
    console = Console()
    try:
        placement = question.answer()
    except DoesNotFit as error:
        ways = remedies(question, error)
        if as_json:
            print(
                json.dumps({"fits": False, "reason": str(error), "remedies": [way._asdict() for way in ways]}, indent=2)
            )
        else:
            show_remedies(ways, console)
        raise DoesNotFit(f"the tables do not fit: {error}", error.room, error.misfits) from error
    found = estimate(placement, question.group.ranks)
    if as_json:
        print(json.dumps(content_of(question, placement, found), indent=2))
    else:
        show(question, placement, found, console)
        for need in needs(question):
            console.print(f"before training: {need}", highlight=False, soft_wrap=True)
