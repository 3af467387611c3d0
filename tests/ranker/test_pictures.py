"""`ranker picture`: what is drawn is what the blocks compute for one request of a trained run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image, pyplot
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.figure import Figure
from torch import Tensor

from features.dataset import Dataset
from features.errors import UserError
from features.semantic_ids.apply import apply
from features.semantic_ids.config import SidsConfig
from features.semantic_ids.fit import fit
from features.views import Partition, item_file
from ranker import cli
from ranker.blocks import Block
from ranker.config import TrainConfig
from ranker.longseq import HiSAC, HyTRec, UxSID
from ranker.longseq.protocol import History, Probes
from ranker.ops.votes import naive_tree_agents
from ranker.pictures import hisac, hytrec, picture, uxsid
from ranker.pictures.canvas import age, bin_means, bins_of
from ranker.pictures.command import open_request
from ranker.pictures.shown import EVENTS, GROUPS, Shown, choose
from ranker.ranks import join_ranks
from ranker.run import Run
from ranker.training.trainer import train

ConfigOf = Callable[..., TrainConfig]
Once = Callable[[str, Callable[[Path], object]], Path]
BLOCKS = (
    "[{type: mean}, {type: uxsid, anchors: 4}, {type: hisac, keep: [3, 2]}, "
    "{type: hytrec, layers: 3, ratio: 2, short_length: 10}]"
)
SIDS = {
    "content": [{"type": "behaviour", "dim": 4, "min_count": 1}],
    "levels": [4, 4],
    "report": {"pictures": False},
}


@pytest.fixture(scope="module")
def run(once: Once, dataset: Path, config_of: ConfigOf) -> Path:
    """Six steps of a model with every block, on the small dataset with codes."""

    def make(out: Path) -> None:
        coded = shutil.copytree(dataset, out.with_name("pictured_dataset"))
        codebook, _ = fit(SidsConfig.model_validate(SIDS), Dataset(coded), out.with_name("sids"), lambda line: None)
        apply(codebook, Dataset(coded))
        features = "features={sequence: [item, item.sid_1], codes: [item.sid_1, item.sid_2]}"
        train(config_of(f"dataset={coded}", features, f"model.long={BLOCKS}", "training.max_steps=6"), out)

    return once("pictured", make)


@pytest.fixture(scope="module")
def opened(run: Path) -> tuple[list[Block], Shown]:
    """The run's blocks and the request that it would show."""
    with join_ranks("cpu", 1) as ranks:
        ranker, shown = open_request(Run(run), "test", None, ranks)
    return list(ranker.dense.long), shown  # type: ignore[arg-type]


def given_to(block: Block, shown: Shown) -> tuple[History, Probes]:
    found = block.inputs(shown.history, shown.target)
    return found.history, found.probes


def mesh_of(figure: Figure, panel: int) -> np.ndarray:
    """The values of a panel's heat map."""
    mesh = next(c for c in figure.axes[panel].collections if isinstance(c, QuadMesh))
    return np.asarray(mesh.get_array())


def within_the_scale(share: np.ndarray) -> np.ndarray:
    """Shares as the heat map cuts off the rare ones that would take its whole scale."""
    reach = np.clip(np.quantile(share, 0.995), 2, 100)
    return np.clip(share, 1 / reach, reach)


def dots_of(figure: Figure, panel: int) -> set[tuple[int, int]]:
    """(row, event) of a heat map's dots."""
    dots = next(c for c in figure.axes[panel].collections if isinstance(c, PathCollection))
    return {(int(y), int(x)) for x, y in np.asarray(dots.get_offsets())}


