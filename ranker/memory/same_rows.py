"""Whether a newer preparation gives every id that histories are embedded by the row that the model was trained with."""

from __future__ import annotations

from pathlib import Path

from features.dataset import Dataset, read_arrow
from features.errors import UserError
from features.selection import Feature, FeatureSpec
from features.table_rows import refuse_other_meaning, same_numbers
from ranker.run import Run, codebooks_of


def dataset_at(root: Path | None, run: Run, spec: FeatureSpec, own: Dataset) -> Dataset:
    """The dataset whose users are meant: a newer preparation, or the run's own.

    Raises:
        UserError: its rows are others than the run's.
    """
    if root is None:
        return own
    dataset = Dataset(root)
    refuse_other_rows(run, spec, own, dataset)
    return dataset


def refuse_other_rows(run: Run, spec: FeatureSpec, older: Dataset, newer: Dataset) -> None:
    """Raise UserError where a feature of histories has other rows in the newer dataset than in the run's.

    Equal vocabularies (:meth:`features.dataset.Dataset.vocabulary_hash`) are more than is needed: users, and columns of
    requests and candidates, may be numbered anew, and items may come that training does not know.
    """
    remedy = (
        f"train on it first (`ranker train … --set dataset={newer.root} --from {run.root}`), and build that run's "
        "memories"
    )
    _refuse_missing(spec, newer, remedy)
    features = (*spec.sequence, *spec.event, *spec.event_dense, *spec.codes, *spec.content)
    refuse_other_meaning(features, older, newer)
    changed = [f.name for f in (*spec.sequence, *spec.event, *spec.codes) if not _same_rows(f, older, newer)]
    if spec.content and not _same_items(older, newer, known=False):
        changed += [f.name for f in spec.content]  # a table of every item's vector, by the dense index
    before, now = (codebooks_of(run.config, dataset) for dataset in (older, newer))
    changed += [f"semantic IDs {name!r}" for name in before if now.get(name) != before[name]]
    if changed:
        raise UserError(
            f"{newer.root}: {', '.join(dict.fromkeys(changed))}: numbered or made otherwise than in {older.root}, "
            f"which {run.root} was trained on, so that its tables do not know them; {remedy}. A preparation with the "
            "same training period and columns keeps the rows"
        )


def _refuse_missing(spec: FeatureSpec, newer: Dataset, remedy: str) -> None:
    for feature in (*spec.sequence, *spec.event, *spec.event_dense, *spec.codes, *spec.content):
        columns = newer.manifest.columns.get(feature.scope, {})
        if feature.name != "item" and feature.name.removeprefix(f"{feature.scope}.") not in columns:
            raise UserError(
                f"{newer.root}: no column {feature.name}, which histories are embedded by; prepare it with that column "
                f"(and `ranker sids apply` where it is of semantic IDs), or {remedy}"
            )


def _same_rows(feature: Feature, older: Dataset, newer: Dataset) -> bool:
    if feature.name == "item":
        return _same_items(older, newer, known=True)
    return same_numbers(feature, older, newer)


def _same_items(older: Dataset, newer: Dataset, known: bool) -> bool:
    """Whether items have the same dense index: those that training knows, or all."""
    if known and ("item" in older.manifest.hashed_ids or "item" in newer.manifest.hashed_ids):
        buckets = [hashed and hashed.buckets for hashed in (d.manifest.hashed_ids.get("item") for d in (older, newer))]
        return buckets[0] == buckets[1]
    counts = [dataset.manifest.known_items if known else dataset.manifest.items for dataset in (older, newer)]
    if counts[0] != counts[1]:
        return False
    before, now = (
        read_arrow(dataset.root / "vocabularies" / "item.arrow").column("value") for dataset in (older, newer)
    )
    return bool(before.slice(0, counts[0] - 1).equals(now.slice(0, counts[1] - 1)))
