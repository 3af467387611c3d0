"""From a config to tables and a page: every cell trained and measured, once; bad ones told, changed ones refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from features.errors import UserError
from ranker.compare.bootstrap import user_draws
from ranker.compare.command import compare
from ranker.compare.folder import CompareFolder
from ranker.compare.options import Options, load_compare
from ranker.compare.plan import plan
from ranker.compare.results import gather, json_of
from ranker.compare.running import Failure, run_cells
from ranker.compare.tables import short_table
from ranker.evaluation.metrics import binary_metrics
from ranker.evaluation.stored_predictions import read_predictions
from tests.ranker.compare.conftest import InThisProcess


def run(configs: Path, out: Path, launcher: InThisProcess, **options: Any) -> tuple[list[Any], str]:
    """`ranker compare`, in this process; what failed, and what the terminal shows."""
    given = {key: options.pop(key) for key in ("readmes", "train", "recompute") if key in options}
    console = Console(record=True, width=80)
    config = load_compare(configs / "compare.yaml", Options(**options))
    return compare(config, configs, out, **given, launcher=launcher, console=console), console.export_text()


def finish(configs: Path, out: Path, launcher: InThisProcess, recompute: tuple[str, ...] = (), **options: Any) -> None:
    """The cells alone, without tables and page; none fails."""
    config = load_compare(configs / "compare.yaml", Options(**{"methods": "din,mean"} | options))
    cells, folder = plan(config, configs), CompareFolder(out)
    with folder.alone():
        folder.settle(cells, recompute)
        assert run_cells(cells, folder, config.split, launcher, config.parallel) == []


@pytest.fixture(scope="module")
def compared(once, configs: Path) -> Path:
    """Two methods, two lengths, two seeds, and a method that the dataset has not the features for."""

    def make(out: Path) -> None:
        failures, shown = run(configs, out, InThisProcess(), methods="din,mean,bad")
        out.with_suffix(".json").write_text(json.dumps([[f.cell, f.step, f.log] for f in failures]))
        out.with_suffix(".txt").write_text(shown)

    return once("compared", make)


@pytest.fixture
def copy(compared: Path, tmp_path: Path) -> Path:
    """The same, to change."""
    return shutil.copytree(compared, tmp_path / "out")


@pytest.fixture(scope="module")
def table(compared: Path) -> dict[str, Any]:
    return json.loads((compared / "table.json").read_text())


def metrics_of(out: Path, cell: str) -> dict[str, Any]:
    return json.loads((out / "cells" / cell / "metrics.json").read_text())


def test_rows_are_means_and_deviations_of_their_seeds(compared: Path, table: dict[str, Any]):
    assert [(row["row"], row["seeds"]) for row in table["rows"]] == [
        (f"{method}-L{length}", [0, 1]) for method in ("din", "mean") for length in (5, 40)
    ]
    for row in table["rows"]:
        cells = [metrics_of(compared, f"{row['row']}-s{seed}") for seed in (0, 1)]
        for task in ("ctr", "ctcvr", "cvr"):
            for name, found in row[task].items():
                values = [cell[task][name] for cell in cells]
                assert found["mean"] == pytest.approx(statistics.mean(values))
                assert found["sd"] == pytest.approx(statistics.stdev(values))
        assert [b["impressions"] for b in row["by_history_length"]] == [
            b["impressions"] for b in cells[0]["by_history_length"]
        ]
        training = row["training"]
        assert training["steps"]["mean"] == training["total_steps"]["mean"] == 3
        assert training["candidates_per_s"]["mean"] > 0
        assert training["peak_rss_bytes"]["mean"] > 2**20


def test_differences_are_those_of_users_drawn_alike(compared: Path, table: dict[str, Any]):
    """Against loops over the stored scores."""
    rows = {row["row"]: row for row in table["rows"]}
    assert (rows["din-L5"]["baseline"], rows["din-L5"]["differences"]) == (None, {})
    found = rows["mean-L40"]["differences"]["ctr.auc"]
    assert rows["mean-L40"]["baseline"] == "din-L5"
    scores = {
        name: read_predictions(compared / "cells" / name / "predictions.parquet")
        for name in ("mean-L40-s0", "mean-L40-s1", "din-L5-s0", "din-L5-s1")
    }
    users = np.unique(scores["din-L5-s0"].user)
    each: list[float] = []
    for weight in user_draws(len(users), 40, 0):
        aucs: dict[str, float] = {}
        for name, p in scores.items():
            times = weight[np.searchsorted(users, p.user)].astype(int)
            again = p.select(np.repeat(np.arange(len(p)), times))
            aucs[name] = binary_metrics(again.user, again.click, again.p_ctr).auc or 0
        mine, theirs = (statistics.mean(v for k, v in aucs.items() if k.startswith(m)) for m in ("mean", "din"))
        each.append(mine - theirs)
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(each, [0.025, 0.975])), abs=1e-12)
    value = rows["mean-L40"]["ctr"]["auc"]["mean"] - rows["din-L5"]["ctr"]["auc"]["mean"]
    assert found["value"] == pytest.approx(value)
    assert found["excludes_zero"] == (found["low"] > 0 or found["high"] < 0)


def test_costs_at_the_length_of_each_row(table: dict[str, Any]):
    for row in table["rows"]:
        assert row["cost"]["length"] == row["length"]
        assert row["cost"]["read_us"] > 0
    for costs in table["costs"].values():
        assert [cost["length"] for cost in costs] == [5, 10, 40]


def test_a_bad_cell_is_told_and_the_others_are_kept(compared: Path, table: dict[str, Any]):
    failures = json.loads(compared.with_suffix(".json").read_text())
    assert [(cell, step) for cell, step, _ in failures] == [
        *((f"bad-L{n}-s{seed}", "training") for seed in (0, 1) for n in (5, 40)), ("bad", "timing"),
    ]  # fmt: skip
    assert all("user.shoe_size" in log for _, _, log in failures)
    assert table["unfinished"] == [cell for cell, _, _ in failures[:4]]
    assert [failure["cell"] for failure in table["failed"]] == [cell for cell, _, _ in failures]


def test_what_is_finished_is_not_done_again(configs: Path, copy: Path, here: InThisProcess, table: dict[str, Any]):
    failures, _ = run(configs, copy, here, methods="din,mean")
    assert (failures, here.ran) == ([], [])
    again = json.loads((copy / "table.json").read_text())
    assert again["rows"] == table["rows"]
    assert again["costs"] == table["costs"]
    finish(configs, copy, here, seeds="0,1,2", lengths="5")
    assert [name for name, what in here.ran if what == "train"] == ["din-L5-s2", "mean-L5-s2"]


def test_a_cell_that_was_only_trained_is_measured(configs: Path, copy: Path, here: InThisProcess):
    """Killed before its evaluation was written."""
    before = metrics_of(copy, "mean-L40-s1")
    (copy / "cells/mean-L40-s1/metrics.json").unlink()
    finish(configs, copy, here)
    assert here.ran == [("mean-L40-s1", "evaluate")]
    assert metrics_of(copy, "mean-L40-s1") == before


def test_a_run_killed_as_its_folder_was_made_starts_anew(configs: Path, copy: Path, here: InThisProcess):
    folder = copy / "cells/mean-L40-s1"
    (folder / "run.json").unlink()
    (folder / "moments.json").write_text("{")
    finish(configs, copy, here)
    assert here.ran == [("mean-L40-s1", "train"), ("mean-L40-s1", "evaluate")]


def test_a_changed_config_is_refused_or_computed_again_by_name(configs: Path, copy: Path, here: InThisProcess):
    changed = {"set": ("optimizer.lr=0.02",)}
    message = r"(?s)8 cells were made otherwise.*optimizer.lr is 0.02, was 0.01.*--recompute din-L5-s0"
    with pytest.raises(UserError, match=message):
        finish(configs, copy, here, **changed)
    for _ in range(2):  # a refusal forgets nothing
        with pytest.raises(UserError, match="6 cells were made otherwise"):
            finish(configs, copy, here, ("mean-L5-*",), **changed)
        with pytest.raises(UserError, match="--recompute nothing: no such cell"):
            finish(configs, copy, here, ("*", "nothing"))
    with pytest.raises(UserError, match="--no-train forbids"):
        run(configs, copy, here, recompute=["*"], train=False)
    assert metrics_of(copy, "mean-L5-s0")["split"] == "test"
    with pytest.raises(UserError, match="--recompute nothing: no such cell; there are din-L5-s0"):
        finish(configs, copy, here, ("nothing",), **changed)
    assert here.ran == []
    finish(configs, copy, here, ("*",), **changed, methods="mean", lengths="5", baseline="mean", seeds="0")
    assert here.ran == [("mean-L5-s0", "train"), ("mean-L5-s0", "evaluate")]


def test_a_changed_dataset_is_refused(configs: Path, copy: Path, here: InThisProcess):
    path = copy / "cells/din-L5-s0/run.json"
    info = json.loads(path.read_text())
    info["dataset"]["content_hash"] = "0" * 64
    path.write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"1 cells.*\n.*din-L5-s0: .* has another content than it was trained on"):
        finish(configs, copy, here)


def test_two_comparisons_do_not_share_a_folder(configs: Path, copy: Path, here: InThisProcess):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(copy / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match="another comparison works on it"):
            finish(configs, copy, here)
        other.communicate(b"\n")
    finish(configs, copy, here)


def test_tables(configs: Path, copy: Path, here: InThisProcess, compared: Path, tmp_path: Path):
    readme = tmp_path / "README.md"
    readme.write_text(
        "a\n<!-- compare:begin -->\n<!-- compare:end -->\n<!-- compare:begin small long -->\n<!-- compare:end -->\nb"
    )
    _, shown = run(configs, copy, here, methods="din,mean", readmes=[readme], train=False)
    auc = statistics.mean(metrics_of(copy, f"mean-L40-s{seed}")["ctr"]["auc"] for seed in (0, 1))
    brief, long = (part.split("<!-- compare:end -->")[0] for part in readme.read_text().split(" -->\n")[1::2][:2])
    for text in (brief, long, (copy / "table.md").read_text(), (copy / "report.html").read_text()):
        assert f"{auc:.4f} ±" in text
    assert f"{auc:.4f}" in shown
    assert "…" not in shown  # nothing is cut in 80 columns
    for text in ((copy / "table.md").read_text(), long, (copy / "report.html").read_text()):
        for fixed in ("test: ", "3 steps", "32 requests", "embeddings 4", "seeds", "cores", "commit"):
            assert fixed in text
    rows = [line for line in (copy / "table.md").read_text().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert len(rows) == 2 + 4
    assert "oracle" in long
    assert "oracle" not in brief


class Loads(HTMLParser):
    """What a page would load, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset") and not (value or "").startswith("#"):
                self.loaded.append(value or "")
            self.loaded += [url for url in re.findall(r"url\(([^)]*)\)", value or "") if not url.startswith("#")]


