"""Two ranks train long-sequence blocks as one rank does; a rank that has run out of requests goes along."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from features.config_file import load_config
from features.dataset import Dataset
from ranker.config import TrainConfig
from ranker.evaluate import evaluate
from ranker.run import Run
from ranker.training import checkpoint
from ranker.training.trainer import train
from tests.ranker.block_configs import ALL, HISAC, HYTREC, METHODS, NEXT, SEARCHES, UXSID
from tests.ranker.started_ranks import keep_one_process_group, run_ranks_to_the_end
from tests.ranker.test_blocks import options_of
from tests.ranker.test_content import CONTENT, ON_CONTENT, vectors_of

ConfigOf = Callable[..., TrainConfig]
Read = Callable[[Path], dict[str, Tensor]]
Scalars = Callable[[Path], dict[str, dict[int, float]]]

EVERY_STEP = (
    "loader.shards=2", "training.log_every=1", "training.validation_split=null", "training.checkpoint_every=1",
    "training.keep_checkpoints=99", CONTENT, "tables.sequence_sharding=[row_wise]",
)  # fmt: skip
FROM_ONE = ("loader.requests=64", "training.max_steps=4")
UNEVEN = ("loader.requests=340", "training.epochs=2")
# Searches by logits find all events here: where the K-th and the next differ by rounding, what is found may differ.
ALL_FOUND = {name: SEARCHES[name].replace("top: 5", "top: 500") for name in ("sim_soft", "twin")}
REFERENCES = {**METHODS, **ALL_FOUND}.values()
WITHOUT = UXSID.replace("}", ", ortho_weight: 0}")
RUNS = {
    "without auxiliary": f"{WITHOUT}, {HISAC}, {ON_CONTENT}, {HYTREC}",
    "with auxiliary": ALL,
    "references": ", ".join(REFERENCES),
}


def scenarios(model: Path, coded: Path, out: Path) -> None:
    """What each of two ranks runs, in one process group."""
    keep_one_process_group()
    for name, blocks in RUNS.items():
        options = options_of(coded, blocks, *EVERY_STEP, *FROM_ONE)
        train(load_config(model, TrainConfig, options), out / "two" / name, resume=True)
    uneven = options_of(coded, f"{UXSID}, {HISAC}, {NEXT}", *EVERY_STEP, *UNEVEN)
    train(load_config(model, TrainConfig, uneven), out / "uneven")
    evaluate(out / "uneven")
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def runs(once: Callable[..., Path], config_of: ConfigOf, config_file: Path, coded: Path) -> Path:
    """Runs of one rank and of two that start from the same checkpoint."""

    def make(out: Path) -> None:
        for name, blocks in RUNS.items():
            options = options_of(coded, blocks, *EVERY_STEP, *FROM_ONE)
            train(config_of(*options, "training.max_steps=1"), out / "one" / name)
            shutil.copytree(out / "one" / name, out / "two" / name)
            train(config_of(*options), out / "one" / name, resume=True)
        run_ranks_to_the_end(2, "tests.ranker.test_blocks_ranks", str(config_file), str(coded), str(out))

    return once("block_ranks", make)


def same_training(runs: Path, name: str, scalars: Scalars, read_checkpoint: Read) -> None:
    one, two = scalars(runs / "one" / name), scalars(runs / "two" / name)
    for tag in ("loss/ctr", "loss/ctcvr", "loss/auxiliary", "train/gradient_norm"):
        assert list(one[tag]) == list(two[tag]) == [1, 2, 3, 4]
        np.testing.assert_allclose(list(two[tag].values()), list(one[tag].values()), rtol=1e-5, err_msg=tag)
    expected, found = (read_checkpoint(Run(runs / ranks / name).checkpoints()[-1]) for ranks in ("one", "two"))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=2e-6, msg=key)


def test_two_ranks_train_the_three_blocks_as_one(runs: Path, scalars: Scalars, read_checkpoint: Read):
    same_training(runs, "without auxiliary", scalars, read_checkpoint)


def test_two_ranks_train_with_the_auxiliary_loss_as_one(runs: Path, scalars: Scalars, read_checkpoint: Read):
    same_training(runs, "with auxiliary", scalars, read_checkpoint)


def test_two_ranks_train_the_references_as_one(runs: Path, scalars: Scalars, read_checkpoint: Read):
    """With their own losses."""
    same_training(runs, "references", scalars, read_checkpoint)


def test_content_vectors_over_two_ranks_are_the_datasets(runs: Path, coded: Path, read_checkpoint: Read):
    found = read_checkpoint(Run(runs / "two" / "without auxiliary").checkpoints()[-1])
    assert torch.equal(found[".model.tables.content.0.embeddings.content_item_sid_vector.weight"], vectors_of(coded))


def test_a_rank_without_requests_left_goes_along(runs: Path, coded: Path, scalars: Scalars):
    """Batches of the two shards differ in number; all losses stay finite to the end of both epochs."""
    partitions = Dataset(coded).manifest.partitions
    requests = [sum(end - begin for s, (begin, end) in p.requests.items() if s == "train") for p in partitions]
    batches = [sum(-(-requests[p] // 340) for p in (r, r + 2)) for r in (0, 1)]
    assert batches[0] != batches[1]
    assert checkpoint.position_of(Run(runs / "uneven").checkpoints()[-1]).step == 2 * max(batches)
    assert all(np.isfinite(list(values.values())).all() for values in scalars(runs / "uneven").values())


def test_the_first_rank_reports_its_blocks(runs: Path):
    """Of tables that are on both ranks; the sample is of the first one's requests."""
    found = json.loads((runs / "uneven" / "metrics.json").read_text())
    assert [block["type"] for block in found["blocks"]] == ["uxsid", "hisac", "hytrec"]
    for block in found["blocks"]:
        assert 100 < block["requests"] < found["requests"]
        assert all(figure["value"] is not None for figure in block["figures"].values())
    assert found["blocks"][2]["figures"]["HR@10"]["what"] == "next items among 40"


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenarios(*(Path(argument) for argument in sys.argv[1:]))