def test_the_command_writes_a_picture_of_each_block(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "pictures"
    monkeypatch.setattr(sys, "argv", ["ranker", "picture", str(run), "--out", str(out), "--request", "7"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    written = sorted(path.name for path in out.iterdir())
    assert written == ["1-uxsid-test-7.png", "2-hisac-test-7.png", "3-hytrec-test-7.png"]
    for name in written:
        pixels = image.imread(out / name)[..., :3]
        assert min(pixels.shape[:2]) > 400
        assert 0.02 < (pixels < 0.99).any(-1).mean() < 0.98, name
    assert pyplot.get_fignums() == []


def test_the_shown_request_is_the_one_that_the_split_has(opened: tuple[list[Block], Shown], run: Path):
    _, shown = opened
    data = Run(run).dataset()
    number = shown.number
    for index, info in enumerate(data.manifest.partitions):
        begin, end = info.requests["test"]
        if number < end - begin:
            requests = Partition(data, index).requests
            item, _ = requests.lists("items").rows(np.array([begin + number]))
            assert shown.item == data.values_of("item", item).tolist()
            assert shown.clicked == [bool(x) for x in requests.lists("label.click").rows(np.array([begin + number]))[0]]
            assert int(shown.history.end - shown.history.start) == requests.flat("history_end")[begin + number]
            return
        number -= end - begin
    raise AssertionError("the split has no such request")


def test_the_request_chosen_has_several_codes_and_a_long_history(opened: tuple[list[Block], Shown], run: Path):
    """Beside a loop over all requests."""
    _, shown = opened
    data = Run(run).dataset()
    code = item_file(data).flat("item.sid_1")
    groups: list[int] = []
    lengths: list[int] = []
    for index, info in enumerate(data.manifest.partitions):
        batch = data.requests(index).slice(info.requests["test"][0], np.diff(info.requests["test"])[0])
        groups += [len({int(code[i]) for i in items}) for items in batch.column("items").to_pylist()]
        lengths += batch.column("history_end").to_pylist()
    allowed = [i for i in range(len(groups)) if groups[i] >= min(GROUPS, max(groups))]
    assert 0 < len(allowed) < len(groups)
    assert shown.number == min(allowed, key=lambda i: abs(lengths[i] - EVENTS))
    assert choose(data, "test", "item") == min(range(len(groups)), key=lambda i: abs(lengths[i] - EVENTS))


@torch.no_grad()
def test_uxsid_draws_the_blocks_attention(opened: tuple[list[Block], Shown]):
    blocks, shown = opened
    block = blocks[1]
    assert isinstance(block.block, UxSID)
    history, probes = given_to(block, shown)
    weights = block.block.attention(history, probes)[0]
    events = weights.probes.size(1)
    for rows in weights:
        torch.testing.assert_close(rows.sum(1), torch.ones(len(rows)))
    figure = uxsid.draw(block, shown)
    np.testing.assert_allclose(mesh_of(figure, 0), within_the_scale(weights.probes.numpy() * events), rtol=1e-5)
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [row.split(":")[0] for row in rows] == [str(code) for code in probes.code.tolist()]
    assert sum(row.count("*") for row in rows) == sum(shown.clicked)
    own = shown.history.code[:, 0].unsqueeze(0) == probes.code.unsqueeze(1)
    assert dots_of(figure, 0) == {tuple(pair) for pair in own.nonzero().tolist()}
    assert "Int.R@10" in figure.axes[0].get_title()
    anchors = weights.anchors.numpy()
    order = sorted(range(4), key=lambda k: float(anchors[k] @ np.arange(events)))
    np.testing.assert_allclose(mesh_of(figure, 1), within_the_scale(anchors[order] * events), rtol=1e-5)
    assert [label.get_text().split()[0] for label in figure.axes[1].get_yticklabels()] == [str(k) for k in order]


def test_int_r_is_the_share_of_own_events_among_the_ten_most_attended(opened: tuple[list[Block], Shown]):
    blocks, shown = opened
    history, probes = given_to(blocks[1], shown)
    weights = blocks[1].block.attention(history, probes)[0].probes  # type: ignore[operator]
    code = shown.history.code[:, 0]
    pairs = zip(weights, probes.code, strict=True)
    shares = [float((code[row.topk(10).indices] == probe).float().mean()) for row, probe in pairs]
    mean = float(torch.tensor(shares).mean())  # in float32, as the picture's: .825 is rounded by the last bit
    assert f"Int.R@10 {mean:.2f}" in uxsid.draw(blocks[1], shown).axes[0].get_title()


def test_coverage_of_the_anchors():
    even, single = np.full(8, 1 / 8), np.eye(8)[2]
    np.testing.assert_allclose(uxsid.effective_events(np.stack([even, single])), [8, 1])
    np.testing.assert_allclose(uxsid.coverage(np.stack([even, single])), [1, 1, 8, 1, 1, 1, 1, 1])


def test_hisac_draws_the_tree_of_the_definition(opened: tuple[list[Block], Shown]):
    blocks, shown = opened
    block = blocks[2]
    assert isinstance(block.block, HiSAC)
    history, _ = given_to(block, shown)
    agents = naive_tree_agents(history.code, history.time, history.start, history.end, [3, 2])[0]
    levels = hisac.places(block.block.tree(history))
    assert {(p.code, p.votes) for p in levels[1] if p.kept} == set(agents)
    assert {p.code for p in levels[0] if p.kept} == {code[:1] for code, _ in agents}
    assert any(not p.kept for p in levels[1])
    bars = [bar for bar in hisac.draw(block, shown).axes[0].patches if bar.get_height() > 0.5]  # type: ignore[attr-defined]
    drawn = {(bar.get_x(), bar.get_width(), bar.get_hatch() is None) for bar in bars}  # type: ignore[attr-defined]
    assert drawn == {(p.left, p.votes, p.kept) for level in levels for p in level}


def test_children_stand_below_their_parents_the_kept_first(opened: tuple[list[Block], Shown]):
    blocks, shown = opened
    history, _ = given_to(blocks[2], shown)
    parents, leaves = hisac.places(blocks[2].block.tree(history))  # type: ignore[operator]
    for parent in parents:
        children = sorted((p for p in leaves if p.code[:1] == parent.code), key=lambda p: p.left)
        edges = np.cumsum([parent.left, *(p.votes for p in children)])
        assert [p.left for p in children] == edges[:-1].tolist()
        assert edges[-1] == parent.left + parent.votes
        assert [p.kept for p in children] == sorted((p.kept for p in children), reverse=True)


def test_without_voting_every_leaf_is_kept_up_to_the_most(opened: tuple[list[Block], Shown]):
    blocks, shown = opened
    history, _ = given_to(blocks[2], shown)
    words = [torch.nn.functional.pad(torch.randn(4, 4), [0, 0, 1, 0]) for _ in range(2)]
    all_of = HiSAC(history.x.size(1), words, keep=[1, 1], voting=False).tree(history)
    assert all(bool(nodes.kept.all()) for nodes in all_of)
    three = HiSAC(history.x.size(1), words, keep=[1, 1], voting=False, most_leaves=3).tree(history)
    assert int(three[1].kept.sum()) == 3
    assert {c[0] for c in three[1].code[three[1].kept].tolist()} == {
        c[0] for c in three[0].code[three[0].kept].tolist()
    }


def test_hisac_draws_the_blocks_routing(opened: tuple[list[Block], Shown]):
    blocks, shown = opened
    block = blocks[2]
    assert isinstance(block.block, HiSAC)
    history, _ = given_to(block, shown)
    agents = block.block.agents_of(history)
    weights, own = hisac.routing_of(block.block, history, agents)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
    order = sorted(range(len(weights)), key=lambda a: -int(agents.votes[a]))
    figure = hisac.draw(block, shown)
    share = weights[order].numpy() * weights.size(1)
    np.testing.assert_allclose(mesh_of(figure, 1), within_the_scale(share), rtol=1e-5)
    assert dots_of(figure, 1) == {tuple(pair) for pair in own[order].nonzero().tolist()}
    assert own.sum(1).tolist() == agents.votes.tolist()


def literal_gates(block: HyTRec, x: Tensor, tau: Tensor) -> list[Tensor]:
    """g of the first layer, token by token: step 4 of the methods."""
    layer = block.layers[0]
    y = layer.norm(block.event(x))  # type: ignore[operator]
    a = torch.sigmoid(layer.balance)  # type: ignore[arg-type]
    gates: list[Tensor] = []
    for t in range(len(y)):
        deviation = y[t] - y[: t + 1].mean(0)
        dynamic = torch.sigmoid(layer.dynamic(torch.cat([y[t], deviation]))) * tau[t]  # type: ignore[operator]
        gates.append(a * dynamic + (1 - a) * torch.sigmoid(layer.static(y[t])))  # type: ignore[operator]
    return gates


@torch.no_grad()
def test_hytrec_draws_gates_decay_and_erase_strength(opened: tuple[list[Block], Shown]):
    blocks, shown = opened
    block = blocks[3]
    assert isinstance(block.block, HyTRec)
    history, _ = given_to(block, shown)
    found = block.block.gates(history)
    tokens = int(history.end - history.start) - 10
    tau = torch.exp(-(history.now - history.time[:tokens]).double() / (7 * 86400e3)).float()
    torch.testing.assert_close(found.decay, tau)
    torch.testing.assert_close(
        found.layers[0].gate, torch.stack(literal_gates(block.block, history.x[:tokens], tau)), rtol=1e-4, atol=1e-5
    )
    assert [layer.erase.shape for layer in found.layers] == [(tokens, 2)] * 2
    figure = hytrec.draw(block, shown)
    edges = bins_of(tokens, hytrec.LINES)
    for axes, layer in zip(figure.axes, found.layers, strict=True):
        expected = (layer.gate.mean(1), layer.erase.mean(1), found.decay)
        assert len(axes.lines) == len(expected)
        for line, values in zip(axes.lines, expected, strict=True):
            np.testing.assert_allclose(np.asarray(line.get_ydata()), bin_means(values.numpy(), edges), rtol=1e-5)


def test_with_state_decay_the_picture_shows_what_the_state_keeps(opened: tuple[list[Block], Shown]):
    _, shown = opened
    block = HyTRec(shown.history.x.size(1), decay="state", short_length=10).eval()
    decay = block.gates(shown.history).decay
    since = shown.history.time[: len(decay)].diff().double() / (7 * 86400e3)
    torch.testing.assert_close(decay, torch.cat([torch.ones(1), torch.exp(-since).float()]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"request": 100_000}, r"--request 100000: test has the requests 0 … \d+"),
        ({"request": -1}, "--request -1: test has the requests 0"),
    ],
)
def test_a_request_that_is_not_there_is_refused(run: Path, tmp_path: Path, options: dict[str, int], message: str):
    with pytest.raises(UserError, match=message):
        picture(run, tmp_path / "pictures", **options)
    assert not (tmp_path / "pictures").exists()


def test_a_run_without_such_a_block_names_what_it_has(trained: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"model\.long has mean; there are pictures of uxsid, hisac, hytrec"):
        picture(trained, tmp_path / "pictures")


def test_short_histories_say_so_and_empty_ones_are_refused(gaps: Path, config_of: ConfigOf, tmp_path: Path):
    features = "features={request: [user], candidate: [item], dense: [], sequence: [item], event: []}"
    block = "model.long=[{type: hytrec, layers: 1, short_length: 20}]"
    train(config_of(f"dataset={gaps}", features, block, "training.max_steps=2"), tmp_path / "run")
    out = tmp_path / "pictures"
    lengths = [
        end
        for index, info in enumerate(Dataset(gaps).manifest.partitions)
        for end in Dataset(gaps).requests(index).column("history_end").to_pylist()[slice(*info.requests["test"])]
    ]
    with pytest.raises(UserError, match=rf"--request {lengths.index(0)}: it has no history; choose another"):
        picture(tmp_path / "run", out, request=lengths.index(0))
    assert not out.exists()
    (path,) = picture(tmp_path / "run", out)
    assert path.is_file()
    with join_ranks("cpu", 1) as ranks:
        ranker, shown = open_request(Run(tmp_path / "run"), "test", None, ranks)
        figure = hytrec.draw(ranker.dense.long[0], shown)  # type: ignore[arg-type]
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "no event before the latest 20: the long branch has nothing to read"
    ]


@given(st.integers(1, 3000), st.integers(1, 600))
def test_bins_share_the_events_evenly_and_keep_their_weight(events: int, most: int):
    edges = bins_of(events, most)
    sizes = np.diff(edges)
    assert (edges[0], edges[-1]) == (0, events)
    assert len(sizes) == min(events, most)
    assert sizes.max() - sizes.min() <= 1
    weights = np.random.default_rng(events).dirichlet(np.ones(events), 2)
    np.testing.assert_allclose((bin_means(weights, edges) * sizes).sum(1), 1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59, "59 s"), (60, "1 min"), (5400, "1.5 h"), (36 * 3600, "1.5 d"), (56.2 * 86400, "56 d")],
)
def test_ages(seconds: float, text: str):
    assert age(seconds) == text
