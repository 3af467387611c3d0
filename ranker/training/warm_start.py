"""Start a run from another one, as each day from the day before: dense parameters, optimisers, tables row by raw id.

The model must be the other run's: the same features in the same order, the same `model`, widths and tasks. What may
differ is the dataset, with vocabularies of its own, and how training goes on: seed, loader, rates, steps, sharding,
ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from features.dataset import Dataset
from features.progress import log
from features.selection import Feature, FeatureSpec, resolve
from features.semantic_ids.errors import SidsError
from features.table_rows import codebook_change, older_rows, refuse_other_meaning, same_numbers
from ranker.config import HiSacConfig, TrainConfig
from ranker.ranks import Ranks
from ranker.run import Run, RunError, codebooks_of, leaves
from ranker.tables.managed_collision import managed_of
from ranker.training import checkpoint, managed_state
from ranker.training.carried_rows import Carried, Ints, Saved, carry_rows

_SAME = (
    "features", "model", "tables.dim", "tables.dims", "tables.buckets", "tables.managed_collision",
    "tasks.click", "tasks.conversion",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """What a run starts from: a checkpoint, and the dataset whose ids its tables' rows are of.

    grown, reset: codebooks that have grown since, and those that are other ones now.
    """

    run: Run
    checkpoint: Path
    dataset: Dataset
    grown: frozenset[str]
    reset: frozenset[str]


@dataclass(frozen=True)
class TableRows:
    """How many of a table's rows, that of the unknown id apart, were kept, are new, and are gone."""

    kept: int
    new: int
    gone: int


def source_of(config: TrainConfig, dataset: Dataset, recorded: str | None = None) -> Source:
    """The run that `config.warm_start` names, checked to fit.

    Args:
        recorded: the name of the checkpoint to take, where a run has begun from it already.

    Raises:
        UserError: no such run or checkpoint, its dataset is gone, another model, or columns that hold something else.
    """
    assert config.warm_start.run is not None
    run = Run(config.warm_start.run)
    _refuse_other_model(config, run)
    older = run.prepared()
    spec = resolve(config.features, dataset.manifest)
    _refuse_rows_shared_by_other_numbers(config, run, older, dataset, spec)
    refuse_other_meaning((f for place in vars(spec).values() for f in place), older, dataset)
    grown, reset = _codebooks(config, run, older, dataset, spec)
    path = run.checkpoint_named(recorded) if recorded else _checkpoint(config, run)
    return Source(run, path, older, grown, reset)


def _shares_rows(feature: Feature, config: TrainConfig) -> bool:
    """Whether the feature's table has fewer rows than ids."""
    asked = config.tables.buckets_of(feature.name)
    return asked is not None and asked.rows + 1 < feature.size


def _refuse_rows_shared_by_other_numbers(
    config: TrainConfig, run: Run, older: Dataset, dataset: Dataset, spec: FeatureSpec
) -> None:
    before = resolve(config.features, older.manifest)
    for now, was in zip(_ids(spec), _ids(before), strict=True):
        if not _shares_rows(now, config) and not _shares_rows(was, config):
            continue
        if now.size != was.size or not same_numbers(now, older, dataset):
            raise RunError(
                f"tables.buckets.{now.name}: ids share rows by their numbers, which every preparation gives anew, so "
                f"that those of {run.root} mean nothing in {dataset.root}; leave it out, or hash raw ids, which keep "
                "their numbers (hash_buckets in the prepare config)"
            )


def _ids(spec: FeatureSpec) -> tuple[Feature, ...]:
    """Features that are read through tables that are trained."""
    return (*spec.request, *spec.candidate, *spec.sequence, *spec.event)


def _checkpoint(config: TrainConfig, run: Run) -> Path:
    checkpoints = run.checkpoints()
    return checkpoints[-1] if checkpoints and config.warm_start.checkpoint == "newest" else run.best()


def _codebooks(
    config: TrainConfig, run: Run, older: Dataset, dataset: Dataset, spec: FeatureSpec
) -> tuple[frozenset[str], frozenset[str]]:
    """Codebooks that have grown since the run, and those whose tables start anew.

    Raises:
        RunError: codes mean other things than in the run, and are not to start anew.
    """
    trained_with: Any = run.info.get("codebooks", {})
    now = codebooks_of(config, dataset)
    if trained_with.keys() != now.keys():
        have, had = ", ".join(now) or "none", ", ".join(trained_with) or "none"
        raise RunError(
            f"{dataset.root}: features read semantic IDs {have}, those of {run.root} {had}; prepare them alike"
        )
    grown, reset = set[str](), set[str]()
    for name in now:
        change = codebook_change(name, trained_with[name]["content_hash"], older, dataset)
        if change == "grown" and all(
            _has_rows(f, older, dataset) for f in spec.candidate if _codebook(f, dataset) == name
        ):
            grown.add(name)
        elif change != "same":
            reset.add(name)
            if config.warm_start.codebooks == "keep":
                why = {
                    "other": "are of another codebook",
                    "unknown": f"are of another codebook ({older.root} no longer has the old one to compare)",
                    "grown": "have grown, and their paths are hashed into another number of rows (path_buckets),",
                }
                raise RunError(
                    f"{dataset.root}: semantic IDs {name!r} {why[change]} than {run.root} was trained with, and mean "
                    "other things; apply the old one (`ranker sids apply`), or start the tables of codes anew: "
                    "--set warm_start.codebooks=reset"
                )
    return frozenset(grown), frozenset(reset)


