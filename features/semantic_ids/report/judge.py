"""Judge a codebook on all items of a dataset: one pass over them, then the figures, pictures and projector files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ValidationError

from features.dataset import Dataset
from features.errors import did_you_mean
from features.semantic_ids.codebook import Codebook
from features.semantic_ids.coding import Coded
from features.semantic_ids.config import SidsReportConfig
from features.semantic_ids.errors import SidsError
from features.semantic_ids.quantizers.protocol import Codes, Floats
from features.semantic_ids.report import (
    CodebookMeter,
    SidsReport,
    column_agreement,
    cooccurrence,
    make_report,
    neighbour_agreement,
    partial_reconstructions,
)
from features.semantic_ids.report.plots import plot_leaves, plot_projection, plot_usage
from features.semantic_ids.report.projector import write_projector
from features.semantic_ids.training_events import training_histories
from features.views import Ints

REPORT = "report.json"


def check_columns(config: SidsReportConfig, dataset: Dataset) -> None:
    """Refuse, before any work, columns that codes cannot be held against.

    Raises:
        SidsError: a column that the dataset does not have, or that is not categorical.
    """
    columns = dataset.manifest.columns["item"]
    usable = sorted(f"item.{name}" for name, column in columns.items() if column.kind == "categorical")
    for i, name in enumerate(config.columns):
        if name not in usable:
            hint = did_you_mean(name, usable)
            raise SidsError(
                f"report.columns[{i}]: {name!r} is no categorical item column of {dataset.root}{hint} It has: "
                f"{', '.join(usable) or 'none'}"
            )


def judge(codebook: Codebook, dataset: Dataset, coded: Iterator[Coded], folder: Path) -> SidsReport:
    """Write ``report.json``, plots and projector files into the codebook's folder; the report."""
    config, items = codebook.config.report, dataset.manifest.items
    meter = CodebookMeter(codebook.config.levels)
    codes = np.full((items, len(codebook.config.levels)), -1, np.int32)  # of all items, without content -1
    sample = _Sample(np.random.default_rng(codebook.config.seed).random(items, np.float32), config.sample)
    for some in coded:
        codes[some.rows] = some.codes
        meter.update(some.codes, some.vectors, partial_reconstructions(codebook.quantizer, some.codes))
        sample.add(some.rows, some.vectors)
    table = dataset.items()
    categories = {name: table.column(name).to_numpy(zero_copy_only=False) for name in config.columns}
    found = codes[:, 0] >= 0
    report = make_report(
        codebook.config.name,
        meter,
        items_without_content=items - 1 - meter.items,
        neighbours=neighbour_agreement(codes[sample.rows], sample.vectors, config.neighbours, meter.items),
        columns=[
            column_agreement(name, codes[found], values[found], codebook.config.seed)
            for name, values in categories.items()
        ],
        cooccurrence=cooccurrence(training_histories(dataset, config.events), codes, config.window)
        if config.events
        else None,
    )
    (folder / REPORT).write_text(report.model_dump_json(indent=2) + "\n")
    if config.pictures:
        shown = {name: dataset.values_of(name, values[sample.rows]) for name, values in categories.items()}
        # counted from 1, as the item table has them
        _draw(meter, sample, codes[sample.rows] + 1, table.column("id"), shown, folder)
    return report


def _draw(
    meter: CodebookMeter,
    sample: _Sample,
    codes: Codes,
    ids: pa.Array,
    columns: dict[str, npt.NDArray[Any]],
    folder: Path,
) -> None:
    """Plots of all items and of the sample, and the sample for the projector."""
    plots = folder / "report"
    plots.mkdir()
    plot_usage(meter.counts(), plots / "usage.png")
    plot_leaves(meter.leaf_sizes(), plots / "leaves.png")
    plot_projection(sample.vectors, codes, plots / "projection.png")
    names = ids.take(pa.array(sample.rows)).to_numpy(zero_copy_only=False)
    write_projector(folder / "projector", sample.vectors, names, codes, columns)


def read_report(folder: Path) -> SidsReport:
    """The report of a codebook.

    Raises:
        SidsError: there is none, or it is of another version.
    """
    path = folder / REPORT
    try:
        return SidsReport.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise SidsError(f"{path}: unreadable ({error}); fit the codebook again") from error


class _Sample:
    """The items of lowest priority that came by, at most `most`: a fair sample of those with content.

    Args:
        priority: `[items]`, random.
    """

    def __init__(self, priority: Floats, most: int) -> None:
        self._priority, self._most = priority, most
        self.rows: Ints = np.zeros(0, np.int64)
        self.vectors: Floats = np.zeros((0, 0), np.float32)

    def add(self, rows: Ints, vectors: Floats) -> None:
        """Take in more items."""
        rows = np.concatenate([self.rows, rows])
        vectors = np.concatenate([self.vectors, vectors]) if self.vectors.size else vectors
        kept = np.sort(np.argsort(self._priority[rows], kind="stable")[: self._most])
        self.rows, self.vectors = rows[kept], vectors[kept]
