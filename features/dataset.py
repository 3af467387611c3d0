"""A dataset folder on disk: its layout, its manifest, and memory-mapped access to its parts.

Layout::

    manifest.json                    written last; a folder without it is not a dataset
    items.arrow                      one row per dense item index; row 0 is the reserved, unknown item
    vocabularies/SCOPE.NAME.arrow    columns `value`, `index`; index 0 is reserved and not listed; none where hashed
    vocabularies/item.arrow, vocabularies/user.arrow      raw id → dense index, all rows; none of hashed users
    semantic_ids/NAME-HASH.arrow     codes of a codebook, one row per dense item index; more columns of the item table
    semantic_ids/NAME-HASH.safetensors  its codewords
    partitions/00000/histories.arrow one row per user, the whole event log sorted by time
    partitions/00000/requests.arrow  one row per request, sorted by (split, history row, time)

Every Arrow file is an uncompressed IPC file of exactly one record batch, so that columns are views of the
memory map. Column names carry their scope: ``item.genre``, ``user.device``, ``event.rating``, ``request.x``,
``candidate.age``, ``label.click``, ``oracle.click``.

Dense item indices are ordered so that no look-up is needed to tell known from unknown: 1 … `known_items` − 1 are the
vocabulary (most frequent first), larger ones occur only outside the training period. The same holds for users.

Where items' or users' ids are hashed (:mod:`features.hashing`), the dense index still names them; the row that the
feature `item` or `user` reads is in the column ``bucket`` of the item table or of histories.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from features.errors import UserError
from features.hashing import FUNCTION
from features.schema import SPLITS, Kind, Split

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class DatasetError(UserError):
    """A dataset folder that cannot be used; the message says why and what to do."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HashInfo(_Record):
    """Ids that became rows by a hash (:mod:`features.hashing`), and how many of them met in one."""

    function: Literal["md5_64"] = FUNCTION
    buckets: int
    """rows beside row 0"""
    ids: int
    """distinct ids of the logs"""
    sharing: int
    """those of them whose row is another's too"""


class ColumnInfo(_Record):
    """One stored column: `size` counts ids including the reserved 0 (categorical, bag); `dim` floats (vector);
    `codebook` names the semantic IDs it belongs to; `hashed` is there where the values have no vocabulary."""

    kind: Kind
    size: int = 0
    dim: int = 0
    codebook: str | None = None
    hashed: HashInfo | None = None


class CodebookInfo(_Record):
    """Semantic IDs in the item table, made by ``ranker sids apply``."""

    version: str
    content_hash: str
    """of the codebook: two with the same one give equal content equal codes"""
    levels: list[int]
    """codes of each level; columns hold code + 1, and 0 for an item without content"""
    dim: int
    """width of the codewords"""
    file: str
    """path below the dataset, without suffix"""
    without_code: dict[str, int]
    """items without content, in all and among the distinct candidates of each split"""
    impressions_without_code: dict[Split, tuple[int, int]] = {}
    """impressions of such items, and all, of each split"""


class SplitInfo(_Record):
    """Counts of one split; times in milliseconds; `positives` by label name."""

    requests: int
    impressions: int
    users: int
    first_ms: int
    last_ms: int
    positives: dict[str, int]
    unknown_items: int = 0
    """candidates whose item is outside the vocabulary"""
    unknown: dict[str, tuple[int, int]] = {}
    """ids outside their vocabulary, and all ids, by feature that has one and may lack some (`user`, `item`,
    ``SCOPE.NAME``): users and requests count once a request, items and candidates once an impression"""


class PartitionInfo(_Record):
    """One user-hash partition; `requests` gives each split's half-open row range in requests.arrow."""

    histories: int
    events: int
    requests: dict[Split, tuple[int, int]]
    impressions: dict[Split, int]


class Manifest(_Record):
    """What the dataset holds. `content_hash` covers every file and the schema, not paths or times of day."""

    format_version: int
    name: str
    content_hash: str
    items: int
    """rows of the item table, including row 0"""
    known_items: int
    """rows an item embedding table needs, including row 0; larger indices are unknown to training"""
    users: int
    known_users: int
    events: int
    columns: dict[str, dict[str, ColumnInfo]]
    """by scope, then name"""
    hashed_ids: dict[Literal["user", "item"], HashInfo] = {}
    """of the users' and items' ids, where they are hashed"""
    labels: list[str]
    oracles: list[str]
    """labels whose true probability is stored beside them (generated data only)"""
    splits: dict[Split, SplitInfo]
    partitions: list[PartitionInfo]
    dropped: dict[str, int]
    """rows left out, by reason"""
    counted: dict[str, int] = {}
    """other findings that lose no row, by what was found"""
    codebooks: dict[str, CodebookInfo] = {}
    """semantic IDs by name; not part of the content hash"""
    config: dict[str, object]
    """the resolved prepare config"""
    versions: dict[str, str]

    def filled_splits(self) -> list[Split]:
        """Splits that have requests, in the order train, valid, test."""
        return [split for split in SPLITS if split in self.splits and self.splits[split].requests]

    def id_rows(self, kind: Literal["user", "item"]) -> int:
        """Rows of a table of users' or items' ids, row 0 included."""
        if kind in self.hashed_ids:
            return self.hashed_ids[kind].buckets + 1
        return self.known_items if kind == "item" else self.known_users

    def hashed(self, feature: str) -> HashInfo | None:
        """How the ids of a feature (`user`, `item` or ``SCOPE.NAME``) are hashed; None where they are not."""
        if feature == "user" or feature == "item":
            return self.hashed_ids.get(feature)
        scope, _, name = feature.partition(".")
        return self.columns[scope][name].hashed

    def codebooks_behind(self, features: Iterable[str]) -> dict[str, CodebookInfo]:
        """The codebooks whose columns are among `features` (``item.NAME``), by name."""
        columns = (self.columns.get("item", {}).get(name.removeprefix("item.")) for name in features)
        used = {column.codebook for column in columns if column is not None and column.codebook is not None}
        return {name: self.codebooks[name] for name in sorted(used)}