def _has_rows(feature: Feature, older: Dataset, dataset: Dataset) -> bool:
    """Whether the rows of codes, or of their prefixes, have rows in the table of a codebook that has grown since."""
    size, name = older.manifest.columns["item"][feature.name.removeprefix("item.")].size, _codebook(feature, dataset)
    assert name is not None
    try:
        older_rows(feature, older, dataset, size, 0, 0, frozenset([name]))
    except SidsError:
        return False
    return True


def _refuse_other_model(config: TrainConfig, run: Run) -> None:
    """Raise RunError where parameters or their meaning would differ, naming the features that do."""
    may = (
        "features, model, tables.dim, dims, buckets and managed_collision and the tasks must be the same; seed, "
        "loader, rates, training may differ"
    )
    for place, names in config.features.model_dump().items():
        before: list[str] = getattr(run.config.features, place)
        if names != before:
            more, less = [n for n in names if n not in before], [n for n in before if n not in names]
            what = "; ".join(
                f"{', '.join(part)} {is_missing}"
                for part, is_missing in ((more, f"not in {run.root}"), (less, f"only in {run.root}"))
                if part
            )
            raise RunError(f"features.{place}: {what or f'another order than in {run.root}'}; {may}")
    old, new = leaves(run.config.model_dump(mode="json")), leaves(config.model_dump(mode="json"))
    for key in old | new:
        was, is_now = old.get(key), new.get(key)
        # what {} lacks has a key of its own
        if was != is_now and {} not in (was, is_now) and key.startswith(_SAME) and not _may_change(key):
            raise RunError(f"{key}: {is_now!r}, but {run.root} has {was!r}; {may}")
    if config.tables.optimizer != run.config.tables.optimizer and config.warm_start.table_optimizer == "keep":
        raise RunError(
            f"tables.optimizer: {config.tables.optimizer!r}, but {run.root} has {run.config.tables.optimizer!r}, whose "
            "state is another; keep that, or --set warm_start.table_optimizer=reset"
        )


def start_from(
    source: Source,
    config: TrainConfig,
    dataset: Dataset,
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    ranks: Ranks,
) -> dict[str, TableRows]:
    """Fill a model that has been sharded, and its optimisers, from another run's checkpoint; what became of each
    table's rows.

    Raises:
        UserError: the checkpoint is damaged.
    """
    checkpoint.check(source.checkpoint, ranks)
    _load_dense(source, config, model, optimizer)
    saved, state = Saved(source.checkpoint), model.state_dict()
    table_states: dict[str, Any] = optimizer.state_dict()["state"]
    found: dict[str, TableRows] = {}
    managed_state.start_from(source.checkpoint, model, table_states if _keeps_table_states(config) else {})
    managed = {table.name: table for table in managed_of(model)}
    for name, (key, feature) in _tables(resolve(config.features, dataset.manifest), state).items():
        codebook = _codebook(feature, dataset)
        older_size = int(saved.size(f"model.{key}")[0])
        if name in managed:
            taken, rows = (int(x) for x in ranks.totals(*managed[name].slots.taken()))
            found[name] = TableRows(taken, rows - taken, 0)
        elif codebook in source.reset:
            found[name] = TableRows(0, int(state[key].size(0)) - 1, older_size - 1)
        else:
            kept = table_states.get(key, {}) if _keeps_table_states(config) else {}
            states = {f"optimizer.state.{key}.{n}": s for n, s in kept.items()}
            carried = carry_rows(
                saved, f"model.{key}", state[key], states, _rows_of(feature, source, config, dataset, older_size),
                config.warm_start.new_rows,
            )  # fmt: skip
            found[name] = _total(carried, older_size, ranks)
        if ranks.first:
            told = _told(found[name], config, codebook if codebook in source.reset else None)
            log(f"table {name}: {_told_of_managed(found[name]) if name in managed else told}")
    if ranks.first:
        log(f"started from {source.checkpoint}, {_kept(config)}")
    return found


