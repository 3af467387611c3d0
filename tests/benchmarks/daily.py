"""Is it worth going on from yesterday's run? Day after day, three models are trained and measured on the day after:

- continued: from the day before's continued run, on the new day alone (`ranker train --from`);
- day: from scratch, on the new day alone;
- all: from scratch, on all days so far.

    RANKER_DATA=… python -m tests.benchmarks.daily configs/ebnerd/data.yaml configs/ebnerd/mean.yaml \\
        --first 2023-05-18 --days 6 --data-set 'counters=[]' --out runs/daily

A day's dataset trains on the requests of that day, with histories from before it (`split.train_from`). How a model does
on the next day is told by starting from it on that day's dataset and training nothing (`training.max_steps=0`): what it
does not know has its rows of unknown ids. Everything is done one after the other in this process; what is there already
is not done again, so that a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from features.config_file import load_config
from features.dataset import Dataset
from features.prepare import prepare
from features.schema import PrepareConfig
from ranker.config import TrainConfig, with_start
from ranker.evaluate import evaluate
from ranker.training.trainer import train
from tests.benchmarks.machine import machine

HOWS = ("continued", "day", "all")


class Measured(NamedTuple):
    """On the next day; impressions of one epoch of training."""

    auc: float
    logloss: float
    impressions: float


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="config of `ranker prepare`; its split is replaced")
    parser.add_argument("config", type=Path, help="config of `ranker train`")
    parser.add_argument("--first", type=date.fromisoformat, required=True, help="first day, UTC")
    parser.add_argument("--days", type=int, default=4, help="days that are trained on; the one after is measured too")
    parser.add_argument("--out", type=Path, required=True, help="folder of datasets and runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the train config")
    parser.add_argument("--data-set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the data config")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    days = [given.first + timedelta(days=n) for n in range(given.days + 1)]
    with (given.out / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        lines = _lines(given, days)
    print(machine("torch", "torchrec"))
    print("\n".join(lines))


def _lines(given: argparse.Namespace, days: list[date]) -> list[str]:
    out: Path = given.out
    common = [f"seed={given.seed}", "training.splits=[train]", "training.validation_split=null", *given.set]

    def dataset(first: date, last: date, name: str) -> Path:
        split = ["split.by=time", "split.valid_time=0", f"split.test_from={last + timedelta(days=1)}"]
        since = [f"split.train_from={first}"] if first != days[0] else []
        if not (out / name).exists():
            prepare(load_config(given.data, PrepareConfig, [*split, *since, *given.data_set]), out / name)
        return out / name

    def trained(name: str, data: Path, start: Path | None = None, *more: str) -> Path:
        options = [f"dataset={data}", *common, *more]
        train(load_config(given.config, TrainConfig, with_start(options, start)), out / name, resume=True)
        return out / name

    found: dict[str, list[Measured]] = {how: [] for how in HOWS}
    lines = ["| day | requests | items known + new | " + " | ".join(f"AUC, {how}" for how in HOWS) + " |"]
    lines.append("|" + "---|" * (3 + len(HOWS)))
    before: Path | None = None
    data = dataset(days[0], days[0], f"{days[0]}")
    for day, after in pairwise(days):
        next_data = dataset(after, after, f"{after}")
        start = {"continued": (data, before), "day": (data, None)}
        start["all"] = (dataset(days[0], day, f"to-{day}") if day != days[0] else data, None)
        for how, (on, source) in start.items():
            run = trained(f"{how}-{day}", on, source)
            measured = out / f"{run.name}-next" / "metrics.json"
            if not measured.is_file():
                evaluate(trained(f"{run.name}-next", next_data, run, "training.max_steps=0"), "train")
            ctr = json.loads(measured.read_text())["ctr"]
            impressions = Dataset(on).manifest.splits["train"].impressions
            found[how].append(Measured(ctr["auc"], ctr["logloss"], impressions))
        carried = json.loads((out / f"continued-{day}-next" / "run.json").read_text())["warm_start"]["tables"]
        items = carried["sequence_item"]
        known = f"{items['kept']:,} + {items['new']:,}"
        cells = [f"{found[how][-1].auc:.4f}" for how in HOWS]
        lines.append(f"| {after} | {Dataset(next_data).manifest.splits['train'].requests:,} | {known} | "
                     + " | ".join(cells) + " |")  # fmt: skip
        before, data = out / f"continued-{day}", next_data

    def mean(how: str, of: Callable[[Measured], float]) -> float:
        return statistics.mean(of(m) for m in found[how][1:])  # on the first day the three are the same

    aucs = [f"**{mean(how, lambda m: m.auc):.4f}**" for how in HOWS]
    lines.append("| mean from the second day | | | " + " | ".join(aucs) + " |")
    for how in HOWS:
        loss, impressions = mean(how, lambda m: m.logloss), mean(how, lambda m: m.impressions)
        lines.append(f"{how}: log loss {loss:.4f}, {impressions:,.0f} impressions trained on a day")
    for how in HOWS[1:]:
        gain = mean("continued", lambda m: m.auc) - mean(how, lambda m: m.auc)
        times = mean(how, lambda m: m.impressions) / mean("continued", lambda m: m.impressions)
        lines.append(f"continued against {how}: AUC {gain:+.4f}; {how} trains on {times:.2f} times the impressions")
    return lines


if __name__ == "__main__":
    main()
