"""Training learns, by every option; says what it does; refuses what cannot be trained."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from features.errors import UserError
from ranker.config import TrainConfig
from ranker.evaluate import evaluate
from ranker.run import Run, RunError
from ranker.train import main
from ranker.training.trainer import Trainer, train

ConfigOf = Callable[..., TrainConfig]
Scalars = Callable[[Path], dict[str, dict[int, float]]]


def test_it_learns_what_the_references_cannot(trained: Path, scalars: Scalars):
    metrics = json.loads((trained / "metrics.json").read_text())
    losses = list(scalars(trained)["loss/ctr"].values())
    assert losses[-1] < 0.8 * losses[0]
    best = max(reference["ctr"]["auc"] for reference in metrics["references"].values())
    assert metrics["ctr"]["auc"] > best + 0.05
    assert metrics["ctr"]["auc"] < metrics["oracle"]["ctr"]["auc"]
    assert metrics["ctr"]["ne"] < 0.95
    assert metrics["ctcvr"]["auc"] > 0.6


def test_scalars_of_a_run(
    config_of: ConfigOf, scalars: Scalars, tmp_path: Path, read_checkpoint: Callable[[Path], dict[str, Tensor]]
):
    steps = ("training.max_steps=7", "training.log_every=3", "training.validate_every=4")
    train(config_of(*steps, "optimizer.schedule.warmup_steps=10"), tmp_path / "run")
    found = scalars(tmp_path / "run")
    training = {
        "loss/ctr", "loss/ctcvr", "train/ne", "train/gradient_norm", "train/learning_rate",
        "speed/requests_per_s", "speed/candidates_per_s",
    }  # fmt: skip
    assert training <= found.keys()
    for tag in training:
        assert list(found[tag]) == [3, 6, 7]  # the last step too, whatever log_every
    for task in ("ctr", "ctcvr", "cvr"):
        assert list(found[f"valid/{task}/auc"]) == [4, 7]
    assert found["train/learning_rate"] == pytest.approx({3: 0.003, 6: 0.006, 7: 0.007})
    assert found["loss/ctr"][3] == pytest.approx(math.log(2), rel=0.2)
    known = found["lookups/candidate/item/known"]
    assert list(known) == [3, 6, 7]
    assert 0.8 < known[7] < 1  # some are dropped
    assert 0 < found["lookups/sequence/history_item/distinct"][7] < 0.2  # of 40 items
    norms = found["tables/sequence_item/norm"]
    assert list(norms) == [4, 7]  # at checkpoints
    whole = read_checkpoint(Run(tmp_path / "run").checkpoints()[-1])
    table = next(x for name, x in whole.items() if name.startswith(".model") and name.endswith("sequence_item.weight"))
    assert norms[7] == pytest.approx(float(table.square().sum(1).mean().sqrt()), rel=1e-5)
    speed = [found[f"speed/{what}_per_s"][6] for what in ("candidates", "requests")]
    assert speed[0] == pytest.approx(8 * speed[1], rel=1e-5)  # eight candidates each


@pytest.mark.parametrize(
    "options",
    [
        ("model.tower.type=mmoe", "model.tower.experts=3", "model.tower.dropout=0.1"),
        ("tasks.conversion=null",),
        ("tasks.conversion=null", "model.tower.type=mmoe"),
        ("model.short=null", "model.long=[{type: mean}, {type: target_attention, length: 5}, {type: mean, length: 3}]"),
        ("model.short=null", "model.long=[]"),
        ("model.short=null", "model.long=[]", "model.tower.target=false"),
        ("model.tower.cross=false", "model.long=[{type: mean}]"),
        ("model.short.softmax=true", "model.short.age_buckets=4", "model.short.hidden=[8, 4]"),
        ("model.short.normalise=false",),
        ("features.request=[]", "features.dense=[]", "features.candidate=[]", "features.event=[]"),
        ("tables.optimizer=adagrad", "tables.dims={user: 4, item: 12}"),
        ("tables.optimizer=sgd", "loader.group=1", "loader.workers=1"),
    ],
    ids=lambda options: " ".join(options),
)
def test_every_option_trains(config_of: ConfigOf, tmp_path: Path, scalars: Scalars, options: tuple[str, ...]):
    config = config_of("training.max_steps=3", "training.log_every=1", *options)
    train(config, tmp_path / "run")
    found = scalars(tmp_path / "run")
    assert all(math.isfinite(value) for value in found["loss/ctr"].values())
    assert ("loss/ctcvr" in found) == (config.tasks.conversion is not None)
    assert [path.name for path in Run(tmp_path / "run").checkpoints()] == ["step-00000003"]


def test_users_without_events_train_and_are_measured(config_of: ConfigOf, gaps: Path, tmp_path: Path):
    features = "features={request: [user], candidate: [item], dense: [], sequence: [item], event: []}"
    blocks = "model.long=[{type: mean}, {type: target_attention, heads: 1}]"
    config = config_of(f"dataset={gaps}", features, blocks, "loader.requests=3", "training.log_every=1")
    train(config, tmp_path / "run")
    report = evaluate(tmp_path / "run")
    assert report is not None
    empty = report.history[0]
    assert (empty.min, empty.max, empty.impressions) == (0, 1, 3 * 4 + 2 * 3)  # four users each time, two of the new
    assert report.unknown_items == 9
    assert empty.tasks["ctr"].logloss is not None


def test_early_stopping_keeps_the_best(config_of: ConfigOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    values = iter([0.6, 0.7, 0.65, 0.7, 0.9])
    monkeypatch.setattr(Trainer, "_measure", lambda self, predictions: next(values))
    options = ("training.patience=2", "training.validate_every=2", "training.keep_checkpoints=1")
    train(config_of(*options), tmp_path / "run")
    run = Run(tmp_path / "run")
    assert [path.name for path in run.checkpoints()] == ["step-00000004", "step-00000008"]
    assert run.best().name == "step-00000004"
    train(config_of(*options), tmp_path / "run", resume=True)  # and stays stopped
    assert run.checkpoints()[-1].name == "step-00000008"


def test_log_loss_is_better_when_lower(config_of: ConfigOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    values = iter([0.6, 0.5, 0.7])
    monkeypatch.setattr(Trainer, "_measure", lambda self, predictions: next(values))
    options = ("training.monitor=logloss", "training.validate_every=1", "training.max_steps=3")
    train(config_of(*options), tmp_path / "run")
    assert Run(tmp_path / "run").best().name == "step-00000002"


def test_a_table_changes_where_it_was_read_and_nowhere_else(
    config_of: ConfigOf, tmp_path: Path, read_checkpoint: Callable[[Path], dict[str, Tensor]]
):
    options = ("training.validation_split=null", "training.checkpoint_every=1", "training.max_steps=2")
    train(config_of(*options, "loader.requests=2", "loader.group=1", "loader.drop_user=0"), tmp_path / "run")
    before, after = (read_checkpoint(path) for path in Run(tmp_path / "run").checkpoints())
    name = next(key for key in before if key.startswith(".model") and "request_user.weight" in key)
    changed = (before[name] != after[name]).any(1).sum()
    assert 1 <= changed <= 2  # two requests
    for key, value in after.items():
        if key.startswith(".model") and "dense.tower" in key:
            assert not torch.equal(before[key], value)


REFUSED = {
    "tasks.click=clicked": "tasks.click: 'clicked' is not a label of .*; it has click, conversion",
    "tasks.conversion=buy": "tasks.conversion: 'buy' is not a label",
    "dataset=nowhere": "nowhere: no manifest.json; not a dataset folder",
    "features.dense=[item.prize]": "did you mean 'item.price'",
    "tables.dims={usr: 8}": "tables.dims.usr: not a pooled feature; this model has user, ",
    "tables.dims={user: 6}": "tables.dims.user: 6; must be a multiple of 4",
    "tables.pooled_sharding=[row_wise]": "tables.pooled_sharding: ",
    "loader.shards=5": "4 partitions are too few for 5 shards",
    "optimizer.lr=1e30": "step [23]: the (gradient|loss) is (nan|inf); lower optimizer.lr",
}


@pytest.mark.parametrize("option", REFUSED)
def test_refused_with_the_key_named(config_of: ConfigOf, tmp_path: Path, option: str):
    with pytest.raises(UserError, match=REFUSED[option]):
        train(config_of(option, "training.validation_split=null"), tmp_path / "run")
    if "optimizer" not in option:
        assert not (tmp_path / "run").exists()


def test_empty_splits(config_of: ConfigOf, gaps: Path, tmp_path: Path):
    lacking = gaps.with_name("no_valid")
    if not lacking.exists():
        _without_split(gaps, lacking, "valid")
    features = "features={request: [], candidate: [item], dense: [], sequence: [item], event: []}"
    small = (f"dataset={lacking}", features, "training.max_steps=1")
    train(config_of(*small), tmp_path / "run")  # nothing to validate on, and nothing asked to watch it
    with pytest.raises(UserError, match=r"training.patience: the dataset has no split 'valid'.*prepare one"):
        train(config_of(*small, "training.patience=1"), tmp_path / "other")
    with pytest.raises(UserError, match="no requests in split valid"):
        train(config_of(*small, "training.splits=[valid]", "training.validation_split=null"), tmp_path / "other")
    with pytest.raises(UserError, match=r"--split valid: not in .*; it has train, test"):
        evaluate(tmp_path / "run", "valid")


def _without_split(whole: Path, out: Path, split: str) -> None:
    out.mkdir()
    for path in whole.iterdir():
        if path.name != "manifest.json":
            (out / path.name).symlink_to(path)
    manifest = json.loads((whole / "manifest.json").read_text())
    manifest["splits"].pop(split)
    for partition in manifest["partitions"]:
        partition["requests"].pop(split, None)
    (out / "manifest.json").write_text(json.dumps(manifest))


def test_a_validation_split_of_one_class_names_the_way_out(config_of: ConfigOf, gaps: Path, tmp_path: Path):
    features = "features={request: [], candidate: [item], dense: [], sequence: [item], event: []}"
    config = config_of(f"dataset={gaps}", features, "tasks={click: never, conversion: null}")
    with pytest.raises(UserError, match=r"training.monitor: auc is undefined .* 0 of 27 impressions .*; watch logloss"):
        train(config, tmp_path / "run")


def test_a_run_folder_that_exists_is_kept(config_of: ConfigOf, trained: Path):
    before = (trained / "run.json").read_text()
    with pytest.raises(RunError, match="exists; choose another --out, or go on with that run by --resume"):
        train(config_of(), trained)
    assert (trained / "run.json").read_text() == before


def test_cuda_without_a_device(config_of: ConfigOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UserError, match=r"training.device: cuda, but torch sees no CUDA device .*set it to auto or cpu"
    ):
        train(config_of("training.device=cuda"), tmp_path / "run")


@pytest.mark.gpu
def test_trains_on_a_gpu(config_of: ConfigOf, tmp_path: Path):
    train(config_of("training.device=cuda", "training.max_steps=20"), tmp_path / "run")
    assert evaluate(tmp_path / "run") is not None


def test_the_command_reports_errors_in_one_line(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main([str(config_file), "--out", str(tmp_path / "run"), "--set", "model.short.lenght=3"])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert "model.short.lenght" in error
    assert "did you mean 'length'" in error
    assert "Traceback" not in error


def test_a_job_that_slurm_started_again_goes_on(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """TorchX has Slurm do so when a machine is lost, whether or not --resume was given."""
    command = [str(config_file), "--out", str(tmp_path / "run"), "--set", "training.checkpoint_every=2"]
    main([*command, "training.max_steps=2"])
    with pytest.raises(SystemExit):
        main([*command, "training.max_steps=4"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    main([*command, "training.max_steps=4"])
    assert [path.name for path in Run(tmp_path / "run").checkpoints()] == ["step-00000002", "step-00000004"]
