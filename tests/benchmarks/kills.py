"""Ranks killed at random steps of a training run, half of them in the midst of a checkpoint: is the end the same?

    python -m tests.benchmarks.kills configs/synthetic/uxsid.yaml --dataset demo/dataset --kills 20

Each kill is a SIGKILL to one rank of a run of its own; torchrun's agent starts all again, and they go on from the last
whole checkpoint. Prints, for each, whether the last checkpoint (model and both optimisers) is that of an undisturbed
run to the last bit, and the seconds it cost.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from torch import Tensor

from ranker.run import Run
from tests.benchmarks.machine import machine
from tests.ranker.conftest import state_of
from tests.ranker.training.killed_ranks import Kill, differences, run_ranks


def tensors(run: Path) -> dict[str, Tensor]:
    """What a run's last checkpoint holds."""
    return state_of(Run(run).checkpoints()[-1])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    options = [
        f"dataset={given.dataset.absolute()}", f"training.max_steps={given.steps}", "training.checkpoint_every=5",
        "training.validation_split=null", "training.threads=1", "training.device=cpu", "model.tower.dropout=0.2",
        "loader.drop_item=0.1", "loader.requests=32",
    ]  # fmt: skip
    print(machine("torch", "torchrec", threads=1))
    print(f"{given.config}: {given.ranks} ranks, {given.steps} steps, a checkpoint every 5")
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        began = time.perf_counter()
        run_ranks(given.config, root / "undisturbed", options, ranks=given.ranks)
        alone = time.perf_counter() - began
        wanted = tensors(root / "undisturbed")
        print(f"undisturbed: {alone:.0f} s, {len(wanted)} tensors")
        for i in range(given.kills):
            place = ("step", "checkpoint")[i % 2]
            kill = Kill(draw.randrange(given.ranks), draw.randrange(given.steps - 5 * (i % 2)), place)
            began = time.perf_counter()
            run_ranks(given.config, root / str(i), options, kill, given.ranks)
            changed = differences(tensors(root / str(i)), wanted)
            different += bool(changed)
            cost = (time.perf_counter() - began) / alone
            print(f"{kill}: {'differs: ' + ', '.join(changed[:3]) if changed else 'the same'}, {cost:.1f} × the time")
    print(f"{given.kills - different} of {given.kills} ended as the undisturbed run, to the last bit")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