def test_the_page_loads_nothing(compared: Path):
    text = (compared / "report.html").read_text()
    page = Loads()
    page.feed(text)
    assert page.loaded == []
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert "@import" not in text
    assert not re.search(r"url\(\s*['\"]?https?:", text)
    assert page.tags.count("svg") == 3 + 2 + 1 + 2  # AUC by length of three tasks, cost, history, scores
    assert page.tags.count("table") == 1 + 3 + 2
    assert "user.shoe_size" in text  # what failed
    assert "Bars: deviation over seeds." in text


def test_a_page_without_costs_says_so(configs: Path, copy: Path, here: InThisProcess):
    shutil.rmtree(copy / "speed")
    run(configs, copy, here, methods="din,mean", train=False)
    text = (copy / "report.html").read_text()
    page = Loads()
    page.feed(text)
    assert page.tags.count("svg") == 3 + 1 + 2  # AUC by length of three tasks, history, scores
    assert "none has been yet" in text


def test_a_page_of_one_seed_shows_no_deviation(configs: Path, copy: Path, here: InThisProcess):
    run(configs, copy, here, methods="din,mean", seeds="0", train=False)
    text = (copy / "report.html").read_text()
    assert "One seed" in text
    assert "Bars" not in text


def test_a_sweep_is_an_axis_of_the_table(configs: Path, tmp_path: Path, here: InThisProcess):
    options = {"methods": "attention", "lengths": "5", "seeds": "0", "baseline": "attention", "steps": 1}
    options |= {"sweep": ("model.long.0.heads=1,2",)}
    finish(configs, tmp_path, here, **options)
    config = load_compare(configs / "compare.yaml", Options(**options))
    results = gather(plan(config, configs), CompareFolder(tmp_path), config)
    assert [row["sweep"] for row in json_of(results)["rows"]] == [{"model.long.0.heads": n} for n in (1, 2)]
    table = short_table(results)
    assert table.header[:3] == ["method", "L", "model.long.0.heads"]
    assert [row[:3] for row in table.rows] == [["attention", "5", "1"], ["attention", "5", "2"]]


