"""From a dataset to a codebook, and from a codebook to any dataset's item table."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from features.dataset import Dataset, DatasetError
from features.errors import UserError
from features.semantic_ids.apply import apply
from features.semantic_ids.codebook import Codebook, read_manifest
from features.semantic_ids.config import SidsConfig
from features.semantic_ids.errors import SidsError
from features.semantic_ids.fit import fit
from features.semantic_ids.prefixes import Prefixes
from features.semantic_ids.report.judge import read_report
from tests.features.prepare.logs import START
from tests.features.semantic_ids.content_logs import HOUR, dataset, histories, silent

COLUMNS = {"item": {"content": {"kind": "vector"}, "group": {}}}
GROUPS, DIM = 6, 4


def centre(group: int) -> np.ndarray:
    return np.random.default_rng(group).normal(size=DIM) * 10


def items(ids: Sequence[int], without: Sequence[int] = (), seed: int = 0) -> dict[str, list[Any]]:
    """Items in groups of near vectors: item i is of group i mod 6."""
    rng = np.random.default_rng(seed)
    vectors = [None if i in without else (centre(i % GROUPS) + rng.normal(size=DIM) * 0.3).tolist() for i in ids]
    return {"item": list(ids), "content": vectors, "group": [f"g{i % GROUPS}" for i in ids]}


@pytest.fixture(autouse=True, scope="module")
def _prepared(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Datasets by what is in them: most tests want the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.PREPARED", tmp_path_factory.mktemp("prepared"))
        yield


PREPARED = Path()


def shop(folder: Path, ids: Sequence[int] = range(100, 160), without: Sequence[int] = (), seed: int = 0) -> Dataset:
    """Two users' events over all items, and a request for each; a copy of the test's own."""
    made = PREPARED / f"{min(ids)}-{max(ids)}-{'-'.join(map(str, without))}-{seed}"
    if not made.exists():
        log = histories({1: list(ids), 2: list(reversed(ids))})
        dataset(made, log, items=items(ids, without, seed), columns=COLUMNS)
    return Dataset(shutil.copytree(made / "out", folder / "out"))


def config(**changes: Any) -> SidsConfig:
    base: dict[str, Any] = {
        "content": [{"type": "vector", "column": "item.content"}],
        "levels": [GROUPS, 4],
        "threads": 1,
        "version": "first",
        "report": {"columns": ["item.group"], "events": 1000, "pictures": False},
    }
    return SidsConfig.model_validate(base | changes)


def fitted(of: Dataset, out: Path, **changes: Any) -> Codebook:
    return fit(config(**changes), of, out, silent)[0]


def column(of: Dataset, name: str) -> list[Any]:
    """Of the items by raw id."""
    table = Dataset(of.root).items()
    values = dict(zip(table.column("id").to_pylist(), table.column(f"item.{name}").to_pylist(), strict=True))
    del values[None]
    return [values[key] for key in sorted(values)]


class TestCodes:
    """What is in the item table."""

    def test_items_of_one_group_share_the_first_code_and_no_other_group_has_it(self, tmp_path: Path):
        of = shop(tmp_path)
        apply(fitted(of, tmp_path / "codebook"), of)
        first, groups = column(of, "sid_1"), column(of, "group")
        assert len(set(zip(first, groups, strict=True))) == GROUPS == len(set(first))
        assert min(first) >= 1

    def test_the_path_is_the_bag_of_the_codes_prefixes(self, tmp_path: Path):
        of = shop(tmp_path)
        apply(fitted(of, tmp_path / "codebook"), of)
        codes = np.array([column(of, "sid_1"), column(of, "sid_2")]).T - 1
        assert column(of, "sid_path") == Prefixes([GROUPS, 4], 100_000).rows(codes).tolist()

    def test_the_sum_of_an_items_codewords_is_near_its_vector(self, tmp_path: Path):
        of = shop(tmp_path)
        apply(fitted(of, tmp_path / "codebook"), of)
        of = Dataset(of.root)
        words = of.codewords("sid")
        assert [w.shape for w in words] == [(GROUPS, DIM), (4, DIM)]
        summed = sum(w[np.array(column(of, f"sid_{level}")) - 1] for level, w in enumerate(words, 1))
        vectors = np.array(column(of, "sid_vector"))
        assert np.linalg.norm(vectors - summed, axis=1).max() < 0.15 * np.linalg.norm(vectors, axis=1).min()

    def test_codewords_in_dataset_and_codebook_are_the_same(self, tmp_path: Path):
        of = shop(tmp_path)
        codebook = fitted(of, tmp_path / "codebook")
        apply(codebook, of)
        saved = load_file(tmp_path / "codebook" / "codewords.safetensors")
        for level, words in enumerate(Dataset(of.root).codewords("sid"), 1):
            np.testing.assert_array_equal(words, saved[f"level_{level}"])

    def test_items_without_content_have_the_reserved_code_and_are_counted(self, tmp_path: Path):
        of = shop(tmp_path, without=(100, 107, 133))
        info = apply(fitted(of, tmp_path / "codebook"), of)
        without = [i for i, code in zip(range(100, 160), column(of, "sid_1"), strict=True) if code == 0]
        assert without == [100, 107, 133]
        assert column(of, "sid_2")[0] == 0
        assert column(of, "sid_path")[0] == []
        assert column(of, "sid_vector")[0] == [0.0] * DIM
        assert info.without_code == {"items": 3, "train": 1}  # both requests show item 100
        assert info.impressions_without_code == {"train": (2, 2)}

    def test_the_reserved_item_has_no_code(self, tmp_path: Path):
        of = shop(tmp_path)
        apply(fitted(of, tmp_path / "codebook"), of)
        assert Dataset(of.root).items().column("item.sid_1")[0].as_py() == 0

    def test_coding_in_chunks_changes_nothing(self, tmp_path: Path):
        of, other = shop(tmp_path / "a"), shop(tmp_path / "b")
        whole = fitted(of, tmp_path / "whole")
        pieces = fitted(other, tmp_path / "pieces", chunk=7)
        apply(whole, of)
        apply(pieces, other)
        assert whole.content_hash == pieces.content_hash
        for name in ("sid_1", "sid_2", "sid_path", "sid_vector"):
            assert column(of, name) == column(other, name)


class TestNewItems:
    """Items that came after the fit."""

    def test_are_coded_without_a_new_fit(self, tmp_path: Path):
        codebook = fitted(shop(tmp_path / "before"), tmp_path / "codebook")
        later = shop(tmp_path / "later", ids=range(100, 190), seed=1)
        apply(Codebook.open(tmp_path / "codebook"), later)
        first, groups = column(later, "sid_1"), column(later, "group")
        assert len(set(zip(first, groups, strict=True))) == GROUPS
        assert Dataset(later.root).manifest.codebooks["sid"].content_hash == codebook.content_hash

    def test_items_that_training_does_not_know_do_not_move_the_codewords(self, tmp_path: Path):
        def made(name: str, stray: float) -> Dataset:
            table = items(range(100, 161))
            table["content"][-1] = [stray] * DIM
            events = histories({1: list(range(100, 160))})
            requests = {
                "user": [1, 1],
                "item": [100, 160],
                "time": [START + HOUR, START + 48 * HOUR],
                "split": ["train", "test"],
            }
            return dataset(tmp_path / name, events, requests, table, columns=COLUMNS)

        near, far = made("near", 1.0), made("far", 500.0)
        assert near.manifest.known_items < near.manifest.items
        words = [fitted(of, tmp_path / f"{of.root.parent.name}.codebook").codewords() for of in (near, far)]
        for one, other in zip(*words, strict=True):
            np.testing.assert_array_equal(one, other)
        apply(Codebook.open(tmp_path / "far.codebook"), far)
        assert column(far, "sid_1")[-1] > 0


class TestCodebook:
    """The folder."""

    def test_the_same_seed_gives_the_same_codebook_and_another_another(self, tmp_path: Path):
        of = shop(tmp_path)
        hashes = [fitted(of, tmp_path / str(i), seed=seed).content_hash for i, seed in enumerate((0, 0, 1))]
        assert hashes[0] == hashes[1] != hashes[2]

    @pytest.mark.parametrize("kind", ["rqvae", "kmeans_fsq"])
    def test_every_quantiser_goes_the_whole_way(self, tmp_path: Path, kind: str):
        of = shop(tmp_path)
        quantizer = {"type": kind, "steps": 30, "batch": 32}
        codebook = fitted(of, tmp_path / "codebook", quantizer=quantizer)
        apply(Codebook.open(tmp_path / "codebook"), of)
        assert Dataset(of.root).manifest.codebooks["sid"].content_hash == codebook.content_hash
        assert min(column(of, "sid_1")) >= 1
        assert len(column(of, "sid_vector")[0]) == Dataset(of.root).codewords("sid")[0].shape[1]

    def test_the_version_is_a_label_the_hash_tells_codebooks_apart(self, tmp_path: Path):
        of = shop(tmp_path)
        one, other = fitted(of, tmp_path / "1", version="mon"), fitted(of, tmp_path / "2", version="tue")
        assert (one.version, other.version) == ("mon", "tue")
        assert one.content_hash == other.content_hash

    def test_without_a_version_it_is_the_time_of_the_fit(self, tmp_path: Path):
        assert fitted(shop(tmp_path), tmp_path / "c", version=None).version.startswith("20")

    def test_it_says_what_it_was_fitted_on(self, tmp_path: Path):
        of = shop(tmp_path)
        fitted(of, tmp_path / "codebook")
        manifest = read_manifest(tmp_path / "codebook")
        assert manifest.fitted_on == {"name": of.manifest.name, "content_hash": of.manifest.content_hash}
        assert manifest.fitted_items == 60
        assert manifest.versions["faiss-cpu"]

    def test_the_report_is_beside_it(self, tmp_path: Path):
        fitted(shop(tmp_path, without=(100,)), tmp_path / "codebook", report={"columns": ["item.group"]})
        report = read_report(tmp_path / "codebook")
        assert report.items == 59
        assert report.items_without_content == 1
        assert report.columns[0].ami[0] == pytest.approx(1)
        for picture in ("usage", "leaves", "projection"):
            assert (tmp_path / "codebook" / "report" / f"{picture}.png").stat().st_size > 1_000
        assert (tmp_path / "codebook" / "projector" / "projector_config.pbtxt").is_file()

    def test_a_changed_state_is_refused(self, tmp_path: Path):
        fitted(shop(tmp_path), tmp_path / "codebook")
        path = tmp_path / "codebook" / "state.npz"
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        changed = next(name for name, array in arrays.items() if array.dtype == np.float32 and array.size)
        arrays[changed] = arrays[changed] + 1
        np.savez(path, **arrays)
        with pytest.raises(SidsError, match=r"state.npz: content hash .* the manifest says .* fit it again"):
            Codebook.open(tmp_path / "codebook")

    def test_a_folder_that_is_none_is_refused(self, tmp_path: Path):
        with pytest.raises(SidsError, match=r"no manifest.json; not a codebook .*ranker sids fit"):
            Codebook.open(tmp_path)
        of = shop(tmp_path)
        with pytest.raises(SidsError, match="not the manifest of a codebook"):
            Codebook.open(of.root)

    @pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: raw[:200] + b"?" + raw[201:]])
    def test_a_state_cut_off_or_with_other_bytes_is_refused(self, tmp_path: Path, damage: Callable[[bytes], bytes]):
        fitted(shop(tmp_path), tmp_path / "codebook")
        path = tmp_path / "codebook" / "state.npz"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(SidsError, match=r"state.npz: unreadable .* fit the codebook again"):
            Codebook.open(tmp_path / "codebook")

    def test_a_config_that_this_version_does_not_read_is_refused(self, tmp_path: Path):
        fitted(shop(tmp_path), tmp_path / "codebook")
        path = tmp_path / "codebook" / "manifest.json"
        raw = json.loads(path.read_text())
        path.write_text(json.dumps(raw | {"config": raw["config"] | {"levels": [1]}}))
        with pytest.raises(
            SidsError, match=r"manifest.json: config: this version cannot read levels.0: .* fit the codebook again"
        ):
            Codebook.open(tmp_path / "codebook")

    def test_another_format_is_refused(self, tmp_path: Path):
        fitted(shop(tmp_path), tmp_path / "codebook")
        path = tmp_path / "codebook" / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 9}))
        with pytest.raises(SidsError, match="format_version 9, this version reads 1: fit it again"):
            Codebook.open(tmp_path / "codebook")

    def test_an_existing_folder_is_not_overwritten(self, tmp_path: Path):
        of = shop(tmp_path)
        fitted(of, tmp_path / "codebook")
        before = (tmp_path / "codebook" / "manifest.json").read_text()
        with pytest.raises(UserError, match="codebook: exists"):
            fitted(of, tmp_path / "codebook", seed=1)
        assert (tmp_path / "codebook" / "manifest.json").read_text() == before

    def test_a_fit_that_fails_leaves_nothing(self, tmp_path: Path):
        of = shop(tmp_path)
        with pytest.raises(SidsError, match="levels"):
            fitted(of, tmp_path / "codebook", levels=[64, 4])  # 60 items
        assert [p.name for p in tmp_path.iterdir() if "codebook" in p.name] == []


class TestBadInput:
    """Refused by name, with the remedy."""

    def test_no_content_at_all(self, tmp_path: Path):
        of = shop(tmp_path, without=range(101, 160))
        table = of.items().column("item.content").to_pylist()
        assert sum(any(vector) for vector in table) == 1
        with pytest.raises(SidsError, match=r"levels\[0\].* 1 "):
            fitted(of, tmp_path / "codebook")

    def test_a_column_of_the_report_that_is_none(self, tmp_path: Path):
        with pytest.raises(SidsError, match=r"report.columns\[0\]: 'item.grop' .* did you mean 'item.group'"):
            fitted(shop(tmp_path), tmp_path / "codebook", report={"columns": ["item.grop"]})

    def test_codes_that_no_scalars_make_are_refused_before_any_work(self, tmp_path: Path):
        said: list[str] = []
        wrong = config(quantizer={"type": "kmeans_fsq"}, levels=[4, 34])
        with pytest.raises(SidsError, match=r"quantizer.fsq_levels: 34 codes"):
            fit(wrong, shop(tmp_path), tmp_path / "codebook", said.append)
        assert said == []

    def test_a_dataset_without_the_content_column(self, tmp_path: Path):
        fitted(shop(tmp_path / "a"), tmp_path / "codebook")
        bare = dataset(tmp_path / "b", histories({1: [100, 101]}))
        with pytest.raises(SidsError, match=r"item\.content"):
            apply(Codebook.open(tmp_path / "codebook"), bare)
        assert Dataset(bare.root).manifest == bare.manifest

    def test_a_name_that_another_column_has(self, tmp_path: Path):
        columns = {"item": {"content": {"kind": "vector"}, "sid_1": {"source": '"group"'}}}
        of = dataset(tmp_path, histories({1: range(100, 160)}), items=items(range(100, 160)), columns=columns)
        codebook = fitted(of, tmp_path / "codebook", report={})
        with pytest.raises(SidsError, match=r"column item.sid_1 already.*choose another `name` than 'sid'"):
            apply(codebook, of)


class TestApply:
    """A dataset's codes are replaced whole or not at all."""

    def test_another_codebook_of_the_name_replaces_the_codes_and_their_files(self, tmp_path: Path):
        of = shop(tmp_path)
        apply(fitted(of, tmp_path / "1"), of)
        second = fitted(of, tmp_path / "2", levels=[3, 3, 3], version="second")
        apply(second, of)
        now = Dataset(of.root).manifest
        assert now.codebooks["sid"].version == "second"
        assert [n for n in now.columns["item"] if n.startswith("sid")] == [
            "sid_1", "sid_2", "sid_3", "sid_path", "sid_vector",
        ]  # fmt: skip
        stem = f"sid-{second.content_hash[:12]}"
        assert sorted(p.name for p in (of.root / "semantic_ids").iterdir()) == [f"{stem}.arrow", f"{stem}.safetensors"]

    def test_two_codebooks_of_different_names_live_side_by_side(self, tmp_path: Path):
        of = shop(tmp_path)
        apply(fitted(of, tmp_path / "1"), of)
        apply(fitted(of, tmp_path / "2", name="coarse", levels=[2]), of)
        assert set(Dataset(of.root).manifest.codebooks) == {"sid", "coarse"}
        assert set(column(of, "coarse_1")) == {1, 2}
        assert len(set(column(of, "sid_1"))) == GROUPS

    def test_the_datasets_own_hash_stays(self, tmp_path: Path):
        of = shop(tmp_path)
        apply(fitted(of, tmp_path / "1"), of)
        assert Dataset(of.root).manifest.content_hash == of.manifest.content_hash
        assert Dataset(of.root).vocabulary_hash() == of.vocabulary_hash()

    def test_a_failure_on_the_way_leaves_the_old_codes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        of = shop(tmp_path)
        apply(fitted(of, tmp_path / "1"), of)
        before, codes = Dataset(of.root).manifest, column(of, "sid_1")
        second = fitted(of, tmp_path / "2", levels=[3])

        def full(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("features.semantic_ids.apply.write_arrow", full)
            with pytest.raises(SidsError, match=r"out: cannot write semantic IDs \(No space left .*free space"):
                apply(second, of)
        assert Dataset(of.root).manifest == before
        assert column(of, "sid_1") == codes
        assert not [p for p in (of.root / "semantic_ids").iterdir() if p.name.startswith(".")]

    def test_what_a_killed_process_left_is_removed(self, tmp_path: Path):
        of = shop(tmp_path)
        left = of.root / "semantic_ids" / ".partial"
        left.mkdir(parents=True)
        (left / "codes.arrow").write_text("half")
        apply(fitted(of, tmp_path / "1"), of)
        assert not left.exists()
        assert len(column(of, "sid_1")) == 60

    def test_a_place_that_cannot_be_written_is_named(self, tmp_path: Path):
        of = shop(tmp_path)
        codebook = fitted(of, tmp_path / "1")
        (of.root / "semantic_ids").write_text("no folder")
        with pytest.raises(SidsError, match=r"semantic_ids/\.partial: cannot write semantic IDs \(Not a directory\)"):
            apply(codebook, of)
        assert Dataset(of.root).manifest == of.manifest

    def test_two_at_a_time_are_refused(self, tmp_path: Path):
        of = shop(tmp_path)
        codebook = fitted(of, tmp_path / "1")
        folder = os.open(of.root, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)
        try:
            with pytest.raises(SidsError, match="another process is applying"):
                apply(codebook, of)
        finally:
            os.close(folder)
        apply(codebook, of)

    def test_a_missing_file_of_codes_is_named(self, tmp_path: Path):
        of = shop(tmp_path)
        apply(fitted(of, tmp_path / "1"), of)
        shutil.rmtree(of.root / "semantic_ids")
        with pytest.raises(DatasetError, match=r"semantic_ids/sid-.*arrow: unreadable"):
            Dataset(of.root).items()
        with pytest.raises(DatasetError, match=r"semantic_ids/sid-.*safetensors: unreadable"):
            Dataset(of.root).codewords("sid")

    def test_codewords_that_are_not_there_are_refused_by_name(self, tmp_path: Path):
        with pytest.raises(DatasetError, match=r"no semantic IDs 'sid'; it has none: run `ranker sids apply"):
            shop(tmp_path).codewords("sid")
