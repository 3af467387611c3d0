"""A run starts from another whose features read semantic IDs: the same codebook, one that has grown, another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from features.dataset import MANIFEST, Dataset
from features.semantic_ids.apply import apply
from features.semantic_ids.codebook import Codebook
from features.semantic_ids.fit import fit
from ranker.config import TrainConfig, with_start
from ranker.run import Run, RunError
from ranker.training.trainer import train
from tests.ranker.conftest import sids_config
from tests.ranker.training.next_day import OPTIONS, check_tables, next_day, started

ConfigOf = Callable[..., TrainConfig]
Read = Callable[[Path], dict[str, Tensor]]

CODED = (
    "features.candidate=[item, item.category, item.sid_path]", "features.sequence=[item, item.sid_1]",
    "features.codes=[item.sid_1, item.sid_2]", "model.long=[{type: hisac, keep: [2, 2], z: codewords}]",
)  # fmt: skip


@pytest.fixture(scope="module")
def coded_run(once: Callable[..., Path], config_of: ConfigOf, coded: Path) -> Path:
    """A run whose tables have a row for each code and prefix."""
    return once("coded_run", lambda out: train(config_of(f"dataset={coded}", *OPTIONS, *CODED), out))


def sid_tables(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tables of codes and prefixes, and their optimizer's sums."""
    return {name: value for name, value in state.items() if "item_sid" in name}


def test_codes_of_the_same_codebook_keep_their_rows(
    coded_run: Path, coded: Path, config_of: ConfigOf, tmp_path: Path, read_checkpoint: Read
):
    day = next_day(coded, tmp_path / "day")
    apply(Codebook.open(coded.with_name("codebook")), Dataset(day))
    after = started(config_of, coded_run, day, tmp_path / "run", *CODED)
    before = sid_tables(read_checkpoint(Run(coded_run).best()))
    assert len(before) == 4
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_another_codebook_is_refused_or_starts_anew(
    coded_run: Path, coded: Path, config_of: ConfigOf, tmp_path: Path, read_checkpoint: Read,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    day = Dataset(next_day(coded, tmp_path / "day"))
    codebook, _ = fit(sids_config(seed=9, levels=[5, 4]), day, tmp_path / "codebook", lambda line: None)
    apply(codebook, day)
    options = with_start((f"dataset={day.root}", *OPTIONS, *CODED), coded_run)
    with pytest.raises(RunError, match=r"semantic IDs 'sid' are of another codebook .* warm_start.codebooks=reset"):
        train(config_of(*options), tmp_path / "run")
    after = started(config_of, coded_run, day.root, tmp_path / "run", *CODED, "warm_start.codebooks=reset")
    assert "table sequence_item_sid_1: 5 rows anew ('sid' is another codebook), 4 gone" in capsys.readouterr().err
    before = read_checkpoint(Run(coded_run).best())
    assert not [name for name, value in sid_tables(after).items() if "momentum" in name and value.any()]
    assert torch.equal(after[".model.dense.tower.heads.weight"], before[".model.dense.tower.heads.weight"])
    words = after[".model.dense.long.0.block.codewords"]
    assert torch.equal(words[1:6], torch.from_numpy(Dataset(day.root).codewords("sid")[0]))
    others = config_of("features.candidate=[item, item.category]", "features.sequence=[item]")
    check_tables(before, after, others, Dataset(coded), Dataset(day.root), None)


def grown(coded: Path, out: Path, path_rows: int = 1 + 5 + 25) -> Path:
    """Another day, with one code more on each of the two levels of four."""
    day = next_day(coded, out)
    manifest = json.loads((day / MANIFEST).read_text())
    info = manifest["codebooks"]["sid"]
    path = day / f"{info['file']}.safetensors"
    words = load_file(path)
    save_file({name: np.concatenate([level, level[:1] + 1]) for name, level in words.items()}, path)
    info |= {"levels": [5, 5], "content_hash": "grown"}
    for name, size in (("sid_1", 6), ("sid_2", 6), ("sid_path", path_rows)):
        manifest["columns"]["item"][name]["size"] = size
    (day / MANIFEST).write_text(json.dumps(manifest))
    return day


def test_a_codebook_that_has_grown_keeps_the_rows_of_its_first_codes(
    coded_run: Path, coded: Path, config_of: ConfigOf, tmp_path: Path, read_checkpoint: Read
):
    after = started(config_of, coded_run, grown(coded, tmp_path / "day"), tmp_path / "run", *CODED)
    before = read_checkpoint(Run(coded_run).best())
    for name, was in sid_tables(before).items():
        now = after[name]
        kept = {row: row for row in range(5)}
        if "path" in name:
            kept |= {1 + 5 + 5 * a + b: 1 + 4 + 4 * a + b for a in range(4) for b in range(4)}
        for row in range(len(now)):
            fresh = was[0] if name.endswith(".weight") else torch.zeros_like(was[0])
            assert torch.equal(now[row], was[kept[row]] if row in kept else fresh), (name, row)


def test_what_cannot_be_compared_is_refused_or_starts_anew(
    coded_run: Path, coded: Path, config_of: ConfigOf, tmp_path: Path
):
    """Paths that are hashed now, and were not before; a codebook that the older dataset no longer has."""
    day = grown(coded, tmp_path / "day", path_rows=25)
    options = with_start((f"dataset={day}", *OPTIONS, *CODED), coded_run)
    with pytest.raises(RunError, match=r"'sid' have grown, and their paths are hashed into another number .*=reset"):
        train(config_of(*options), tmp_path / "run")
    after = started(config_of, coded_run, day, tmp_path / "run", *CODED, "warm_start.codebooks=reset")
    assert not [name for name, value in sid_tables(after).items() if "momentum" in name and value.any()]

    older = shutil.copytree(coded, tmp_path / "older")
    source = shutil.copytree(coded_run, tmp_path / "source")
    config = (source / "config.yaml").read_text()
    (source / "config.yaml").write_text(config.replace(str(coded), str(older)))
    manifest = json.loads((older / MANIFEST).read_text())
    manifest["codebooks"]["sid"]["content_hash"] = "refitted"
    (older / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"older no longer has the old one to compare\) than .*source was trained with"):
        train(config_of(*with_start((f"dataset={day}", *OPTIONS, *CODED), source)), tmp_path / "other")


def test_semantic_ids_in_the_place_of_plain_columns_are_refused(
    coded_run: Path, coded: Path, config_of: ConfigOf, tmp_path: Path
):
    source = shutil.copytree(coded_run, tmp_path / "source")
    info = json.loads((source / "run.json").read_text()) | {"codebooks": {}}
    (source / "run.json").write_text(json.dumps(info))
    with pytest.raises(RunError, match=r"features read semantic IDs sid, those of .*source none; prepare them alike"):
        train(config_of(*with_start((f"dataset={coded}", *OPTIONS, *CODED), source)), tmp_path / "run")
