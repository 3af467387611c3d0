"""Plans of the small model, by call and by command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from features.dataset import Dataset
from ranker import cli
from ranker.config import TrainConfig
from ranker.planning.cluster import Cluster
from ranker.planning.estimate import Estimate, estimate
from ranker.planning.question import Question

Plan = Callable[..., tuple[int, dict[str, Any], str]]

GPUS = Cluster("cuda", ranks=4, per_host=2, hbm_bytes=80 << 30)


def answer(config: TrainConfig, cluster: Cluster = GPUS, **rows: int) -> Estimate:
    """What is expected of a config's tables on a cluster."""
    question = Question(config, Dataset(config.dataset), cluster, rows)
    return estimate(question.answer(thorough=False), question.group.ranks)


@pytest.fixture
def plan(config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Plan:
    """`ranker plan` of the small model: its exit code, its JSON (or its text) and what it says on stderr."""

    def plan(*arguments: str, as_json: bool = True) -> tuple[int, dict[str, Any], str]:
        given = ["ranker", "plan", str(config_file), *arguments, *(["--json"] if as_json else [])]
        monkeypatch.setattr(sys, "argv", given)
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out and as_json else {"text": said.out}, said.err

    return plan
