"""What is asked of ``ranker plan``: a run's config, its dataset as large as it may grow, and a cluster."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from features.dataset import Dataset, Manifest
from features.errors import UserError, did_you_mean
from features.selection import FeatureSpec, resolve
from ranker.config import TrainConfig
from ranker.model import Ranker
from ranker.planning.cluster import Cluster
from ranker.planning.placement import Placement, place
from ranker.planning.reads import reads_of
from ranker.run import codewords_of
from ranker.tables.managed_collision import refuse_unmanageable
from ranker.tables.sharding import declare_optimizers
from ranker.training.trainer import build

_UNITS = {"KB": 10, "MB": 20, "GB": 30, "TB": 40, "KIB": 10, "MIB": 20, "GIB": 30, "TIB": 40}
MOST_ROWS = 2**31 - 1
"""ids are stored as 32-bit integers"""


@dataclass(frozen=True)
class Question:
    """One placement to be found. rows: of features that are to have others than in the dataset."""

    config: TrainConfig
    dataset: Dataset
    cluster: Cluster
    rows: Mapping[str, int]

    @property
    def group(self) -> Cluster:
        """The ranks among which the tables are sharded; all, or those of one replica.

        Raises:
            UserError: `tables.replicas` does not divide the cluster.
        """
        return self.cluster.group(self.config.tables.replicas)

    def ranker(self) -> Ranker:
        """The model, without its tables' memory.

        Raises:
            UserError: a config that does not fit the dataset.
        """
        spec = self._spec()
        refuse_unmanageable(self.config.tables, spec, grown(self.dataset.manifest, self.rows))
        model = build(spec, self.config, {}, codewords_of(self.config, self.dataset))
        declare_optimizers(model, self.config.tables)
        return model

    def answer(self, thorough: bool = True) -> Placement:
        """Where its tables go; see :func:`place`.

        Raises:
            ShardingError: one does not fit the cluster, or cannot be sharded as the config says.
            UserError: a config that does not fit the dataset.
        """
        reads = reads_of(self.config, self.dataset, self._spec(), self.cluster.ranks)
        return place(self.ranker(), self.config.tables, self.group, reads, thorough)

    def _spec(self) -> FeatureSpec:
        return resolve(self.config.features, grown(self.dataset.manifest, self.rows))


def grown(manifest: Manifest, rows: Mapping[str, int]) -> Manifest:
    """The manifest of a dataset whose vocabularies have other sizes; all else, its lengths and rates, stays.

    Content vectors are of all items, known and unknown: there remain as many unknown ones.
    """
    columns = {scope: dict(of_scope) for scope, of_scope in manifest.columns.items()}
    hashed = dict(manifest.hashed_ids)
    changed: dict[str, object] = {"columns": columns, "hashed_ids": hashed}
    for name, count in rows.items():
        if name in hashed:
            kind: Literal["user", "item"] = "item" if name == "item" else "user"
            hashed[kind] = hashed[kind].model_copy(update={"buckets": count - 1})
        elif name == "item":
            changed |= {"known_items": count, "items": count + manifest.items - manifest.known_items}
        elif name == "user":
            changed |= {"known_users": count, "users": count + manifest.users - manifest.known_users}
        else:
            scope, _, column = name.partition(".")
            columns[scope][column] = columns[scope][column].model_copy(update={"size": count})
    return manifest.model_copy(update=changed)


def read_rows(given: Sequence[str], spec: FeatureSpec) -> dict[str, int]:
    """``NAME=ROWS`` of features that a model reads through tables; ROWS may be ``1e9``.

    Raises:
        UserError: no such feature, or no number of rows.
    """
    ids = (*spec.request, *spec.candidate, *spec.sequence, *spec.event)
    choices = sorted({feature.name for feature in ids} | ({"item"} if spec.content else set()))
    rows: dict[str, int] = {}
    for text in given:
        name, equals, number = text.partition("=")
        if not equals:
            raise UserError(f"--rows {text}: must have the form FEATURE=ROWS, such as item=1e9")
        if name not in choices:
            hint = did_you_mean(name, choices)
            raise UserError(f"--rows {text}: the model has no table of {name!r}{hint} It has {', '.join(choices)}")
        rows[name] = _count(text, number)
    return rows


def _count(text: str, number: str) -> int:
    try:
        count = float(number.replace("_", ""))
    except ValueError:
        count = 0.0
    if not 1 <= count <= MOST_ROWS or count != int(count):
        raise UserError(f"--rows {text}: {number!r} is no number of rows; give a whole one from 1 to {MOST_ROWS:,}")
    return int(count)


def read_bytes(option: str, text: str) -> int:
    """Bytes of ``80GB``. A GB is 2^30 bytes, as memory is sold and as TorchRec counts.

    >>> read_bytes("--hbm", "80GB") == read_bytes("--hbm", "80 GiB") == 80 * 2**30
    True
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    count = round(float(found[1]) * 2 ** _UNITS[found[2].upper()]) if found else 0
    if count <= 0:
        raise UserError(f"{option} {text}: no amount of memory; give a number with its unit, such as 80GB")
    return count
