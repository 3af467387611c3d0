"""What `ranker evaluate` says of the blocks is what loops over requests, probes and events find."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from features.dataset import Dataset
from features.selection import resolve
from ranker.config import TrainConfig
from ranker.evaluate import evaluate
from ranker.evaluation.diagnostics import Items, Sample, diagnose, first_requests, measures_of
from ranker.evaluation.predict import selection_of
from ranker.evaluation.report import BlockReport, Figure, metrics_json, print_report
from ranker.longseq import History, Target
from ranker.model import Ranker, plain_of
from ranker.ops.votes import naive_tree_agents
from ranker.ranks import Ranks
from ranker.training.trainer import train
from tests.ranker.block_configs import HISAC, HYTREC, NEXT, UXSID
from tests.ranker.evaluation.test_report import report
from tests.ranker.test_blocks import batches_of, built, options_of

ConfigOf = Callable[..., TrainConfig]
ALONE = Ranks(0, 1, 1, torch.device("cpu"))
REQUESTS = 12


def some_requests(config: TrainConfig) -> tuple[Ranker, Sample]:
    """A ranker and requests of which one has no events and some events and candidates have no codes."""
    model = built(config).eval()
    batch, _ = batches_of(config)
    batch.event_codes[::7] = 0
    batch.candidate_codes[::5] = 0
    batch.end[3] = batch.start[3]
    with torch.no_grad():
        history, target = model.dense.sequences(
            model.tables(batch.request, batch.candidate, batch.sequence), plain_of(batch)
        )
    history, target = first_requests(history, target, REQUESTS)
    return model, Sample(history, target, batch.sequence["history:item"].values(), None)


def figures_of(model: Ranker, *samples: Sample) -> dict[str, Figure]:
    (measure,) = measures_of(model)
    with torch.no_grad():
        for sample in samples:
            measure.add(sample)
    return {figure.name: figure for figure in measure.figures()}


def parts(sample: Sample) -> list[Sample]:
    """The sample as two batches, one of them with its first request alone."""
    history, target, following, pool = sample
    cut = int(target.offsets[1])
    first = first_requests(history, target, 1)
    rest = history._replace(start=history.start[1:], end=history.end[1:], now=history.now[1:])
    others = Target(target.x[cut:], target.offsets[1:] - cut, target.probe, target.code[cut:])
    return [Sample(*first, following, pool), Sample(rest, others, following, pool)]


def test_interest_recall(config_of: ConfigOf, coded: Path):
    model, sample = some_requests(config_of(*options_of(coded, UXSID.replace("}", ", length: 40}"))))
    uxsid: Any = model.dense.long[0].block  # type: ignore[union-attr]
    history, target, _, _ = sample
    _, probes, _ = model.dense.long[0].inputs(history, target)  # type: ignore[operator]
    shown = uxsid.attention(history, probes)
    shares: dict[int, list[float]] = {10: [], 50: [], 10_000: []}
    for k, found in shares.items():
        for r in range(REQUESTS):
            end = int(history.end[r])
            events = list(range(max(int(history.start[r]), end - 40), end))
            asked = sorted(set(target.code[target.offsets[r] : target.offsets[r + 1], 0].tolist()))
            for i, code in enumerate(asked):
                weight = shown[r].probes[i].tolist()
                best = sorted(range(len(events)), key=lambda e: (-weight[e], -e))[:k]
                if code and best:
                    found.append(float(np.mean([int(history.code[events[e], 0]) == code for e in best])))
    for samples in ([sample], parts(sample)):
        figures = figures_of(model, *samples)
        for name, k in (("Int.R@10", 10), ("Int.R@50", 50), ("Int.R of all", 10_000)):
            assert figures[name].over == len(shares[k]) > 10
            assert figures[name].value == pytest.approx(np.mean(shares[k]), abs=1e-9)


def test_without_probes_there_is_no_recall(config_of: ConfigOf, coded: Path):
    model, sample = some_requests(config_of(*options_of(coded, UXSID.replace("}", ", global_probe: false}"))))
    assert {(figure.value, figure.over) for figure in figures_of(model, sample).values()} == {(None, 0)}


def test_agents(config_of: ConfigOf, coded: Path):
    model, sample = some_requests(config_of(*options_of(coded, HISAC.replace("}", ", length: 40}"))))
    history = sample.history
    start = torch.maximum(history.start, history.end - 40)
    agents = naive_tree_agents(history.code, history.time, start, history.end, [3, 2])
    windows = [history.code[a:b] for a, b in zip(start.tolist(), history.end.tolist(), strict=True)]
    with_events = [len(found) for found, window in zip(agents, windows, strict=True) if len(window)]
    without = [int(min(code) == 0) for window in windows for code in window.tolist()]
    assert len(with_events) == REQUESTS - 1
    for samples in ([sample], parts(sample)):
        figures = figures_of(model, *samples)
        assert figures["agents"][1:3] == (pytest.approx(np.mean(with_events)), REQUESTS - 1)
        assert figures["without a full semantic ID"][1:3] == (pytest.approx(np.mean(without)), len(without))
    assert 0.1 < np.mean(without) < 0.2


def test_next_items(config_of: ConfigOf, coded: Path):
    """Rank by rank: the items scored at least as high as the one that followed the long branch."""
    model, sample = some_requests(config_of(*options_of(coded, NEXT)))
    history, following = sample.history, sample.following
    generator = torch.Generator().manual_seed(0)
    id = torch.arange(1, 600, 2)  # half the items, and many that do not exist
    pool = Items(id, torch.randn(len(id), history.x.size(1), generator=generator))
    with torch.no_grad():
        block: Any = model.dense.long[0]
        scores = block.block.score_next(block.own(history), pool.x).tolist()
    ranks: list[int] = []
    for r in range(REQUESTS):
        if int(history.end[r] - history.start[r]) > 10:  # events beside the short branch
            of_request = scores.pop(0)
            item = int(following[history.end[r] - 10])
            if item % 2 == 1:
                own = of_request[item // 2]
                ranks.append(sum(s >= own for s in of_request) - 1)
    assert len(ranks) >= 3
    for samples in ([sample], parts(sample)):
        figures = figures_of(model, *(one._replace(pool=pool) for one in samples))
        for k in (10, 500):
            assert figures[f"HR@{k}"].value == pytest.approx(np.mean([rank < k for rank in ranks]))
            gains = [1 / np.log2(rank + 2) if rank < k else 0.0 for rank in ranks]
            assert figures[f"NDCG@{k}"].value == pytest.approx(np.mean(gains))
            assert figures[f"HR@{k}"].over == len(ranks)
            assert figures[f"HR@{k}"].what == "next items among 300"


def diagnosed(config: TrainConfig, model: Ranker, **options: int) -> list[BlockReport]:
    data = Dataset(config.dataset)
    selection = selection_of(config, data, resolve(config.features, data.manifest))
    return diagnose(model, data, "test", selection, config, ALONE, **options)


@pytest.mark.parametrize("sample", [1, 50, 10_000])
def test_the_sample_is_as_large_as_asked_for_or_the_split(config_of: ConfigOf, coded: Path, sample: int):
    config = config_of(*options_of(coded, HISAC))
    (found,) = diagnosed(config, built(config), sample=sample)
    assert (found.name, found.kind) == ("model.long[0]", "hisac")
    assert found.requests == min(sample, Dataset(coded).manifest.splits["test"].requests)


def test_the_sample_is_the_same_each_time_and_another_by_another_seed(config_of: ConfigOf, coded: Path):
    config = config_of(*options_of(coded, HISAC))
    model = built(config)
    once, again = (diagnosed(config, model, sample=20) for _ in range(2))
    assert once == again != diagnosed(config.model_copy(update={"seed": 5}), model, sample=20)


@pytest.mark.parametrize("pool", [5, 10_000])
@pytest.mark.parametrize("buckets", ["{}", "{item: 7}"])
def test_next_items_are_embedded_as_candidates_are(
    config_of: ConfigOf, coded: Path, monkeypatch: pytest.MonkeyPatch, pool: int, buckets: str
):
    config = config_of(*options_of(coded, NEXT, "tables.init_scale=1", f"tables.buckets={buckets}"))
    model = built(config)
    seen: list[Sample] = []
    monkeypatch.setattr("ranker.evaluation.diagnostics._NextItems.add", lambda self, sample: seen.append(sample))
    diagnosed(config, model, sample=20, pool=pool)
    items = seen[0].pool
    assert items is not None
    batch, _ = batches_of(config)
    with torch.no_grad():
        target = model.tables(batch.request, batch.candidate, batch.sequence).target
    expected: dict[int, Tensor] = dict(zip(batch.item.tolist(), target, strict=True))
    assert (items.id.diff() > 0).all()
    assert pool <= len(items.id) <= 40 if pool == 5 else items.id.tolist() == list(range(1, 41))
    compared = [(x, expected[item]) for item, x in zip(items.id.tolist(), items.x, strict=True) if item in expected]
    assert len(compared) >= 5
    assert all(torch.equal(x, y) for x, y in compared)


def test_blocks_without_figures_are_not_reported(config_of: ConfigOf, coded: Path):
    config = config_of(*options_of(coded, f"{{type: mean}}, {HYTREC}"))
    assert diagnosed(config, built(config)) == []


def test_the_first_requests_keep_their_own_candidates():
    """Requests with 2, 0 and 3 candidates."""
    x = torch.arange(5.0).unsqueeze(1)
    window = torch.arange(3)
    history = History(torch.zeros(9, 1), torch.arange(9), window, window + 1, window + 9, torch.zeros(9, 2), x[:0])
    target = Target(x, torch.tensor([0, 2, 2, 5]), window[:0], x.long())
    for n, candidates in ((0, 0), (1, 2), (2, 2), (3, 5), (99, 5)):
        found, asked = first_requests(history, target, n)
        assert (found.start.numel(), found.end.numel(), found.now.numel()) == (min(n, 3),) * 3
        assert (asked.offsets.numel(), len(asked.x), len(asked.code)) == (min(n, 3) + 1, candidates, candidates)
        assert torch.equal(asked.code, asked.x.long())
        assert found.x is history.x


def test_evaluate_writes_and_shows_them(config_of: ConfigOf, coded: Path, tmp_path: Path):
    options = options_of(coded, f"{UXSID}, {HISAC}, {NEXT}", "training.max_steps=3", "training.validation_split=null")
    train(config_of(*options), tmp_path / "run")
    found = evaluate(tmp_path / "run")
    assert found is not None
    assert [block.kind for block in found.blocks] == ["uxsid", "hisac", "hytrec"]
    content = json.loads((tmp_path / "run" / "metrics.json").read_text())["blocks"]
    assert [block["block"] for block in content] == ["model.long[0]", "model.long[1]", "model.long[2]"]
    assert content[1]["figures"]["agents"]["value"] == found.blocks[1].figures[0].value
    for block in content:
        assert block["requests"] > 100
        for figure in block["figures"].values():
            assert figure["value"] >= 0
            assert figure["over"] > 100
    # the 40 items are fewer than 500
    assert content[2]["figures"]["HR@500"] == {
        "value": 1.0,
        "over": pytest.approx(300, abs=250),
        "what": "next items among 40",
    }


def test_the_report_shows_them_in_80_columns():
    blocks = [
        BlockReport("model.long[0]", "uxsid", 500, [Figure("Int.R@10", 0.25, 1234, "probes")]),
        BlockReport("model.long[11]", "hisac", 500, [Figure("without a full semantic ID", None, 0, "events")]),
    ]
    some = replace(report(), blocks=blocks)
    console = Console(file=io.StringIO(), width=80)
    print_report(some, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    for expected in ("500 requests", "long[0] uxsid", "Int.R@10", "0.2500", "1,234 probes", "long[11] hisac", "–"):
        assert expected in text
    written = metrics_json(some)["blocks"]
    assert written == [
        {
            "block": "model.long[0]",
            "type": "uxsid",
            "requests": 500,
            "figures": {"Int.R@10": {"value": 0.25, "over": 1234, "what": "probes"}},
        },
        {
            "block": "model.long[11]",
            "type": "hisac",
            "requests": 500,
            "figures": {"without a full semantic ID": {"value": None, "over": 0, "what": "events"}},
        },
    ]
    assert "blocks" not in metrics_json(report())