def partition_dir(root: Path, partition: int) -> Path:
    """Folder of one partition."""
    return root / "partitions" / f"{partition:05d}"


def write_arrow(table: pa.Table, path: Path) -> None:
    """Write `table` as one uncompressed record batch."""
    batches = table.combine_chunks().to_batches()
    batch = batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_batch(batch)


def read_arrow(path: Path, made_by: str = "ranker prepare") -> pa.RecordBatch:
    """Memory-map a file of :func:`write_arrow`; columns are views of the map.

    Raises:
        DatasetError: the file is missing, truncated or not of one record batch.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except (OSError, pa.ArrowInvalid) as error:
        raise DatasetError(f"{path}: unreadable ({error}); run `{made_by}` again") from error
    if len(batches) != 1:
        raise DatasetError(f"{path}: {len(batches)} record batches, expected 1; run `{made_by}` again")
    return batches[0]


def hash_files(root: Path, schema: object) -> str:
    """SHA-256 over the JSON of `schema` and every file below `root` but the manifest, by relative path."""
    digest = hashlib.sha256(json.dumps(schema, sort_keys=True).encode())
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.name != MANIFEST):
        digest.update(str(path.relative_to(root)).encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class Dataset:
    """A prepared dataset, opened. Files are mapped on demand.

    Raises:
        DatasetError: no manifest (not a dataset, or a preparation that did not finish), or another format version.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        path = self.root / MANIFEST
        if not path.is_file():
            raise DatasetError(
                f"{self.root}: no {MANIFEST}; not a dataset folder, or its preparation did not finish: "
                "run `ranker prepare`"
            )
        try:
            raw = json.loads(path.read_text())
            version = raw.get("format_version")
            if version == FORMAT_VERSION:
                self.manifest = Manifest.model_validate(raw)
        except (ValueError, AttributeError) as error:
            raise DatasetError(f"{path}: not a manifest ({error}); run `ranker prepare` again") from error
        if version != FORMAT_VERSION:
            raise DatasetError(
                f"{path}: format_version {version}, this version reads {FORMAT_VERSION}: run `ranker prepare` again"
            )

    def items(self) -> pa.RecordBatch:
        """The item table: row = dense item index; columns ``id`` and ``item.NAME``, semantic IDs included; ``bucket``
        int32 where items are hashed."""
        items = read_arrow(self.root / "items.arrow")
        for info in self.manifest.codebooks.values():
            path = self.root / f"{info.file}.arrow"
            codes = read_arrow(path, "ranker sids apply")
            if codes.num_rows != items.num_rows:
                raise DatasetError(
                    f"{path}: {codes.num_rows} rows, the item table has {items.num_rows}; run `ranker sids apply` again"
                )
            for name, column in zip(codes.schema.names, codes.columns, strict=True):
                items = items.append_column(name, column)
        return items

    def codewords(self, codebook: str) -> list[npt.NDArray[np.float32]]:
        """`[K_l, dim]` of each level of a codebook whose codes the item table has.

        Raises:
            DatasetError: it has not, or the file is missing.
        """
        if codebook not in self.manifest.codebooks:
            have = ", ".join(self.manifest.codebooks) or "none"
            raise DatasetError(
                f"{self.root}: no semantic IDs {codebook!r}; it has {have}: run `ranker sids apply CODEBOOK`"
            )
        info = self.manifest.codebooks[codebook]
        path = self.root / f"{info.file}.safetensors"
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise DatasetError(f"{path}: unreadable ({error}); run `ranker sids apply` again") from error
        return [tensors[f"level_{level}"] for level in range(1, len(info.levels) + 1)]

    def values_of(self, column: str, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.object_]:
        """What the ids of a categorical column (``SCOPE.NAME``) stand for; the ids themselves where that is not kept,
        as of buckets and codes."""
        path = self.root / "vocabularies" / f"{column}.arrow"
        if not path.is_file():
            return ids.astype(object)
        values = [None, *read_arrow(path).column("value").to_pylist()]
        return np.array([values[i] for i in ids.tolist()], object)

    def histories(self, partition: int) -> pa.RecordBatch:
        """One row per user: ``user`` int32 (dense index), ``item`` list<int32>, ``time`` list<int64> (ms),
        ``event.NAME`` lists, ``user.NAME``; ``bucket`` int32 where users are hashed."""
        return read_arrow(partition_dir(self.root, partition) / "histories.arrow")

    def requests(self, partition: int) -> pa.RecordBatch:
        """One row per request: ``row`` int32 (its row of histories), ``history_end`` int32 (events of that row
        before the request), ``time`` int64 (ms), ``items`` list<int32>, ``request.NAME``, ``candidate.NAME`` lists,
        ``label.NAME`` and ``oracle.NAME`` list<float32>."""
        return read_arrow(partition_dir(self.root, partition) / "requests.arrow")

    def vocabulary_hash(self) -> str:
        """SHA-256 over the vocabularies and the rules of hashed ids: two datasets with the same one give every id the
        same row."""
        hashed = {kind: info.buckets for kind, info in self.manifest.hashed_ids.items()}
        for scope, columns in self.manifest.columns.items():
            hashed |= {f"{scope}.{name}": info.hashed.buckets for name, info in columns.items() if info.hashed}
        digest = hashlib.sha256(json.dumps({FUNCTION: hashed}, sort_keys=True).encode() if hashed else b"")
        for path in sorted((self.root / "vocabularies").iterdir()):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()
