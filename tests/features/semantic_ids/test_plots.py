"""Pictures are drawn, whatever the codes; the projector's files hold what was given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from matplotlib import image, pyplot
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
from werkzeug.test import Client

from features.semantic_ids.report.plots import plot_leaves, plot_projection, plot_usage, principal_plane
from features.semantic_ids.report.projector import write_projector

BLUE = (0x3B, 0x6F, 0xB5)


def pixels(path: Path) -> np.ndarray:
    """`[height, width, 3]`, 0 … 255; the picture has a size to be read at and something on it."""
    assert path.read_bytes().startswith(b"\x89PNG")
    found = (image.imread(path)[..., :3] * 255).round().astype(int)
    assert min(found.shape[:2]) >= 300
    assert (found < 250).any(2).mean() > 0.005
    return found


def share_of(picture: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((np.abs(picture - colour).max(2) <= 3).mean())


def some_items(n: int = 300, d: int = 8, codes: int = 70) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    first = rng.integers(0, codes, n) * rng.integers(0, 2, n)  # code 0 is frequent
    vectors = rng.normal(size=(codes, d))[first] * 5 + rng.normal(size=(n, d))
    return vectors.astype(np.float32), np.stack([first, rng.integers(0, 4, n)], 1).astype(np.int32)


def test_usage_fills_a_panel_where_codes_are_evenly_used_and_half_of_it_where_half_are_dead(tmp_path: Path):
    plot_usage([np.full(64, 10)], tmp_path / "even.png")
    plot_usage([np.repeat([10, 0], 32)], tmp_path / "dead.png")
    even, dead = pixels(tmp_path / "even.png"), pixels(tmp_path / "dead.png")
    assert share_of(dead, BLUE) == pytest.approx(share_of(even, BLUE) / 2, rel=0.05)


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param([np.array([3, 1])] * 5, id="two rows of panels"),
        pytest.param([np.array([0, 0])], id="no items"),
        pytest.param([np.concatenate([[100_000], np.ones(5_000, np.int64), np.zeros(3_000, np.int64)])], id="skewed"),
    ],
)
def test_usage_is_drawn_of(counts: list[np.ndarray], tmp_path: Path):
    plot_usage(counts, tmp_path / "new" / "usage.png")
    pixels(tmp_path / "new" / "usage.png")


def test_the_projection_colours_frequent_codes_and_leaves_the_rest_grey(tmp_path: Path):
    vectors, codes = some_items()
    plot_projection(vectors, codes, tmp_path / "many.png")
    plot_projection(vectors, codes % 2, tmp_path / "two.png")
    many, two = pixels(tmp_path / "many.png"), pixels(tmp_path / "two.png")

    def hues(picture: np.ndarray) -> int:
        strong = picture[(picture.max(2) - picture.min(2)) > 60] // 32
        counts = np.unique(strong, axis=0, return_counts=True)[1]
        return int((counts > 20).sum())

    assert hues(many) > 2 * hues(two) > 0


def test_the_same_items_give_the_same_picture(tmp_path: Path):
    vectors, codes = some_items()
    for name in ("one.png", "other.png"):
        plot_projection(vectors, codes, tmp_path / name)
    assert (pixels(tmp_path / "one.png") == pixels(tmp_path / "other.png")).all()


@pytest.mark.parametrize(("n", "d"), [(1, 3), (20, 1), (5, 2)])
def test_few_items_and_narrow_vectors_are_drawn(n: int, d: int, tmp_path: Path):
    vectors, codes = some_items(n, d)
    plot_projection(vectors, codes, tmp_path / "small.png")
    pixels(tmp_path / "small.png")


def test_the_plane_is_that_of_most_variance():
    rng = np.random.default_rng(0)
    scales = np.array([1.0, 9.0, 0.1, 4.0])
    vectors = (rng.normal(size=(2_000, 4)) * scales + 50).astype(np.float32)
    points, explained = principal_plane(vectors)
    assert points.mean(0) == pytest.approx([0, 0], abs=1e-3)
    assert points.std(0) == pytest.approx([9, 4], rel=0.05)
    assert explained == pytest.approx((81 / 98.01, 16 / 98.01), abs=0.02)
    assert np.corrcoef(points[:, 0], vectors[:, 1])[0, 1] == pytest.approx(1, abs=1e-3)  # its sign is fixed


@pytest.mark.parametrize("sizes", [[1], [1, 1, 2, 3], [1, 2, 70, 5_000], []])
def test_leaves_are_drawn(sizes: list[int], tmp_path: Path):
    plot_leaves(np.array(sizes, np.int64), tmp_path / "leaves.png")
    pixels(tmp_path / "leaves.png")


def test_no_figure_stays_open(tmp_path: Path):
    plot_usage([np.array([3, 1])], tmp_path / "usage.png")
    assert pyplot.get_fignums() == []


def test_the_projector_reads_vectors_and_metadata_that_were_given(tmp_path: Path):
    vectors, codes = some_items(20, 3)
    items = np.arange(100, 120)
    titles = np.array(["a\tb", "two\nlines", "", *["plain"] * 17])
    write_projector(tmp_path, vectors, items, codes, {"item.title": titles, "item.genre": np.arange(20)})

    config = text_format.Parse((tmp_path / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (embedding,) = config.embeddings
    read = np.loadtxt(tmp_path / embedding.tensor_path, delimiter="\t", dtype=np.float32)
    assert (read == vectors).all()
    header, *rows = [line.split("\t") for line in (tmp_path / embedding.metadata_path).read_text().splitlines()]
    assert header == ["item", "code 1", "code 2", "item.title", "item.genre"]
    assert [row[3] for row in rows[:4]] == ["a b", "two lines", "–", "plain"]
    assert [[int(row[i]) for i in (0, 1, 2, 4)] for row in rows] == [
        [100 + i, *codes[i].tolist(), i] for i in range(20)
    ]


def test_tensorboard_serves_what_was_written(tmp_path: Path):
    vectors, codes = some_items(20, 3)
    write_projector(tmp_path, vectors, np.arange(20), codes, {"item.genre": np.arange(20)})
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    runs.Reload()
    context = TBContext(logdir=str(tmp_path), data_provider=MultiplexerDataProvider(runs, str(tmp_path)))
    served = ProjectorPlugin(context).get_plugin_apps()

    def get(route: str, query: str) -> bytes:
        return Client(served[route]).get(f"/?run=.&{query}").data

    (embedding,) = json.loads(get("/info", ""))["embeddings"]
    assert embedding["tensorShape"] == [20, 3]
    name = embedding["tensorName"]
    assert np.frombuffer(get("/tensor", f"name={name}"), np.float32).tolist() == vectors.ravel().tolist()
    assert get("/metadata", f"name={name}").decode().splitlines()[0] == "item\tcode 1\tcode 2\titem.genre"
