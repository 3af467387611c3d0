"""Quality of models on a prepared dataset: trains each for several seeds, and prints mean ± standard deviation beside
the references.

    python -m tests.benchmarks.quality configs/ml1m --dataset datasets/ml1m --out runs/ml1m \\
        --models mean din target_attention --seeds 0 1 2

Runs that are already measured are not trained again, so that a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

COLUMNS = [("ctr", m) for m in ("auc", "uauc", "wuauc", "logloss", "ne", "calibration")] + [
    ("ctcvr", "auc"), ("ctcvr", "uauc"), ("cvr", "auc"), ("cvr", "uauc"),
]  # fmt: skip
TITLES = ["AUC", "UAUC", "WUAUC", "log loss", "NE", "calibration", "CTCVR AUC", "CTCVR UAUC", "CVR AUC", "CVR UAUC"]


def measure(config: Path, run: Path, settings: list[str], frozen: bool = False) -> dict[str, Any]:
    """Train and evaluate one run, what of it has not been done; its metrics, `frozen` with frozen histories."""
    metrics = run / ("metrics-frozen.json" if frozen else "metrics.json")
    if not metrics.is_file():
        run.parent.mkdir(parents=True, exist_ok=True)
        resume = ["--resume"] if run.exists() else []
        commands = [["ranker.evaluate", str(run), "--split", "test", *(["--frozen"] if frozen else [])]]
        if not (run / "metrics.json").is_file():
            commands.insert(0, ["ranker.train", str(config), "--out", str(run), *resume, "--set", *settings])
        with run.with_suffix(".log").open("a") as log:
            for command in commands:
                subprocess.run([sys.executable, "-m", *command], stdout=log, stderr=log, check=True)
    return json.loads(metrics.read_text())


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """What all benchmarks of trained runs are told: configs, dataset, folder of the runs, how many train at a time."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, help="folder of the dataset's configs")
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument(
        "--parallel", type=int, default=max(1, (os.cpu_count() or 1)), help="runs at a time, a thread each"
    )
    return parser


def cell(values: list[float | None]) -> str:
    """mean ± standard deviation of the seeds."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    mean = f"{statistics.mean(known):.4f}"
    return mean if len(known) < 2 or len(set(known)) == 1 else f"{mean} ± {statistics.stdev(known):.4f}"


def main() -> None:
    """Entry point."""
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="+", required=True, help="names of configs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--frozen", action="store_true", help="histories end at each user's first test request")
    given = parser.parse_args()

    def one(job: tuple[str, int]) -> dict[str, Any]:
        model, seed = job
        settings = [f"dataset={given.dataset}", f"seed={seed}", "training.threads=1", *given.set]
        return measure(given.configs / f"{model}.yaml", given.out / f"{model}-{seed}", settings, given.frozen)

    jobs = [(model, seed) for model in given.models for seed in given.seeds]
    with ThreadPoolExecutor(given.parallel) as pool:
        measured = dict(zip(jobs, pool.map(one, jobs), strict=True))
    print(f"{given.dataset.name}: {len(given.seeds)} seeds, mean ± standard deviation")
    print("| model | " + " | ".join(TITLES) + " |\n|" + "---|" * (len(TITLES) + 1))
    rows = {name: [tasks] for name, tasks in measured[jobs[0]]["references"].items()}
    rows |= {model: [measured[model, seed] for seed in given.seeds] for model in given.models}
    if "oracle" in measured[jobs[0]]:
        rows["oracle"] = [measured[jobs[0]]["oracle"]]
    for name, found in rows.items():
        print(f"| {name} | " + " | ".join(cell([m[task][metric] for m in found]) for task, metric in COLUMNS) + " |")


if __name__ == "__main__":
    main()
