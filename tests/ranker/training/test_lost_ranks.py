"""Ranks do not wait for ever for one that hangs or dies: they say who waited, and at which step."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.ranker.started_ranks import start_ranks

TIMEOUT_S = 20


def train_on_this_rank(config: Path, out: Path, end: str) -> None:
    """One of two ranks, of which the second hangs or dies at its third step."""
    from features.config_file import load_config
    from ranker.config import TrainConfig
    from ranker.training import trainer

    trainer.ensure_healthy = lambda device: None
    if os.environ["RANK"] == "1":
        step = trainer.Trainer.step

        def late(self: trainer.Trainer, *rest: object) -> None:
            if self.position.step == 2:
                time.sleep(120) if end == "hangs" else os.kill(os.getpid(), signal.SIGKILL)
            step(self, *rest)  # type: ignore[arg-type]

        trainer.Trainer.step = late  # type: ignore[method-assign]
    options = (f"training.collective_timeout_s={TIMEOUT_S}", "training.validation_split=null")
    trainer.train(load_config(config, TrainConfig, options), out)


@pytest.mark.parametrize("end", ["hangs", "dies"])
def test_the_other_rank_says_where(config_file: Path, tmp_path: Path, end: str):
    both = start_ranks(2, "tests.ranker.training.test_lost_ranks", str(config_file), str(tmp_path / "run"), end)
    try:
        said = both[0].communicate(timeout=120)[1]
    finally:
        for process in both:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()
    assert both[0].returncode == 1
    assert f"rank 0 of 2, step 3: another rank died, or did not come within {TIMEOUT_S} s (training." in said


if __name__ == "__main__":
    train_on_this_rank(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
