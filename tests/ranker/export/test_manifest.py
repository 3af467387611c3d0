"""``manifest.json`` tells a server what it must know, as the files have it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from features.dataset import Dataset
from ranker.evaluate import restore
from ranker.export import (
    encoder_inputs_of,
    export,
    inputs_of,
    probes_of,
    ranker_inputs_of,
    short_length_of,
    stored_blocks,
)
from ranker.memory.versions import MemoryVersions, versions_of
from ranker.model import Ranker
from ranker.ranks import Ranks
from ranker.run import Run, versions
from tests.ranker.export.conftest import PAIRS, Exported

ExportedOf = Callable[[str], Exported]


def manifest_of(exported: Exported) -> dict[str, Any]:
    return json.loads((exported.folder / "manifest.json").read_text())


def typed(inputs: dict[str, Any]) -> dict[str, Any]:
    """Data types and numbers of dimensions, as the manifest writes them."""

    def of(x: Tensor | dict[str, Tensor]) -> dict[str, Any]:
        return typed(x) if isinstance(x, dict) else {"dtype": str(x.dtype).removeprefix("torch."), "dims": x.dim()}

    return {name: of(x) for name, x in inputs.items()}


@pytest.mark.parametrize("name", PAIRS)
def test_every_file_with_its_inputs_and_outputs(exported_of: ExportedOf, name: str):
    """As they really are, records among them."""
    exported = exported_of(name)
    config, spec, batch = exported.run.config, exported.spec, exported.batch()
    probes, records = probes_of(batch, stored_blocks(config, spec))
    stored = exported.loaded("user_encoder.pt")(**encoder_inputs_of(batch, probes))
    scores = ["p_ctr", "p_ctcvr", "p_cvr"]
    ranker_inputs = ranker_inputs_of(batch, spec, short_length_of(config)) | {"memory": stored | records}
    described = {
        "ranker": {"inputs": typed(inputs_of(batch)), "outputs": scores},
        "user_encoder": {"inputs": typed(encoder_inputs_of(batch, probes)), "outputs": typed(stored)},
        "candidate_ranker": {"inputs": typed(ranker_inputs), "outputs": scores},
    }
    names = {f"{what}{tables}.pt": what for what in described for tables in ("", ".int8")}
    assert manifest_of(exported)["files"] == {name: described[what] for name, what in names.items()}
    assert {file.name for file in exported.folder.iterdir()} == {*manifest_of(exported)["files"], "manifest.json"}


def test_what_a_store_keeps(exported_of: ExportedOf):
    """By block, in the versions of which readers ask for it."""
    exported = exported_of("all")
    memory = manifest_of(exported)["memory"]
    kept = [tuple(block[key] for key in ("number", "type", "per", "probe", "probe_size")) for block in memory["blocks"]]
    sizes = [feature.size for feature in exported.spec.codes]
    assert min(sizes) > 1
    assert kept == [
        (0, "mean", "request", None, None),
        (1, "uxsid", "probe", "item.sid_1", sizes[0]),
        (2, "hisac", "request", None, None),
        (3, "hytrec", "request", None, None),
        (4, "uxsid", "probe", "item.sid_2", sizes[1]),
        (5, "vql", "request", None, None),
    ]
    assert memory["short_length"] is None
    versions_read = MemoryVersions(**{name: int(version, 16) for name, version in memory["versions"].items()})
    assert versions_read == versions_of(exported.run)
    assert manifest_of(exported_of("mean"))["memory"]["short_length"] == 20


def test_what_was_compared(exported_of: ExportedOf):
    """Which requests, how far scores are apart, and the clicks' AUC of each way."""
    parity = manifest_of(exported_of("mean"))["parity"]
    assert sum(parity["splits"].values()) == parity["requests"] >= 400
    assert list(parity["splits"]) == ["test", "valid"]  # the held-out split has fewer
    assert 0.5 < parity["trainer"]["auc"] < 1
    for name, files in (("ranker", ["ranker.pt"]), ("pair", ["user_encoder.pt", "candidate_ranker.pt"])):
        way = parity["ways"][name]
        assert way["files"] == files
        assert 0 <= way["greatest_difference"] <= way["allowed"] == 1e-5
        assert way["auc"] == pytest.approx(parity["trainer"]["auc"], abs=1e-4)
        assert way["auc_change"] == way["auc"] - parity["trainer"]["auc"]


def test_the_run_its_data_and_its_features(exported_of: ExportedOf):
    exported = exported_of("mean")
    manifest, run = manifest_of(exported), exported.run
    assert manifest["keys"] == {
        "request": ["user", "user.device"],
        "candidate": ["item", "item.category", "candidate.position"],
        "sequence": [
            "history:item", "history:item.category", "history:event.action",
            "candidate:item", "candidate:item.category",
        ],
        "request_dense": [],
        "candidate_dense": ["item.price"],
        "event_dense": [],
        "codes": [],
    }  # fmt: skip
    data = Dataset(run.config.dataset)
    assert manifest["vocabulary_hash"] == data.vocabulary_hash()
    assert manifest["dataset"]["content_hash"] == data.manifest.content_hash
    assert manifest["table_sizes"]["item"] == data.manifest.known_items
    assert manifest["versions"] == versions()
    assert manifest["metrics"] == json.loads((run.root / "metrics.json").read_text())
    assert manifest["checkpoint"] == run.best().name


def test_a_checkpoint_that_becomes_the_best_during_an_export_is_not_its(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The manifest names the one whose parameters the files have, whatever the run says of itself by then."""
    first, later = Run(trained).checkpoints()[-2:]
    restored: list[Path] = []

    def best(run: Run) -> Path:
        return first if not restored else later

    def restore_(run: Run, ranks: Ranks, checkpoint: Path | None = None) -> Ranker:
        model = restore(run, ranks, checkpoint)
        restored.append(checkpoint or run.best())
        return model

    monkeypatch.setattr(Run, "best", best)
    monkeypatch.setattr("ranker.export.command.restore", restore_)
    export(trained, tmp_path / "export", requests=20)
    assert restored == [first]
    manifest = json.loads((tmp_path / "export" / "manifest.json").read_text())
    assert manifest["checkpoint"] == first.name
    versions = {name: f"{version:016x}" for name, version in versions_of(Run(trained), first)._asdict().items()}
    assert manifest["memory"]["versions"] == versions
    assert versions_of(Run(trained), first) != versions_of(Run(trained), later)
