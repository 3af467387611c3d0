"""HiSAC on items' content vectors: a frozen table read by item index, in training, in checkpoints and in the export."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from features.dataset import Dataset
from features.errors import UserError
from features.selection import FeatureError, resolve
from features.semantic_ids.apply import apply
from features.semantic_ids.fit import fit
from ranker.config import TrainConfig
from ranker.evaluate import evaluate
from ranker.export import export
from ranker.model import Ranker
from ranker.run import Run
from ranker.tables.embeddings import load_content
from ranker.training.trainer import train
from tests.ranker.block_configs import HISAC, UXSID
from tests.ranker.conftest import sids_config
from tests.ranker.test_blocks import batches_of, built, options_of

ConfigOf = Callable[..., TrainConfig]
Read = Callable[[Path], dict[str, Tensor]]

ON_CONTENT = HISAC.replace("}", ", z: content}")
CONTENT = "features.content=[item.sid_vector]"
WEIGHT = "tables.content.0.embeddings.content_item_sid_vector.weight"
STEPS = ("loader.requests=16", "training.max_steps=40", "training.log_every=10", "training.validation_split=null")


def vectors_of(root: Path) -> Tensor:
    """The dataset's column `[items, dz]`."""
    column = Dataset(root).items().column("item.sid_vector")
    return torch.tensor(np.array(column.to_pylist(), np.float32))


@pytest.fixture(scope="module")
def six_wide(once: Callable[..., Path], dataset: Path) -> Path:
    """Semantic IDs of content 6 wide, which is no width of FBGEMM's."""

    def make(out: Path) -> None:
        copy = Dataset(shutil.copytree(dataset, out / "dataset"))
        content = [{"type": "behaviour", "dim": 6, "min_count": 1}]
        codebook, _ = fit(sids_config(content=content), copy, out / "codebook", lambda line: None)
        apply(codebook, copy)

    return once("six_wide", make) / "dataset"


def filled(config: TrainConfig) -> Ranker:
    """Untrained, with content."""
    model, data = built(config), Dataset(config.dataset)
    load_content(model, resolve(config.features, data.manifest), data)
    return model.eval()


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad"])
def test_it_trains_resumes_is_evaluated_and_exported(
    config_of: ConfigOf, six_wide: Path, tmp_path: Path, read_checkpoint: Read, optimizer: str
):
    """The table is in the checkpoint once, as the dataset has it; an optimizer did not move it."""
    options = options_of(six_wide, ON_CONTENT, CONTENT, *STEPS, f"tables.optimizer={optimizer}")
    train(config_of(*options, "training.max_steps=20"), tmp_path / "run")
    train(config_of(*options), tmp_path / "run", resume=True)
    saved = read_checkpoint(Run(tmp_path / "run").checkpoints()[-1])[f".model.{WEIGHT}"]
    assert torch.equal(saved, torch.nn.functional.pad(vectors_of(six_wide), [0, 2]))
    assert saved.abs().sum() > 0
    evaluate(tmp_path / "run")
    assert export(tmp_path / "run", tmp_path / "export", requests=300) <= 1e-6
    served = torch.jit.load(str(tmp_path / "export" / "ranker.pt"))
    assert torch.equal(dict(served.named_parameters())[WEIGHT].detach(), saved)


def test_an_event_has_the_vector_of_its_item(config_of: ConfigOf, six_wide: Path):
    """Of the item itself, though training drops ids and knows but some of them."""
    config = config_of(*options_of(six_wide, ON_CONTENT, CONTENT))
    batch, empty = batches_of(config)
    model = filled(config)
    embedded = model.tables(batch.request, batch.candidate, batch.sequence)
    items = batch.sequence["history:item.sid_vector"].values()
    known = batch.sequence["history:item"].values()
    assert torch.equal(items[known > 0], known[known > 0])
    assert torch.equal(embedded.content, vectors_of(six_wide)[items])
    coded = batch.event_codes[:, 0] > 0
    assert embedded.content[coded].abs().sum(1).gt(0).all()
    assert not embedded.content.requires_grad
    assert "history:item.sid_vector" in empty.sequence.keys()  # noqa: SIM118


def test_content_changes_the_routing(config_of: ConfigOf, six_wide: Path):
    config = config_of(*options_of(six_wide, ON_CONTENT, CONTENT, "tables.init_scale=1"))
    batch, model = batches_of(config)[0], filled(config)
    with torch.no_grad():
        before = model(batch).logits
        model.get_parameter(WEIGHT).mul_(0.5)
        assert (model(batch).logits - before).abs().max() > 1e-4


def test_other_blocks_do_not_see_content(config_of: ConfigOf, six_wide: Path):
    """Codewords and content beside each other: each as by itself."""
    config = config_of(*options_of(six_wide, f"{UXSID}, {HISAC}, {ON_CONTENT}", CONTENT))
    batch, model = batches_of(config)[0], filled(config)
    with torch.no_grad():
        embedded = model.tables(batch.request, batch.candidate, batch.sequence)
        assert [block.content_dim for block in model.dense.long] == [0, 0, 6]
        assert embedded.content.shape == (batch.event_time.numel(), 6)


def test_without_the_feature_the_block_says_where_it_goes(config_of: ConfigOf, coded: Path, tmp_path: Path):
    message = r"model.long\[0\].z: 'content' needs item.sid_vector in features.content, which has nothing; add it there"
    with pytest.raises(UserError, match=message):
        train(config_of(*options_of(coded, ON_CONTENT)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_the_column_the_dataset_is_named(config_of: ConfigOf, dataset: Path):
    """A dataset without semantic IDs has no such vectors."""
    config = config_of(f"dataset={dataset}", CONTENT)
    with pytest.raises(FeatureError, match=r"features.content\[0\]: 'item.sid_vector' is not in the dataset"):
        resolve(config.features, Dataset(dataset).manifest)