def test_a_difference_says_of_how_many_seeds_it_is(configs: Path, copy: Path):
    (copy / "cells/din-L5-s1/metrics.json").unlink()  # the baseline's
    config = load_compare(configs / "compare.yaml", Options())
    table = short_table(gather(plan(config, configs), CompareFolder(copy), config))
    assert [row[3].endswith("(1 of 2 seeds)") for row in table.rows] == [False, True, True, True]


def test_rows_that_were_not_finished_are_told(configs: Path, copy: Path, here: InThisProcess, tmp_path: Path):
    for seed in (0, 1):
        (copy / f"cells/mean-L40-s{seed}/metrics.json").unlink()
    readme = tmp_path / "README.md"
    readme.write_text("<!-- compare:begin -->\n<!-- compare:end -->\n")
    run(configs, copy, here, methods="din,mean", train=False, readmes=[readme])
    for text in (readme.read_text(), (copy / "table.md").read_text(), (copy / "report.html").read_text()):
        assert re.search(r"not finished(: |</dt><dd>)mean-L40\b", text)


def test_a_row_that_lacks_a_seed_says_so(configs: Path, copy: Path):
    (copy / "cells/mean-L40-s1/metrics.json").unlink()
    config = load_compare(configs / "compare.yaml", Options())
    results = gather(plan(config, configs), CompareFolder(copy), config)
    assert [row[0] for row in short_table(results).rows] == ["din", "din", "mean", "mean (1 of 2 seeds)"]
    shared = results.rows[-1].differences["ctr", "auc"].value  # of the seed that both have
    ours, theirs = (metrics_of(copy, f"{row}-s0")["ctr"]["auc"] for row in ("mean-L40", "din-L5"))
    assert shared == pytest.approx(ours - theirs)


