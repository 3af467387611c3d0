"""A dataset as another day's preparation would number it, and what its tables must start with: loops over raw ids."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from features.dataset import MANIFEST, Dataset, read_arrow, write_arrow
from features.selection import FeatureSpec, resolve
from ranker.config import TrainConfig, with_start
from ranker.run import Run
from ranker.training.trainer import train
from tests.ranker.conftest import state_of

State = dict[str, Tensor]

OPTIONS = ("loader.requests=256", "loader.drop_item=0.2", "training.epochs=1", "training.validation_split=null")
ATTENTION = "model.long=[{type: mean}, {type: target_attention}]"


def next_day(today: Path, out: Path, new: int = 3, gone: int = 0, seed: int = 0) -> Path:
    """The same requests in the same order, with every vocabulary shuffled, `new` ids more in each, and `gone` less.

    An id that is gone is unknown: an item or user behind the known ones, another value row 0.
    """
    rng = random.Random(seed)
    old = Dataset(shutil.copytree(today, out))
    known = {"item": old.manifest.known_items, "user": old.manifest.known_users}
    place: dict[str, dict[int, int]] = {}
    sizes: dict[str, int] = {}
    for path in sorted((out / "vocabularies").iterdir()):
        name = path.stem
        values = read_arrow(path).column("value")
        size = known.get(name, len(values) + 1)
        lost = set(rng.sample(range(1, size), min(gone, size - 2))) if gone else set[int]()
        kept = [i for i in range(1, size) if i not in lost]
        ids = [(values[i - 1].as_py(), i) for i in kept] + [(_new_id(values.type, k), 0) for k in range(new)]
        rng.shuffle(ids)
        sizes[name] = len(ids) + 1
        if name in known:  # unknown ones are behind
            ids += [(values[i - 1].as_py(), i) for i in (*sorted(lost), *range(size, len(values) + 1))]
        place[name] = {0: 0} | dict.fromkeys(lost, 0) | {i: at for at, (_, i) in enumerate(ids, 1) if i}
        table = {
            "value": pa.array([v for v, _ in ids], values.type),
            "index": pa.array(range(1, len(ids) + 1), pa.int32()),
        }
        _replace(path, pa.table(table))
    older = {at: i for i, at in place["item"].items()}
    by_item = pa.array([older.get(at, 0) for at in range(old.manifest.items + new)])
    for file in (out / "items.arrow", *(out / "semantic_ids").glob("*.arrow")):
        _replace(file, _renumbered(pa.Table.from_batches([read_arrow(file).take(by_item)]), place))
    for file in (out / "partitions").rglob("*.arrow"):
        _replace(file, _renumbered(pa.Table.from_batches([read_arrow(file)]), place))
    manifest = old.manifest.model_dump(mode="json")
    manifest |= {"content_hash": f"{seed}-{new}-{gone}", "known_items": sizes["item"], "known_users": sizes["user"]}
    manifest |= {"items": old.manifest.items + new, "users": old.manifest.users + new}
    for scope, columns in manifest["columns"].items():
        for name, column in columns.items():
            column["size"] = sizes.get(f"{scope}.{name}", column["size"])
    (out / MANIFEST).write_text(type(old.manifest).model_validate(manifest).model_dump_json())
    return out


def _new_id(kind: pa.DataType, number: int) -> Any:
    return 10**9 + number if pa.types.is_integer(kind) else f"new {number}"


def _renumbered(table: pa.Table, place: dict[str, dict[int, int]]) -> pa.Table:
    for name in table.schema.names:
        vocabulary = "item" if name == "items" else name
        if vocabulary in place:
            to = place[vocabulary]
            values = [[to[i] for i in v] if isinstance(v, list) else to[v] for v in table.column(name).to_pylist()]
            column = pa.array(values, table.schema.field(name).type)
            table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def _replace(path: Path, table: pa.Table) -> None:
    """The old file stays mapped."""
    write_arrow(table, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def raw_ids(dataset: Dataset, name: str, size: int) -> list[Any]:
    """The raw id of each row of a column's table; row 0, and rows of columns without a vocabulary, stand for
    themselves."""
    path = dataset.root / "vocabularies" / f"{name}.arrow"
    if not path.is_file():
        return list(range(size))
    return [0, *((value,) for value in read_arrow(path).column("value").to_pylist()[: size - 1])]


def features_of(spec: FeatureSpec) -> dict[str, str]:
    """The feature of each table."""
    places = (("request", spec.request), ("candidate", spec.candidate), ("sequence", (*spec.sequence, *spec.event)))
    return {f"{place}.{f.name}".replace(".", "_"): f.name for place, features in places for f in features}


def check_tables(
    before: State,
    after: State,
    config: TrainConfig,
    old: Dataset,
    new: Dataset,
    fresh: Callable[[Tensor], Tensor] | None,
) -> dict[str, tuple[int, int, int]]:
    """Every row of every table, and of its optimizer's state, is the old one of its id, or `fresh` of the old table and
    0; how many were kept, new and gone.

    Args:
        fresh: what a new row must be, of the old table; None: anything.
    """
    counts: dict[str, tuple[int, int, int]] = {}
    for table, name in features_of(resolve(config.features, new.manifest)).items():
        key = next(key for key in after if key.endswith(f".{table}.weight"))
        was, now = before[key], after[key]
        old_ids, new_ids = raw_ids(old, name, len(was)), raw_ids(new, name, len(now))
        at = {raw: i for i, raw in enumerate(old_ids)}
        states = [k for k in after if k.startswith(f".optimizer.state{key.removeprefix('.model')}.")]
        for row, raw in enumerate(new_ids):
            if raw in at:
                assert torch.equal(now[row], was[at[raw]]), (table, raw)
            elif fresh is not None:
                torch.testing.assert_close(now[row], fresh(was), rtol=0, atol=1e-7, msg=f"{table} {raw}")
        for state in states:
            had, has = row_state(before[state], len(was)), row_state(after[state], len(now))
            for row, raw in enumerate(new_ids):
                expected = had[:, at[raw]] if raw in at else torch.zeros_like(had[:, 0])
                if len(had) != len(has):  # columns cut otherwise: the shards' mean, of widths that are equal here
                    expected = expected.mean(0, keepdim=True).expand(has[:, row].shape)
                assert torch.equal(has[:, row], expected), (state, raw)
        kept = len(set(new_ids) & set(old_ids))
        counts[table] = (kept - 1, len(now) - kept, len(was) - kept)
    return counts


def row_state(state: Tensor, rows: int) -> Tensor:
    """`[parts, rows, ·]`: a number for each row and shard of columns, or a number for each weight."""
    return state.view(-1, rows) if state.dim() == 1 else state.unsqueeze(0)


def started(
    config_of: Callable[..., TrainConfig], run: Path, dataset: Path, out: Path, *more: str
) -> dict[str, Tensor]:
    """Start from a run, train nothing; the state of the first checkpoint."""
    options = with_start((f"dataset={dataset}", *OPTIONS, ATTENTION, "training.max_steps=0", *more), run)
    train(config_of(*options), out)
    assert [path.name for path in Run(out).checkpoints()] == ["step-00000000"]
    return state_of(Run(out).checkpoints()[0])
