"""Scored impressions on disk: the columns of :class:`~ranker.evaluation.metrics.Predictions` as Parquet."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from features.errors import UserError
from ranker.evaluation.metrics import Predictions


def write_predictions(predictions: Predictions, path: Path) -> None:
    """Write aside, then rename. Scores keep their precision, so that metrics of the file are those of the run."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(pa.table({name: pa.array(column) for name, column in predictions.columns().items()}), aside)
    os.replace(aside, path)


def read_predictions(path: Path) -> Predictions:
    """What :func:`write_predictions` wrote.

    Raises:
        UserError: there is no such file.
    """
    if not path.is_file():
        raise UserError(f"{path}: does not exist; write it with `ranker evaluate {path.parent} --predictions`")
    table = pq.read_table(path)
    return Predictions(**{name: table.column(name).to_numpy() for name in table.column_names})