class Together:
    """Trainings that end only when two run at a time."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)

    def train(self, config: Path, run: Path, resume: bool, log: Path) -> int:
        self.barrier.wait()
        return 3

    def evaluate(self, run: Path, split: str, log: Path) -> int:
        raise AssertionError("what was not trained is not evaluated")

    def stop(self) -> None:
        pass


def test_cells_run_in_parallel(configs: Path, tmp_path: Path):
    config = load_compare(configs / "compare.yaml", Options(methods="din", seeds="0"))
    failures = run_cells(plan(config, configs), CompareFolder(tmp_path), config.split, Together(), 2)
    assert sorted(failures) == [Failure(f"din-L{n}-s0", "training", "exit code 3") for n in (40, 5)]


class Refused(Together):
    """A scheduler that takes no job of one method."""

    def train(self, config: Path, run: Path, resume: bool, log: Path) -> int:
        if run.name.startswith("mean"):
            raise RuntimeError("the queue is full")
        log.write_text("step 1\n")
        return -signal.SIGKILL


def test_what_a_launcher_raises_is_the_cells_failure(configs: Path, tmp_path: Path):
    """And how a process ended is told beside what it said last."""
    config = load_compare(configs / "compare.yaml", Options(methods="mean,din", lengths="5", seeds="0"))
    failures = run_cells(plan(config, configs), CompareFolder(tmp_path), config.split, Refused(), 1)
    assert failures == [
        Failure("mean-L5-s0", "training", "RuntimeError: the queue is full"),
        Failure("din-L5-s0", "training", "step 1\nended by SIGKILL"),
    ]


class Ended(Together):
    """A training in which the scheduler ends the job."""

    def __init__(self) -> None:
        self.stopped = threading.Event()

    def train(self, config: Path, run: Path, resume: bool, log: Path) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        assert self.stopped.wait(60)
        return 1

    def stop(self) -> None:
        self.stopped.set()


def test_sigterm_stops_the_runs(configs: Path, tmp_path: Path):
    config = load_compare(configs / "compare.yaml", Options())
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_cells(plan(config, configs), CompareFolder(tmp_path), config.split, Ended(), 1)
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(list((tmp_path / "cells").glob("*.yaml"))) == 1  # nothing more was begun


def test_a_killed_comparison_goes_on_from_its_checkpoint(configs: Path, tmp_path: Path, here: InThisProcess):
    """SIGKILL to it and its child once the cell has a checkpoint; the same command finishes the cell."""
    out, settings = tmp_path / "out", ("training.checkpoint_every=1", "training.keep_checkpoints=99")
    options = {"methods": "mean", "lengths": "40", "seeds": "1", "baseline": "mean", "steps": 60, "set": settings}
    command = [sys.executable, "-m", "ranker.cli", "compare", str(configs / "compare.yaml"), "--out", str(out)]
    for key, value in options.items():
        command += [part for one in (value if key == "set" else [value]) for part in (f"--{key}", str(one))]
    child = subprocess.Popen(command, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    first = out / "cells/mean-L40-s1/checkpoints/step-00000001"
    try:
        until = time.monotonic() + 300
        while not first.exists():
            assert child.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    made = first.stat().st_ino
    assert not (out / "cells/mean-L40-s1/training.json").exists()
    finish(configs, out, here, **options)
    assert here.ran == [("mean-L40-s1", "resume"), ("mean-L40-s1", "evaluate")]
    assert first.stat().st_ino == made
    trained = json.loads((out / "cells/mean-L40-s1/training.json").read_text())
    assert 0 < trained["steps"] < trained["total_steps"] == 60


def test_no_cell_is_finished(configs: Path, tmp_path: Path, here: InThisProcess):
    with pytest.raises(UserError, match=r"(?s)no cell is finished; .*shoe_size"):
        run(configs, tmp_path / "out", here, methods="bad", seeds="0", lengths="5", baseline="bad")
    with pytest.raises(UserError, match="no cell is finished; leave out --no-train"):
        run(configs, tmp_path / "other", here, methods="mean", lengths="5", baseline="mean", train=False)
