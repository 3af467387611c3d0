"""``*.int8.pt``: the same files with tables of bytes; scores move little, or nothing is exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ranker.export import ExportError, encoder_inputs_of, export, inputs_of, probes_of, stored_blocks
from ranker.export import ways as exporting
from ranker.export.quantised import ALLOWED_AUC, ALLOWED_RMS
from tests.ranker.export.conftest import Exported
from tests.ranker.export.server import answered_elsewhere

ExportedOf = Callable[[str], Exported]
FILES = ("ranker", "user_encoder", "candidate_ranker")


@pytest.mark.parametrize("name", ["mean", "all"])
def test_scores_move_within_the_bound(exported_of: ExportedOf, name: str):
    """By something, and by the pair as by the whole."""
    ways = json.loads((exported_of(name).folder / "manifest.json").read_text())["parity"]["ways"]
    whole, pair = ways["int8 ranker"], ways["int8 pair"]
    assert 0 < whole["rms_difference"] <= whole["allowed_rms"] == ALLOWED_RMS
    assert whole["rms_difference"] <= whole["greatest_difference"] <= 0.1 < whole["allowed"] == 1
    assert abs(whole["auc_change"]) <= whole["allowed_auc"] == ALLOWED_AUC
    assert pair["against"] == "int8 ranker"
    assert pair["greatest_difference"] <= 1e-5
    assert pair["files"] == ["user_encoder.int8.pt", "candidate_ranker.int8.pt"]


@pytest.mark.parametrize("file", FILES)
def test_tables_are_bytes_and_the_rest_is_as_it_was(exported_of: ExportedOf, file: str):
    """A byte a number and eight a row, instead of four a number; frozen content vectors too."""
    exported = exported_of("all")
    floats = exported.loaded(f"{file}.pt").state_dict()
    quantised = exported.loaded(f"{file}.int8.pt").state_dict()
    tables = {name: x for name, x in floats.items() if name.startswith("tables.")}
    rows = {name: x for name, x in quantised.items() if name.startswith("tables.")}
    assert sorted(x.size(0) * (x.size(1) + 8) for x in tables.values()) == sorted(x.numel() for x in rows.values())
    assert {x.dtype for x in rows.values()} == {torch.uint8}
    dense = {name: x for name, x in floats.items() if name not in tables}
    assert quantised.keys() - rows.keys() == dense.keys()
    assert all(torch.equal(quantised[name], x) for name, x in dense.items())


def test_it_answers_where_only_torch_and_fbgemm_are_imported(exported_of: ExportedOf, tmp_path: Path):
    exported = exported_of("all")
    batch = exported.batch()
    probes, _ = probes_of(batch, stored_blocks(exported.run.config, exported.spec))
    answered_elsewhere(
        tmp_path / "requests.pt",
        (exported.folder / "ranker.int8.pt", inputs_of(batch)),
        (exported.folder / "user_encoder.int8.pt", encoder_inputs_of(batch, probes)),
    )


@pytest.mark.parametrize(
    ("bound", "said"), [("ALLOWED_RMS", "scores differ from"), ("ALLOWED_AUC", "the AUC of clicks")]
)
def test_refused_beyond_the_bounds(
    exported_of: ExportedOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, said: str
):
    run = exported_of("target_attention").run
    monkeypatch.setattr(exporting, bound, -1.0)
    with pytest.raises(ExportError, match=f"int8 ranker: {said}.*: not exported"):
        export(run.root, tmp_path / "export", requests=50)
    assert list(tmp_path.iterdir()) == []