def record_of(source: Source, tables: dict[str, TableRows]) -> dict[str, object]:
    """What a run's ``run.json`` says of its start."""
    return {
        "run": str(source.run.root),
        "checkpoint": source.checkpoint.name,
        "dataset": source.run.info["dataset"],
        "tables": {name: asdict(rows) for name, rows in tables.items()},
    }


def _load_dense(
    source: Source, config: TrainConfig, model: DistributedModelParallel, optimizer: CombinedOptimizer
) -> None:
    """Dense parameters, buffers and Adam's moments, in place. Codewords are the dataset's, and so is what else a block
    keeps of them."""
    own = tuple(
        f"dense.long.{i}.block.{buffer}"
        for i, block in enumerate(config.model.long)
        if isinstance(block, HiSacConfig)
        for buffer, _ in model.module.dense.long[i].block.named_buffers()  # type: ignore[union-attr]
    )
    if config.warm_start.moments == "measure":
        own += tuple(f"dense.of_{stride}." for stride in ("request", "candidate", "event"))
    dense = {name: value for name, value in model.state_dict().items() if not name.startswith(("tables.", *own))}
    state: dict[str, Any] = {"model": dense}
    if config.warm_start.dense_optimizer == "keep":
        for _, part in optimizer.optimizers:
            if isinstance(part, KeyedOptimizerWrapper):
                part.init_state()  # Adam has no moments before its first step; parameters are read after it
        moments = optimizer.state_dict()["state"]
        state["optimizer"] = {"state": {name: values for name, values in moments.items() if name.startswith("dense.")}}
    dcp.load(state, checkpoint_id=source.checkpoint)


def _tables(spec: FeatureSpec, state: dict[str, Any]) -> dict[str, tuple[str, Feature]]:
    """Key in the state, and feature, of each table that is trained, by its name."""
    places = (("request", spec.request), ("candidate", spec.candidate), ("sequence", (*spec.sequence, *spec.event)))
    of_table = {f"{place}.{f.name}".replace(".", "_"): f for place, features in places for f in features}
    sharded = [key for key, value in state.items() if isinstance(value, ShardedTensor)]
    keys = {key.split(".")[-2]: key for key in sharded if key.endswith(".weight")}
    return {name: (keys[name], feature) for name, feature in of_table.items()}


def _codebook(feature: Feature, dataset: Dataset) -> str | None:
    """The codebook whose codes a table's rows are of."""
    column = dataset.manifest.columns.get(feature.scope, {}).get(feature.name.removeprefix(f"{feature.scope}."))
    return column.codebook if column is not None else None


def _rows_of(
    feature: Feature, source: Source, config: TrainConfig, dataset: Dataset, older_size: int
) -> Callable[[int, int], Ints]:
    """The older row of each row of a table, from a first to before an end."""
    if _shares_rows(feature, config):  # by the same numbers, as was checked
        return lambda first, end: np.arange(first, end)

    def rows(first: int, end: int) -> Ints:
        return older_rows(feature, source.dataset, dataset, older_size, first, end, source.grown)

    return rows


def _total(carried: Carried, older_size: int, ranks: Ranks) -> TableRows:
    """Of all ranks."""
    kept, new = (int(x) for x in ranks.totals(*carried))
    return TableRows(kept, new, older_size - 1 - kept)


def _told(rows: TableRows, config: TrainConfig, reset: str | None) -> str:
    if reset is not None:
        return f"{rows.new:,} rows anew ({reset!r} is another codebook), {rows.gone:,} gone"
    rule = {"unknown": "unknown's row", "random": "random", "mean": "the mean row"}[config.warm_start.new_rows]
    return f"{rows.kept:,} rows kept, {rows.new:,} new ({rule}), {rows.gone:,} gone"


def _told_of_managed(rows: TableRows) -> str:
    return f"{rows.kept:,} ids kept their rows, {rows.new:,} rows are nobody's"


def _may_change(key: str) -> bool:
    """Whether it is how often managed tables let ids in, which changes nothing of what they hold."""
    return key.startswith("tables.managed_collision.") and key.endswith(".every")


def _keeps_table_states(config: TrainConfig) -> bool:
    return config.warm_start.table_optimizer == "keep"


def _kept(config: TrainConfig) -> str:
    """What of the run, its parameters apart, was kept, and what not."""
    start = config.warm_start
    moments = "that run's moments" if start.moments == "keep" else "the new dataset's moments"
    kept = {"keep": "kept", "reset": "reset"}
    return (
        f"Adam's moments {kept[start.dense_optimizer]}, tables' optimizer state {kept[start.table_optimizer]}, dense "
        f"features standardised by {moments}"
    )
