"""What the end of a build leaves of the generations before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ranker.memory.generation import conclude
from ranker.memory.reader import MemoryReader
from ranker.memory.store import MemoryStore, open_store
from tests.ranker.memory.stored_memories import VERSIONS, build, expected, generation_of, probes_of, put


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return open_store(str(tmp_path))


def concluded(store: MemoryStore, name: str, at: int, keep: int = 1, switch: bool = True, **changes: object) -> None:
    """A build of two users, as `ranker memory build` ends it."""
    generation = generation_of(name, begun_ms=at, **changes)
    writer = store.begin(generation)
    put(writer, range(2), versions=generation.versions)
    writer.close()
    conclude(store, generation.model_copy(update={"finished_ms": at}), switch, keep)


def names(store: MemoryStore) -> list[str]:
    return [one.name for one in store.generations()]


def test_a_newly_trained_models_build_takes_nothing_from_servers_of_the_old(
    store: MemoryStore, capsys: pytest.CaptureFixture[str]
):
    concluded(store, "old", 1)
    concluded(store, "new", 2, keep=0, model=4)
    concluded(store, "newer", 3, keep=0, model=4)
    concluded(store, "newest", 4, keep=0, model=4)
    assert names(store) == ["old", "newer", "newest"]
    reader = MemoryReader(store.url, {0: "probe"}, VERSIONS)
    assert torch.equal(reader.read([1], probes_of(1))["0.values"], expected([1]))
    reader.close()
    said = capsys.readouterr()
    assert f"`ranker memory drop {store.url} old --current` removes it" in said.out + said.err


def test_other_models_generations_that_nobody_reads_are_told_of_and_stay(
    store: MemoryStore, capsys: pytest.CaptureFixture[str]
):
    concluded(store, "tried", 1, switch=False, model=4)
    concluded(store, "mine", 2, keep=0)
    assert names(store) == ["tried", "mine"]
    said = capsys.readouterr()
    assert f"`ranker memory drop {store.url} tried` removes it" in said.out + said.err


@pytest.mark.parametrize("keep", [0, 1])
def test_the_generation_that_was_in_service_stays_after_a_roll_back(store: MemoryStore, keep: int):
    concluded(store, "a", 1)
    concluded(store, "b", 2)
    store.switch("a")
    concluded(store, "c", 3, keep)
    assert store.current(VERSIONS) == "c"
    assert names(store) == ["a", "c"]


def test_the_newest_are_kept_beside_it(store: MemoryStore):
    for at, name in enumerate("abcd"):
        concluded(store, name, at + 1, keep=2)
    assert names(store) == ["b", "c", "d"]


def test_unfinished_generations_stay(store: MemoryStore):
    store.begin(generation_of("begun", begun_ms=1)).close()
    concluded(store, "a", 2, keep=0)
    assert names(store) == ["begun", "a"]


def test_what_another_writes_stays_and_the_build_ends_well(store: MemoryStore):
    build(store, generation_of("a", begun_ms=1), [1])
    build(store, generation_of("b", begun_ms=2), [1])
    with store.lease("a"):
        concluded(store, "c", 3, keep=0)
    assert names(store) == ["a", "b", "c"]
