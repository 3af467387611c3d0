"""A run starts from another: dense parameters and optimisers as they were, tables row by raw id, on a dataset whose
vocabularies are numbered anew, have grown and have lost ids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from features.config_file import ConfigError
from features.dataset import MANIFEST, Dataset
from features.errors import UserError
from ranker import cli
from ranker.config import TrainConfig, with_start
from ranker.evaluate import evaluate
from ranker.run import Run, RunError
from ranker.training.trainer import Trainer, train
from tests.ranker.conftest import LOGS, prepared, state_of
from tests.ranker.training.next_day import ATTENTION, OPTIONS, check_tables, next_day, started

ConfigOf = Callable[..., TrainConfig]
Read = Callable[[Path], dict[str, Tensor]]


class Cut(Exception):
    """The machine went away."""


@pytest.fixture(scope="module")
def yesterday(once: Callable[..., Path], config_of: ConfigOf) -> Path:
    """A run of one epoch."""
    return once("yesterday", lambda out: train(config_of(*OPTIONS, ATTENTION), out))


@pytest.fixture(scope="module")
def today(once: Callable[..., Path], dataset: Path) -> Path:
    """The same requests, numbered anew, with 3 ids more in each vocabulary."""
    return once("today", lambda out: next_day(dataset, out, new=3))


@pytest.fixture(scope="module")
def lossy(once: Callable[..., Path], dataset: Path) -> Path:
    """The same with 2 ids less in each vocabulary."""
    return once("lossy", lambda out: next_day(dataset, out, new=3, gone=2))


FRESH: dict[str, Callable[[Tensor], Tensor] | None] = {
    "unknown": lambda table: table[0],
    "mean": lambda table: table[1:].double().mean(0).float(),
    "random": None,
}


@pytest.mark.parametrize("rule", FRESH)
def test_rows_are_those_of_their_ids(
    rule: str, yesterday: Path, dataset: Path, lossy: Path, config_of: ConfigOf, tmp_path: Path, read_checkpoint: Read,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    before = read_checkpoint(Run(yesterday).best())
    after = started(config_of, yesterday, lossy, tmp_path / "run", f"warm_start.new_rows={rule}")
    counts = check_tables(before, after, config_of(), Dataset(dataset), Dataset(lossy), FRESH[rule])
    assert counts["request_user"] == (298, 3, 2)
    assert counts["sequence_item"] == (38, 3, 2)
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["warm_start"]
    assert {name: tuple(rows.values()) for name, rows in recorded["tables"].items()} == counts
    assert (recorded["run"], recorded["checkpoint"]) == (str(yesterday), Run(yesterday).best().name)
    told = {"unknown": "unknown's row", "mean": "the mean row", "random": "random"}[rule]
    assert f"table request_user: 298 rows kept, 3 new ({told}), 2 gone" in capsys.readouterr().err
    fresh = after[".model.tables.request.embedding_bags.request_user.weight"]
    assert fresh.isfinite().all()
    assert fresh.abs().sum(1).gt(0).all()


def test_random_rows_differ(yesterday: Path, today: Path, config_of: ConfigOf, tmp_path: Path):
    after = started(config_of, yesterday, today, tmp_path / "run", "warm_start.new_rows=random")
    rows = after[".model.tables.sequence.embeddings.sequence_item.weight"]
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("optimizer", ["adagrad", "sgd"])
def test_other_table_optimisers(
    optimizer: str, dataset: Path, lossy: Path, config_of: ConfigOf, tmp_path: Path, read_checkpoint: Read
):
    more = (f"tables.optimizer={optimizer}", "tables.lr=0.05")
    train(config_of(*OPTIONS, ATTENTION, *more), tmp_path / "yesterday")
    after = started(config_of, tmp_path / "yesterday", lossy, tmp_path / "run", *more)
    before = read_checkpoint(Run(tmp_path / "yesterday").best())
    check_tables(before, after, config_of(), Dataset(dataset), Dataset(lossy), FRESH["unknown"])


def test_dense_parameters_and_moments_are_kept(
    yesterday: Path, today: Path, config_of: ConfigOf, tmp_path: Path, read_checkpoint: Read
):
    before = read_checkpoint(Run(yesterday).best())
    after = started(config_of, yesterday, today, tmp_path / "run", "seed=7")
    dense = [name for name in before if ".dense." in name]
    assert any(name.endswith("exp_avg_sq") for name in dense)
    assert any(name.endswith("step") and before[name] > 0 for name in dense)
    for name in dense:
        assert torch.equal(after[name], before[name]), name


def test_optimisers_may_start_anew(
    yesterday: Path, today: Path, config_of: ConfigOf, tmp_path: Path, read_checkpoint: Read
):
    both = ("warm_start.dense_optimizer=reset", "warm_start.table_optimizer=reset", "tables.optimizer=adagrad")
    after = started(config_of, yesterday, today, tmp_path / "run", *both)
    before = read_checkpoint(Run(yesterday).best())
    assert not [name for name in after if "exp_avg" in name and after[name].any()]
    sums = [name for name in after if ".momentum1" in name or name.endswith(".sum")]
    assert sums
    assert not [name for name in sums if after[name].any()]
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith(".model.dense."))


def scores(run: Path, split: str = "test") -> np.ndarray:
    evaluate(run, split, keep_predictions=True)  # type: ignore[arg-type]
    table = pq.read_table(run / "predictions.parquet")
    return np.stack([table.column(name).to_numpy() for name in ("p_ctr", "p_ctcvr", "p_cvr")])


def test_scores_are_those_of_the_other_run_to_the_last_bit(
    yesterday: Path, today: Path, config_of: ConfigOf, tmp_path: Path
):
    """Where both know all ids."""
    run = shutil.copytree(yesterday, tmp_path / "yesterday")
    started(config_of, run, today, tmp_path / "run")
    assert np.array_equal(scores(tmp_path / "run"), scores(run))


def test_a_started_run_learns_on(yesterday: Path, today: Path, config_of: ConfigOf, tmp_path: Path):
    """From the loss that the other ended at, not from the beginning."""
    train(config_of(f"dataset={today}", *OPTIONS, ATTENTION), tmp_path / "scratch")
    started(config_of, yesterday, today, tmp_path / "zero")
    train(config_of(*with_start((f"dataset={today}", *OPTIONS, ATTENTION), yesterday)), tmp_path / "run")
    zero, run, scratch = (evaluate(tmp_path / name, "train") for name in ("zero", "run", "scratch"))
    assert zero is not None
    assert run is not None
    assert scratch is not None
    assert run.model["ctr"].logloss < zero.model["ctr"].logloss
    assert run.model["ctr"].logloss < scratch.model["ctr"].logloss


EVERYTHING = (
    "optimizer.weight_decay=0.01", "optimizer.schedule={warmup_steps: 3, decay: cosine}", "training.epochs=2",
    "training.checkpoint_every=3", "training.keep_checkpoints=9",
)  # fmt: skip


def test_a_cut_run_goes_on_without_the_run_it_started_from(
    yesterday: Path, today: Path, config_of: ConfigOf, tmp_path: Path, read_checkpoint: Read
):
    source = shutil.copytree(yesterday, tmp_path / "source")
    config = config_of(*with_start((f"dataset={today}", *OPTIONS, ATTENTION, *EVERYTHING), source))
    train(config, tmp_path / "straight")
    with pytest.MonkeyPatch.context() as patch:
        step = Trainer.step

        def cut(self: Trainer, *arguments: object) -> None:
            if self.position.step == 5:
                raise Cut
            step(self, *arguments)  # type: ignore[arg-type]

        patch.setattr(Trainer, "step", cut)
        with pytest.raises(Cut):
            train(config, tmp_path / "run")
    shutil.rmtree(source)
    train(config, tmp_path / "run", resume=True)
    last, expected = (Run(tmp_path / name).checkpoints()[-1] for name in ("run", "straight"))
    assert last.name == expected.name
    found, wanted = read_checkpoint(last), read_checkpoint(expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_a_run_that_was_cut_as_it_began_starts_from_the_same_checkpoint(
    yesterday: Path, today: Path, config_of: ConfigOf, tmp_path: Path, read_checkpoint: Read
):
    """Before its first checkpoint was whole; the other run has gone on since."""
    source = shutil.copytree(yesterday, tmp_path / "yesterday")
    config = config_of(*with_start((f"dataset={today}", *OPTIONS, ATTENTION, "training.max_steps=0"), source))
    before = read_checkpoint(Run(source).best())
    with pytest.MonkeyPatch.context() as patch:

        def cut(self: Trainer, root: Path) -> None:
            raise Cut

        patch.setattr(Trainer, "fit", cut)
        with pytest.raises(Cut):
            train(config, tmp_path / "run")
    train(config_of(*OPTIONS, ATTENTION, "training.epochs=2"), source, resume=True)
    train(config, tmp_path / "run", resume=True)
    after = read_checkpoint(Run(tmp_path / "run").checkpoints()[0])
    assert torch.equal(after[".model.dense.tower.heads.weight"], before[".model.dense.tower.heads.weight"])
    train(config, tmp_path / "run", resume=True)  # and at its end it stays as it is


OTHER_MODEL = {
    "features.request=[user]": r"features.request: user.device only in .*; features, model, .* must be the same",
    "features.candidate=[item, item.category]": "features.candidate: candidate.position only in",
    "features.dense=[]": "features.dense: item.price only in",
    "features.sequence=[item.category, item]": "features.sequence: another order than in",
    "features.request=[user, user.device, user.interests]": "features.request: user.interests not in",
    "tables.dim=16": "tables.dim: 16, but .* has 8; features, model",
    "tables.dims={item: 16}": "tables.dims.item: 16, but",
    "model.short.hidden=[4]": r"model.short.hidden: \[4\], but",
    "tasks.conversion=null": "tasks.conversion: None, but",
    "tables.optimizer=sgd": "tables.optimizer: 'sgd', but .* has 'rowwise_adagrad', whose state is another; .*reset",
    "warm_start.run=nowhere": "nowhere: no run.json; not a run folder",
}


@pytest.mark.parametrize("option", OTHER_MODEL)
def test_another_model_is_refused(option: str, yesterday: Path, today: Path, config_of: ConfigOf, tmp_path: Path):
    options = with_start((f"dataset={today}", *OPTIONS, ATTENTION), yesterday)
    with pytest.raises((RunError, UserError), match=OTHER_MODEL[option]):
        train(config_of(*options, option), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_from_nothing_is_refused(config_of: ConfigOf):
    with pytest.raises(ConfigError, match=r"training.max_steps: 0 leaves nothing to keep without warm_start.run"):
        config_of("training.max_steps=0")


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ({"kind": "dense", "transform": "none"}, "price", "item.price: transform none in .*, but log1p in"),
        ({"kind": "categorical", "edges": [1, 2]}, "category", r"item.category: edges \[1, 2\] in .*, but None in"),
    ],
)
def test_a_column_that_holds_something_else_is_refused(
    column: dict[str, object], change: str, message: str, yesterday: Path, today: Path, config_of: ConfigOf,
    tmp_path: Path,
):  # fmt: skip
    changed = shutil.copytree(today, tmp_path / "today")
    manifest = json.loads((changed / MANIFEST).read_text())
    manifest["config"]["columns"]["item"][change] |= column
    (changed / MANIFEST).write_text(json.dumps(manifest))
    options = with_start((f"dataset={changed}", *OPTIONS, ATTENTION), yesterday)
    with pytest.raises(UserError, match=message):
        train(config_of(*options), tmp_path / "run")


def test_dense_features_keep_their_moments(yesterday: Path, today: Path, config_of: ConfigOf, tmp_path: Path):
    source = shutil.copytree(yesterday, tmp_path / "yesterday")
    (source / "moments.json").write_text('{"item.price": [5.0, 2.0]}')
    started(config_of, source, today, tmp_path / "kept")
    assert Run(tmp_path / "kept").moments() == {"item.price": (5.0, 2.0)}
    after = started(config_of, source, today, tmp_path / "measured", "warm_start.moments=measure")
    mean, deviation = Run(tmp_path / "measured").moments()["item.price"]
    assert mean != 5.0
    assert after[".model.dense.of_candidate.mean"].item() == pytest.approx(mean)
    assert after[".model.dense.of_candidate.deviation"].item() == pytest.approx(deviation)


def test_the_command_line_names_the_run(
    yesterday: Path, today: Path, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = [f"dataset={today}", *OPTIONS, ATTENTION, "training.max_steps=1"]
    arguments = ["ranker", "train", str(config_file), "--out", str(tmp_path / "run"), "--from", str(yesterday)]
    monkeypatch.setattr("sys.argv", [*arguments, *(word for option in options for word in ("--set", option))])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert Run(tmp_path / "run").config.warm_start.run == yesterday


def test_the_newest_checkpoint_may_be_the_start(
    yesterday: Path, today: Path, config_of: ConfigOf, tmp_path: Path, read_checkpoint: Read
):
    """Where the best validated one is an earlier one."""
    source = tmp_path / "source"
    ever_worse = ("optimizer.lr=1", "training.max_steps=2", "training.monitor=logloss", "training.validate_every=1")
    train(config_of(*OPTIONS, ATTENTION, *ever_worse, "training.validation_split=valid"), source)
    best, newest = Run(source).best(), Run(source).checkpoints()[-1]
    assert best != newest
    for which, path in (("best", best), ("newest", newest)):
        after = started(config_of, source, today, tmp_path / which, f"warm_start.checkpoint={which}")
        key = ".model.dense.tower.heads.weight"
        assert torch.equal(after[key], read_checkpoint(path)[key])
        assert Run(tmp_path / which).info["warm_start"]["checkpoint"] == path.name  # type: ignore[index]


@pytest.fixture(scope="module")
def hashed_days(once: Callable[..., Path]) -> tuple[Path, Path]:
    """Two days of other users and clicks, whose ids of users, items and categories are hashed."""
    hashed = LOGS.replace("category: {}", "category: {hash_buckets: 3}")
    hashed += "user_hash_buckets: 64\nitem_hash_buckets: 16\n"
    other = hashed.replace("seed: 3", "seed: 4").replace("users: 300", "users: 200")
    return (
        once("hashed_day", lambda out: prepared(hashed, out, out)),
        once("next_hashed_day", lambda out: prepared(other, out, out)),
    )


def test_hashed_ids_keep_their_rows(
    hashed_days: tuple[Path, Path], config_of: ConfigOf, tmp_path: Path, read_checkpoint: Read
):
    """All of them: a new id finds what others of its hash have learned."""
    train(config_of(*OPTIONS, ATTENTION, f"dataset={hashed_days[0]}"), tmp_path / "yesterday")
    after = started(config_of, tmp_path / "yesterday", hashed_days[1], tmp_path / "run")
    before = read_checkpoint(Run(tmp_path / "yesterday").best())
    for name in ("request_user", "sequence_item", "candidate_item", "candidate_item_category"):
        found = [state[key] for state in (before, after) for key in state if key.endswith(f"{name}.weight")]
        assert len(found) == 2
        assert torch.equal(*found)
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["warm_start"]["tables"]
    assert recorded["sequence_item"] == {"kept": 16, "new": 0, "gone": 0}


def test_another_number_of_buckets_is_refused(
    hashed_days: tuple[Path, Path], yesterday: Path, config_of: ConfigOf, tmp_path: Path
):
    with pytest.raises(UserError, match=r"user: hash_buckets 64 in .*, but None in .*; prepare it as before"):
        started(config_of, yesterday, hashed_days[0], tmp_path / "run")


def test_rows_that_ids_share_by_their_numbers_are_refused(config_of: ConfigOf, today: Path, tmp_path: Path):
    shared = "tables.buckets={item: {rows: 10}}"
    train(config_of(*OPTIONS, ATTENTION, shared), tmp_path / "yesterday")
    with pytest.raises(
        RunError, match=r"tables.buckets.item: ids share rows by their numbers, which every preparation"
    ):
        started(config_of, tmp_path / "yesterday", today, tmp_path / "run", shared)
    state = started(config_of, tmp_path / "yesterday", config_of().dataset, tmp_path / "same", shared)
    before = state_of(Run(tmp_path / "yesterday").best())
    key = next(key for key in state if key.endswith("sequence_item.weight"))
    assert torch.equal(state[key], before[key])


def test_rows_that_hashed_ids_share_are_kept(hashed_days: tuple[Path, Path], config_of: ConfigOf, tmp_path: Path):
    """Their numbers are those of their hashes, on every day."""
    shared = "tables.buckets={item: {rows: 5}}"
    train(config_of(*OPTIONS, ATTENTION, f"dataset={hashed_days[0]}", shared), tmp_path / "yesterday")
    after = started(config_of, tmp_path / "yesterday", hashed_days[1], tmp_path / "run", shared)
    before = state_of(Run(tmp_path / "yesterday").best())
    key = next(key for key in after if key.startswith(".model") and key.endswith("sequence_item.weight"))
    assert after[key].shape == (6, 8)
    assert torch.equal(after[key], before[key])
