"""Dataset folders that cannot be read are refused by file and column; Arrow's other types are read all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from features.dataset import MANIFEST, Dataset, DatasetError, hash_files, partition_dir, read_arrow, write_arrow
from features.loader import Loader, LoaderConfig
from features.views import File, copy_windows, ranges
from tests.features.datasets import everything, literal, records, rewrite, write_dataset


class TestFolder:
    def test_without_a_manifest_it_is_no_dataset(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"no manifest.json; not a dataset folder.*ranker prepare"):
            Dataset(tmp_path)

    def test_another_format_version_is_refused(self, tmp_path: Path) -> None:
        write_dataset(tmp_path, partitions=1)
        manifest = json.loads((tmp_path / MANIFEST).read_text()) | {"format_version": 99}
        (tmp_path / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(DatasetError, match=r"manifest.json: format_version 99, this version reads 1"):
            Dataset(tmp_path)

    def test_splits_without_requests_are_not_listed(self, tmp_path: Path) -> None:
        assert write_dataset(tmp_path / "a", seed=1).manifest.filled_splits() == ["train", "valid", "test"]
        assert write_dataset(tmp_path / "b", users=0).manifest.filled_splits() == []

    def test_the_content_hash_follows_content_not_place(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            write_dataset(tmp_path / name, seed=1)
        write_dataset(tmp_path / "c", seed=2)
        a, b, c = (hash_files(tmp_path / name, {}) for name in "abc")
        assert a == b
        assert a != c
        assert a != hash_files(tmp_path / "a", {"columns": 1})


class TestFiles:
    def test_a_table_comes_back_as_views(self, tmp_path: Path) -> None:
        write_arrow(pa.table({"x": pa.chunked_array([[1, 2], [3]])}), tmp_path / "a" / "x.arrow")
        before = pa.total_allocated_bytes()
        batch = read_arrow(tmp_path / "a" / "x.arrow")
        assert batch.column("x").to_pylist() == [1, 2, 3]
        assert pa.total_allocated_bytes() == before

    def test_an_empty_table_keeps_its_columns(self, tmp_path: Path) -> None:
        write_arrow(pa.table({"x": pa.array([], pa.list_(pa.int32()))}), tmp_path / "x.arrow")
        assert File(read_arrow(tmp_path / "x.arrow"), tmp_path).lists("x").offsets.tolist() == [0]

    @pytest.mark.parametrize("size", [0, 7, 100, -4])
    def test_a_truncated_file_is_refused_by_name(self, tmp_path: Path, size: int) -> None:
        dataset = write_dataset(tmp_path, seed=1, partitions=2)
        for read, path in (
            (lambda: dataset.histories(1), partition_dir(tmp_path, 1) / "histories.arrow"),
            (lambda: dataset.requests(0), partition_dir(tmp_path, 0) / "requests.arrow"),
            (dataset.items, tmp_path / "items.arrow"),
        ):
            path.write_bytes(path.read_bytes()[:size])
            with pytest.raises(DatasetError, match=rf"{path}: unreadable .*ranker prepare"):
                read()

    def test_a_missing_file_is_refused_by_name(self, tmp_path: Path) -> None:
        dataset = write_dataset(tmp_path, partitions=1)
        path = tmp_path / "items.arrow"
        path.unlink()
        with pytest.raises(DatasetError, match=rf"{path}: unreadable"):
            dataset.items()

    def test_a_file_of_several_batches_is_refused(self, tmp_path: Path) -> None:
        table = pa.table({"x": [1, 2]})
        with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
        with pytest.raises(DatasetError, match=r"x.arrow: 2 record batches, expected 1"):
            read_arrow(tmp_path / "x.arrow")

    def test_the_loader_names_the_file_it_cannot_read(self, tmp_path: Path) -> None:
        dataset = write_dataset(tmp_path, seed=1, partitions=1)
        path = partition_dir(tmp_path, 0) / "histories.arrow"
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(DatasetError, match=rf"{path}: unreadable"):
            next(iter(Loader(dataset, ("train",), everything(dataset), LoaderConfig(workers=0)).batches()))


def file(**columns: pa.Array) -> File:
    """A file of these columns."""
    return File(pa.RecordBatch.from_pydict(columns), Path("some.arrow"))


class TestColumns:
    def test_offsets_beyond_the_elements_are_refused(self) -> None:
        offsets = np.array([0, 2, 3], np.int32)
        buffers = [None, pa.py_buffer(offsets)]
        column = pa.Array.from_buffers(pa.list_(pa.int32()), 2, buffers, children=[pa.array([1, 2, 3], pa.int32())])
        broken = file(x=column)
        offsets[2] = 9
        with pytest.raises(DatasetError, match=r"some.arrow: column 'x' is broken .*ranker prepare"):
            broken.lists("x")

    @pytest.mark.parametrize(
        "column",
        [
            pa.array([1, 2, 3], pa.int8()),
            pa.array([1.5, 2.0, 3.0], pa.float64()),
            pa.array([True, False, True]),
            pa.array([9, 1, 2, 3, 9], pa.int32()).slice(1, 3),
            pa.array([False, True, True, False]).slice(1),
        ],
    )
    def test_values_of_any_number_type(self, column: pa.Array) -> None:
        assert file(x=column).flat("x").tolist() == [float(x) for x in column.to_pylist()]

    @pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.float32()), pa.list_(pa.bool_())])
    def test_lists_of_any_kind_and_slice(self, kind: pa.DataType) -> None:
        whole = pa.array([[1, 0], [], [1], [1, 1, 0], []], pa.list_(pa.int8())).cast(kind)
        for column in (whole, whole.slice(1), whole.slice(2, 2), whole.slice(4), whole.slice(5)):
            view = file(x=column).lists("x")
            listed = [view.values[a:b].tolist() for a, b in zip(view.offsets, view.offsets[1:], strict=False)]
            assert listed == column.to_pylist()
            rows = np.arange(len(column))[::-1]
            values, lengths = view.rows(rows)
            assert values.tolist() == [x for row in column.to_pylist()[::-1] for x in row]
            assert lengths.tolist() == [len(row) for row in column.to_pylist()[::-1]]

    def test_columns_are_views(self) -> None:
        column = pa.array([[1, 2], [3]], pa.list_(pa.int32()))
        assert file(x=column).lists("x").values.ctypes.data == column.values.buffers()[1].address

    @pytest.mark.parametrize(
        ("name", "ask", "message"),
        [
            ("y", "flat", "column 'y' is missing; columns: x, l, n, m, k"),
            ("l", "flat", "column 'l' holds lists where one value a row is expected"),
            ("x", "lists", "column 'x' is int64 where lists are expected"),
            ("n", "flat", "column 'n' has 1 nulls"),
            ("m", "lists", "column 'm' has 1 nulls"),
            ("k", "lists", "column 'k' has 2 nulls"),
        ],
    )
    def test_what_does_not_fit_is_refused_by_name(self, name: str, ask: str, message: str) -> None:
        made = file(
            x=pa.array([1, 2]),
            l=pa.array([[1], [2]]),
            n=pa.array([1, None]),
            m=pa.array([[1], None]),
            k=pa.array([[1, None], [None]]),
        )
        with pytest.raises(DatasetError, match=f"some.arrow: {message}.*ranker prepare"):
            getattr(made, ask)(name)

    def test_lists_of_other_lengths_than_their_siblings_are_refused(self) -> None:
        made = file(item=pa.array([[1, 2], [3]]), time=pa.array([[1], [3]]))
        with pytest.raises(DatasetError, match="column 'time' has 2 elements, item has 3"):
            made.elements("time", like="item")


@pytest.mark.parametrize("longest", [3, 20, 1000])
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.float32, np.float64])
def test_windows_and_ranges_equal_slices(longest: int, dtype: type[np.generic]) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 100, 3000).astype(dtype)
    values.flags.writeable = False
    for count in (0, 1, 2, 50):
        start = rng.integers(0, 3000, count)
        end = np.minimum(start + rng.integers(0, longest, count), 3000)
        expected = [x for a, b in zip(start, end, strict=True) for x in values[a:b].tolist()]
        copied = copy_windows(values, start, end)
        assert copied.dtype == dtype
        assert copied.tolist() == expected
        assert values[ranges(start, end - start)].tolist() == expected


@pytest.mark.parametrize("large", [False, True])
def test_the_loader_reads_labels_of_any_number_type_and_large_lists(tmp_path: Path, large: bool) -> None:
    dataset = write_dataset(tmp_path, seed=1, partitions=2)
    selection = everything(dataset)
    expected = literal(dataset, selection, ("train",))
    lists: Any = pa.large_list if large else pa.list_
    kinds = {
        "label.click": pa.bool_(),
        "label.conversion": pa.int8(),
        "oracle.click": pa.float64(),
        "items": pa.int64(),
    }
    for p in range(2):
        requests = dataset.requests(p)
        columns = {name: requests.column(name).cast(lists(kind)) for name, kind in kinds.items()}
        rewrite(partition_dir(tmp_path, p) / "requests.arrow", columns)
    found = {}
    for batch in Loader(dataset, ("train",), selection, LoaderConfig(workers=0)).batches():
        found |= records(batch, selection)
    for now, record in expected.items():
        assert found[now]["labels"] == record["labels"]
        assert found[now]["oracles"] == record["oracles"]
        assert found[now]["target"] == record["target"]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format_version": 1}'])
def test_a_broken_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(DatasetError, match=r"(?s)manifest\.json: .*run `ranker prepare` again"):
        Dataset(tmp_path)
