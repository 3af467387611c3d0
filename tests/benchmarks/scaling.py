"""Training speed of two processes over that of one, a thread each, and what is lost between.

    python -m tests.benchmarks.scaling configs/synthetic/uxsid.yaml --dataset demo/dataset [--steps 60]

Weak scaling, as one adds machines: every rank has batches of the same size. One process with one thread, the named
alternative, then two with a thread each under torchrun, in turn; the machine needs as many idle cores. Ideal is 2. The
parts of a step (:mod:`ranker.training.clock`, the first rank's) say where the rest goes: *communication* is waiting for
what the ranks exchange, *ranks* is waiting for the slower one, and what any other part takes more in two processes is
the exchange's own work (ids sorted by rank, buffers filled) and the memory bandwidth that both share.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ranker.training.clock import PARTS
from tests.benchmarks.machine import machine
from tests.free_ports import free_port
from tests.ranker.started_ranks import ROOT


def scalars_of(run: Path, skipped: int) -> dict[str, float]:
    """Medians over the run's log lines of what was told of speed and times, the first `skipped` left out."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(("speed/", "time_ms/"))]
    return {tag: statistics.median(e.value for e in events.Scalars(tag)[skipped:]) for tag in tags}


def train(ranks: int, given: argparse.Namespace, out: Path) -> dict[str, float]:
    """Train a run with so many ranks; what it told."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "-m", "ranker.train", str(given.config), "--out", str(out),
        "--set", f"dataset={given.dataset.absolute()}", "--set", f"training.max_steps={given.steps}",
        "--set", "training.log_every=10", "--set", "training.threads=1", "--set", "training.device=cpu",
        "--set", "training.validation_split=null", "--set", "training.epochs=99", "--set", "loader.workers=0",
        *(word for option in given.set for word in ("--set", option)),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return scalars_of(out, skipped=1)


def main() -> None:
    """Print machine, sizes, both speeds, their ratio, times by part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(machine("torch", "torchrec", threads=1))
    print(f"{given.config}, {' '.join(given.set) or 'as it is'}: {given.rounds} rounds of {given.steps} steps")
    told: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds):
            for ranks, rounds in told.items():
                rounds.append(train(ranks, given, Path(folder) / f"{ranks}-{number}"))
    found = {
        ranks: {tag: statistics.median(one[tag] for one in rounds) for tag in rounds[0]}
        for ranks, rounds in told.items()
    }
    speeds = [[one["speed/candidates_per_s"] for one in told[ranks]] for ranks in (1, 2)]
    ratios = [two / one for one, two in zip(*speeds, strict=True)]
    for ranks, of in found.items():
        parts = ", ".join(f"{part} {of[f'time_ms/{part}']:.1f}" for part in PARTS)
        step = 1000 / of["speed/steps_per_s"]
        speed = f"{of['speed/candidates_per_s']:,.0f} candidates/s; a step {step:.1f} ms"
        print(f"{ranks} rank{'s'[: ranks - 1]}: {speed}: {parts}")
    print(f"two over one: {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}), of 2")
    lost = {part: found[2][f"time_ms/{part}"] - found[1][f"time_ms/{part}"] for part in PARTS}
    print("a step of two ranks takes longer by, ms: " + ", ".join(f"{part} {ms:+.1f}" for part, ms in lost.items()))
    two = found[2]
    share = two["time_ms/communication"] * two["speed/steps_per_s"] / 1000
    print(f"of it, two ranks wait {share:.0%} for what they exchange (communication); one rank has nobody to wait for")


if __name__ == "__main__":
    main()
