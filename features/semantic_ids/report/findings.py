"""The figures in one object, with what is wrong about them in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from features.semantic_ids.report.figures import (
    ColumnAgreement,
    Cooccurrence,
    LevelReport,
    NeighbourAgreement,
    SidsReport,
)
from features.semantic_ids.report.meter import CodebookMeter

DEAD_SHARE = 0.2
"""a level with a larger share of dead codes is warned of"""


def make_report(
    name: str,
    meter: CodebookMeter,
    items_without_content: int,
    neighbours: NeighbourAgreement | None = None,
    columns: Sequence[ColumnAgreement] = (),
    cooccurrence: Cooccurrence | None = None,
) -> SidsReport:
    """The figures in one object, with what is wrong about them."""
    distinct, duplicates = meter.vectors()
    report = SidsReport(
        name=name,
        items=meter.items,
        items_without_content=items_without_content,
        distinct_vectors=distinct,
        duplicates=duplicates,
        levels=meter.levels(),
        leaves=meter.leaves(),
        neighbours=neighbours,
        columns=list(columns),
        cooccurrence=cooccurrence,
        warnings=[],
    )
    return report.model_copy(update={"warnings": list(_warnings(report))})


def _warnings(report: SidsReport) -> Iterator[str]:
    """Plain sentences: what is wrong, its figure, what to change."""
    without, items = report.items_without_content, report.items
    if without > items:
        yield f"{without:,} of {without + items:,} items have no content and share the reserved code: add content parts"
    if report.duplicates > 0.2 * items:
        yield (
            f"{report.duplicates:,} of {items:,} items have the same content vector as another, so that no code can "
            "tell them apart: add a content part in which they differ"
        )
    before = 1.0
    for level in report.levels:
        yield from _level_warnings(level, before, report)
        before = before if level.error is None else level.error
    combinations = float(np.prod([float(level.codes) for level in report.levels]))
    if items and report.leaves.unique < 0.5 and combinations >= 10 * items and report.duplicates < 0.5 * items:
        yield (
            f"only {report.leaves.unique:.1%} of the items have a semantic ID of their own although there are "
            f"{combinations:.3g} for {items:,} items: look at the levels' perplexity; where it is low, other content, "
            "more restarts (K-means) or more steps (RQ-VAE) spread the items better"
        )


def _level_warnings(level: LevelReport, before: float, report: SidsReport) -> Iterator[str]:
    """`before`: the error after the levels before it."""
    if level.codes - level.used > DEAD_SHARE * level.codes:
        few = level.codes > report.distinct_vectors
        why = f", and there are only {report.distinct_vectors:,} different content vectors" if few else ""
        yield (
            f"level {level.level}: {level.dead:.1%} of its {level.codes:,} codes are dead, no item has them{why}: "
            "fewer codes at this level (levels), more items, other content, or, for rqvae, a larger dead_below"
        )
    if level.largest > 0.5 and level.codes > 2:
        yield (
            f"level {level.level}: one code holds {level.largest:.1%} of the items: other content, or other weights of "
            "its parts, would spread them"
        )
    if level.error is not None and level.error > 0.99 * before:
        yield (
            f"level {level.level}: it leaves an error of {level.error:.4f} of the variance, {before:.4f} without it: "
            "leave this level out, or give it more codes; for rqvae, more steps"
        )
