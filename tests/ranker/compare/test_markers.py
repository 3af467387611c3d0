"""A table goes between its markers and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from features.errors import UserError
from ranker.compare.markers import fill

PAGE = """# Title

<!-- compare:begin -->
old
<!-- compare:end -->

between
  <!-- compare:begin ml1m long -->
<!-- compare:end -->
<!-- compare:begin other -->
theirs
<!-- compare:end -->
end"""


def test_each_block_gets_its_own(tmp_path: Path):
    path = tmp_path / "README.md"
    path.write_text(PAGE)
    fill(path, "ml1m", "SHORT\n", "LONG\nLONG\n")
    expected = PAGE.replace("old", "SHORT").replace("ml1m long -->\n", "ml1m long -->\nLONG\nLONG\n")
    assert path.read_text() == expected
    fill(path, "ml1m", "SHORT", "LONG\nLONG")
    assert path.read_text() == expected  # twice is once
    fill(path, "other", "A", "B")
    assert path.read_text() == expected.replace("SHORT", "A").replace("theirs", "A")
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "no block for ml1m; put the lines <!-- compare:begin ml1m -->"),
        ("<!-- compare:begin other -->\n<!-- compare:end -->", "no block for ml1m"),
        ("<!-- compare:begin -->\n", "comment 1 has no partner"),
        ("<!-- compare:end -->\n<!-- compare:begin -->\n", "comment 1 has no partner"),
        ("<!-- compare:begin -->\n<!-- compare:begin -->\n<!-- compare:end -->\n", "comment 1 has no partner"),
    ],
)
def test_a_page_without_a_place_is_refused_and_left_as_it_is(tmp_path: Path, text: str, message: str):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        fill(path, "ml1m", "s", "l")
    assert path.read_text() == text


def test_no_page(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist; make it"):
        fill(tmp_path / "README.md", "ml1m", "s", "l")
