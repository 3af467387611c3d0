"""``ranker sids apply``: a codebook's codes become columns of a dataset's item table.

For codes named ``sid``: ``item.sid_1`` … ``item.sid_M`` (code + 1; 0: no content), ``item.sid_path`` (bag of prefixes)
and ``item.sid_vector`` (the content vector in the codewords' space, zeros without content). They live in files beside
the item table; the manifest, replaced last and at once, names them. Until then the dataset is what it was.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.dataset import MANIFEST, CodebookInfo, ColumnInfo, Dataset, write_arrow
from features.publish import sync_path
from features.schema import Split
from features.semantic_ids.codebook import Codebook
from features.semantic_ids.coding import code_items
from features.semantic_ids.errors import SidsError
from features.semantic_ids.prefixes import Prefixes
from features.views import Partition

FOLDER = "semantic_ids"


def apply(codebook: Codebook, dataset: Dataset) -> CodebookInfo:
    """Code every item; codes of the same name are replaced.

    Raises:
        SidsError: the dataset lacks what the content is made of, has other columns of these names, is being changed,
            or cannot be written.
    """
    name = codebook.config.name
    with _alone(dataset.root):
        manifest = Dataset(dataset.root).manifest  # as it is now that no other changes it
        columns = _columns(codebook)
        own = manifest.columns["item"]
        for column in columns:
            if column in own and own[column].codebook != name:
                raise SidsError(
                    f"{dataset.root}: has a column item.{column} already, not of these semantic IDs; choose another "
                    f"`name` than {name!r} in the codebook's config"
                )
        file = f"{FOLDER}/{name}-{codebook.content_hash[:12]}"
        aside = dataset.root / FOLDER / ".partial"
        shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed: no other is here now
        aside.mkdir(parents=True)
        try:
            coded = _write_codes(codebook, dataset, aside / "codes.arrow")
            codebook.write_codewords(aside / "codewords.safetensors")
            items_without, impressions_without = _without_code(dataset, coded)
            info = CodebookInfo(
                version=codebook.version,
                content_hash=codebook.content_hash,
                levels=codebook.config.levels,
                dim=columns[f"{name}_vector"].dim,
                file=file,
                without_code=items_without,
                impressions_without_code=impressions_without,
            )
            kept = {n: c for n, c in own.items() if c.codebook != name}
            changed = manifest.model_copy(
                update={
                    "columns": manifest.columns | {"item": kept | columns},
                    "codebooks": manifest.codebooks | {name: info},
                }
            )
            (aside / MANIFEST).write_text(changed.model_dump_json(indent=2) + "\n")
            for path in aside.iterdir():
                sync_path(path)
            os.replace(aside / "codes.arrow", dataset.root / f"{file}.arrow")
            os.replace(aside / "codewords.safetensors", dataset.root / f"{file}.safetensors")
            sync_path(dataset.root / FOLDER)  # the manifest must not reach the disk before what it names
            os.replace(aside / MANIFEST, dataset.root / MANIFEST)
            sync_path(dataset.root)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        before = manifest.codebooks.get(name)
        if before is not None and before.file != file:
            for suffix in (".arrow", ".safetensors"):
                (dataset.root / f"{before.file}{suffix}").unlink(missing_ok=True)
    return info


def _columns(codebook: Codebook) -> dict[str, ColumnInfo]:
    """What the manifest says of the new columns."""
    config = codebook.config
    levels = {
        f"{config.name}_{level}": ColumnInfo(kind="categorical", size=codes + 1, codebook=config.name)
        for level, codes in enumerate(config.levels, 1)
    }
    path = ColumnInfo(kind="bag", size=Prefixes(config.levels, config.path_buckets).size, codebook=config.name)
    vector = ColumnInfo(kind="vector", dim=codebook.codewords()[0].shape[1], codebook=config.name)
    return {**levels, f"{config.name}_path": path, f"{config.name}_vector": vector}


def _write_codes(codebook: Codebook, dataset: Dataset, path: Path) -> npt.NDArray[np.bool_]:
    """The new columns as one Arrow file; vectors go to disk as they come. Which items have a code, `[items]`."""
    config, items = codebook.config, dataset.manifest.items
    prefixes = Prefixes(config.levels, config.path_buckets)
    codes = np.zeros((items, len(config.levels)), np.int32)
    paths = np.zeros((items, len(config.levels)), np.int32)
    vectors_path = path.with_name("vectors.npy")
    dim = codebook.codewords()[0].shape[1]
    vectors = np.lib.format.open_memmap(vectors_path, "w+", np.float32, (items, dim))
    with vectors_path.open("r+b") as file:  # a map of a full disk ends the process; this is an error that can be told
        os.posix_fallocate(file.fileno(), 0, vectors_path.stat().st_size)
    for coded in code_items(codebook, dataset):
        codes[coded.rows] = coded.codes + 1
        paths[coded.rows] = prefixes.rows(coded.codes)
        vectors[coded.rows] = coded.space
    has_code = codes[:, 0] > 0
    offsets = np.concatenate([[0], (has_code * len(config.levels)).cumsum(dtype=np.int64)])
    name = f"item.{config.name}"
    table = {f"{name}_{level}": pa.array(codes[:, level - 1]) for level in range(1, len(config.levels) + 1)}
    table[f"{name}_path"] = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(paths[has_code].ravel()))
    table[f"{name}_vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim)
    write_arrow(pa.table(table), path)
    del table, vectors
    vectors_path.unlink()
    return has_code


def _without_code(
    dataset: Dataset, has_code: npt.NDArray[np.bool_]
) -> tuple[dict[str, int], dict[Split, tuple[int, int]]]:
    """Items without a code, in all and among the distinct candidates of each split; and of each split's impressions,
    those of such items, and all."""
    manifest = dataset.manifest
    splits = manifest.filled_splits()
    shown: dict[Split, npt.NDArray[np.bool_]] = {split: np.zeros(manifest.items, np.bool_) for split in splits}
    impressions: dict[Split, tuple[int, int]] = dict.fromkeys(splits, (0, 0))
    for number, info in enumerate(manifest.partitions):
        candidates = Partition(dataset, number).requests.lists("items")
        for split in splits:
            first, last = info.requests[split]
            items = candidates.values[candidates.offsets[first] : candidates.offsets[last]]
            shown[split][items] = True
            without, total = impressions[split]
            impressions[split] = without + int((~has_code[items]).sum()), total + items.size
    counts = {"items": int((~has_code[1:]).sum())}
    return counts | {split: int((seen & ~has_code)[1:].sum()) for split, seen in shown.items()}, impressions


@contextmanager
def _alone(root: Path) -> Generator[None]:
    """Hold the dataset's lock: one process at a time changes its item table. What the disk refuses is told."""
    try:
        folder = os.open(root, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(folder)
    except BlockingIOError as error:
        raise SidsError(f"{root}: another process is applying semantic IDs to it; wait for it") from error
    except OSError as error:
        raise SidsError(
            f"{error.filename or root}: cannot write semantic IDs ({error.strerror or error}); free space or correct "
            "permissions, then run again"
        ) from error
