"""`ranker memory` shows what a store holds, finds what is bad, and switches."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from ranker import cli
from ranker.memory import commands
from ranker.memory.store import open_store
from tests.ranker.memory.stored_memories import CODES, build, generation_of

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `ranker memory …`: its exit code, and all it says."""

    def memory(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ranker", "memory", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out + said.err

    return memory


@pytest.fixture
def url(tmp_path: Path) -> str:
    store = open_store(str(tmp_path))
    build(store, generation_of("a", begun_ms=1), range(3))
    build(store, generation_of("b", "int8", begun_ms=2, counts={"users": 5}, notes={"run": "runs/x"}), range(5))
    return str(tmp_path)


def test_ages_are_told_in_their_largest_unit():
    assert [commands.age(0, ms) for ms in (59_000, 90_000, 5_400_000, 200_000_000)] == [
        "59 s",
        "1.5 min",
        "1.5 h",
        "2.3 d",
    ]


def test_stats_show_every_generation(memory: Command, url: str):
    code, said = memory("stats", url)
    assert code == 0
    rows = {line.split("│")[1].strip(): line.split("│")[2:4] for line in said.splitlines() if line.startswith("│")}
    cells = {name: [cell.strip() for cell in row] for name, row in rows.items()}
    assert cells["state"] == ["finished", "current of its model"]
    assert cells["records"] == [str(3 * CODES), str(5 * CODES)]
    assert cells["dtype"] == ["float32", "int8"]
    assert cells["model"] == ["fffffffffffffffb"] * 2
    assert cells["blocks"] == ["0, by probe"] * 2
    assert cells["as of"] == ["1970-01-01 00:00:01"] * 2
    assert (cells["users"], cells["run"]) == (["", "5"], ["", "runs/x"])


def test_stats_tell_of_a_current_generation_that_is_not_there(memory: Command, url: str, tmp_path: Path):
    shutil.rmtree(tmp_path / "generations" / "b")
    code, said = memory("stats", url)
    assert code == 0
    assert "codebook 0000000000000011 are to read b, which is gone or cannot be read; switch to another" in said


def test_an_empty_store_says_so(memory: Command, tmp_path: Path):
    assert memory("stats", str(tmp_path)) == (
        0, "no generation yet (`ranker memory build RUN --store …` makes one)\n"
    )  # fmt: skip


def test_get_shows_one_record(memory: Command, url: str):
    code, said = memory("get", url, "--user", "4", "--code", "3")
    assert code == 0
    assert "generation b, user '4', block 0, code 3: key " in said
    assert "found" in said
    assert "int8; as of 1970-01-01 00:00:01" in said
    assert "values [4]: 4.00" in said
    code, said = memory("get", url, "--user", "4", "--code", "3", "--generation", "a")
    assert code == 2
    assert "generation 'a' has no record of user '4', block 0, code 3" in said
    assert memory("get", url, "--user", "2", "--generation", "a")[1].splitlines()[2] == "values [4]: 2 0 0 -0"


def test_verify_finds_what_no_reader_would_take(memory: Command, url: str, tmp_path: Path):
    assert memory("verify", url)[0] == 0
    code, said = memory("verify", url, "--sample", "7")
    assert code == 0
    assert "7 (a sample)" in said
    (key, record), (other, _) = list(open_store(url).records("a"))[:2]
    env = lmdb.open(str(tmp_path / "generations" / "b"), max_dbs=2)
    with env.begin(write=True, db=env.open_db(b"records")) as txn:
        txn.put(key.to_bytes(8, "big"), record[:60])
        txn.put(other.to_bytes(8, "big"), record)
    env.close()
    code, said = memory("verify", url)
    assert code == 1
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in said.splitlines() if line.startswith("│")]
    assert ["corrupt", "1"] in cells
    assert ["not int8", "1"] in cells
    assert ["of 60 bytes", "1"] in cells
    assert f"bad: key {key:016x}" in said
    assert memory("verify", url, "--generation", "a")[0] == 0


def test_switch_and_drop(memory: Command, url: str):
    code, said = memory("drop", url, "b")
    assert code == 2
    assert "'b' is the current one of model fffffffffffffffb, codebook 0000000000000011; switch to another" in said
    code, said = memory("switch", url, "a")
    assert code == 0
    assert "b → a" in said
    assert memory("drop", url, "b")[0] == 0
    assert [one.name for one in open_store(url).generations()] == ["a"]
    assert memory("switch", url, "b")[0] == 2


def test_a_current_generation_is_dropped_only_if_told_to(memory: Command, url: str):
    assert "with --current" in memory("drop", url, "b")[1]
    assert memory("drop", url, "b", "--current")[0] == 0
    store = open_store(url)
    assert (store.currents(), [one.name for one in store.generations()]) == ({}, ["a"])
    code, said = memory("verify", url)
    assert code == 2
    assert "none is current; name one with --generation" in said


def test_of_two_models_each_has_its_current_generation(memory: Command, url: str):
    build(open_store(url), generation_of("new", begun_ms=3, model=4), range(2))
    code, said = memory("stats", url)
    assert code == 0
    states = next(line for line in said.splitlines() if "state" in line)
    assert [cell.strip() for cell in states.split("│")[2:5]] == ["finished", *["current of its model"] * 2]
    code, said = memory("get", url, "--user", "1")
    assert code == 2
    assert "2 generations are current (new, b); name one with --generation" in said
    code, said = memory("switch", url, "a")
    assert "b → a, for servers of model fffffffffffffffb" in said
    assert open_store(url).current(generation_of(model=4).versions) == "new"
