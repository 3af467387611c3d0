"""No half dataset is ever taken for a whole one: kill, full disk, an output that exists."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from features.dataset import MANIFEST, Dataset, DatasetError
from features.prepare import partitions, pipeline, prepare
from features.publish import PublishError
from tests.features.prepare import logs

_CHILD = """
import sys, time
from pathlib import Path
from features.prepare import pipeline, prepare
from features.schema import PrepareConfig
write = pipeline.write_partition
def slow(engine, layout, root, number):
    if number == 1:
        Path(sys.argv[3]).touch()
        time.sleep(120)
    return write(engine, layout, root, number)
pipeline.write_partition = slow
prepare(PrepareConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
"""


def interrupted(folder: Path, out: Path) -> subprocess.Popen[bytes]:
    """A preparation of its own process that has written its first partition and hangs."""
    config, reached = logs.small(folder / "in"), folder / "reached"
    process = subprocess.Popen([sys.executable, "-c", _CHILD, config.model_dump_json(), str(out), str(reached)])
    deadline = time.monotonic() + 60
    while not reached.exists():
        assert process.poll() is None, "the child ended before it was to be killed"
        assert time.monotonic() < deadline, "the child did not get that far"
        time.sleep(0.05)
    return process


def test_a_killed_preparation_leaves_no_dataset_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = interrupted(tmp_path, out)
    try:
        with pytest.raises(PublishError, match="another process is writing it"):
            prepare(logs.small(tmp_path / "in"), out)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    (left,) = tmp_path.glob(".out.partial-*")
    assert not list(left.rglob(MANIFEST))
    for folder in (left, left / "new"):
        with pytest.raises(DatasetError, match="did not finish"):
            Dataset(folder)
    prepare(logs.small(tmp_path / "in"), out)
    assert not list(tmp_path.glob(".out.partial-*"))
    Dataset(out)


@pytest.mark.parametrize("number", [0, 1])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    write = partitions.write_arrow

    def full(table: object, path: Path) -> None:
        if path.parent.name == f"{number:05d}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(table, path)

    monkeypatch.setattr(partitions, "write_arrow", full)
    config, out = logs.small(tmp_path / "in"), tmp_path / "out"
    with pytest.raises(PublishError, match=r"No space left on device.*free space"):
        prepare(config, out)
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_disk_that_fills_at_the_manifest_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(pipeline, "hash_files", full)
    config, out = logs.small(tmp_path / "in"), tmp_path / "out"
    with pytest.raises(PublishError, match="quota"):
        prepare(config, out)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_an_output_that_exists_is_refused_and_untouched(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    match kind:
        case "file":
            out.write_text("mine")
        case "dangling link":
            out.symlink_to(tmp_path / "nowhere")
        case _:
            out.mkdir()
            if kind == "folder":
                (out / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PublishError, match="exists; choose another"):
        prepare(logs.config({"type": "synthetic"}), out)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_whose_folder_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PublishError, match="cannot write"):
        prepare(logs.config({"type": "synthetic"}), tmp_path / "file" / "out")


def test_parent_folders_are_made(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    prepare(logs.small(tmp_path / "in"), out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
