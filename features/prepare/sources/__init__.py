"""Adapters: from the files of one kind of source to the tables of :mod:`features.prepare.sources.tables`."""

from __future__ import annotations

from pathlib import Path

from features.prepare.engine import Engine
from features.prepare.errors import PrepareError
from features.prepare.sources.ebnerd import open_ebnerd
from features.prepare.sources.kuairand import open_kuairand
from features.prepare.sources.logs import open_logs
from features.prepare.sources.recbole import open_recbole
from features.prepare.sources.tables import Logs
from features.schema import EbnerdSource, KuaiRandSource, LogsSource, RecBoleSource, Source, SyntheticSource


def open_source(engine: Engine, source: Source, work: Path) -> Logs:
    """Open a source's tables; `work` is a folder for what has to be generated first.

    Raises:
        PrepareError: a file or key column is missing, unreadable or of a wrong type.
    """
    if not isinstance(source, LogsSource | SyntheticSource) and not source.path.is_dir():
        raise PrepareError(f"{source.path}: no such folder; check source.path")
    match source:
        case LogsSource():
            return open_logs(engine, source)
        case RecBoleSource():
            return open_recbole(engine, source)
        case EbnerdSource():
            return open_ebnerd(engine, source)
        case KuaiRandSource():
            return open_kuairand(engine, source)
        case SyntheticSource():
            from features.prepare.synthetic import generate

            return open_logs(engine, generate(source, work / "synthetic"))
