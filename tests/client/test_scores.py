"""A C++ program scores exported models as Python does, to the last bit, whole and as a pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.client.conftest import Client
from tests.client.outcomes import pair_in, printed

INT8_ALLOWED = "0.02"
"""what an export allows a score to move by when its tables are bytes"""


def requests_in(path: Path, model: str) -> list[dict[str, Any]]:
    """What each request of a file gives to one model, by input; of a dictionary, by its key."""
    tensors = load_file(path)
    given: list[dict[str, Any]] = [{} for _ in range(1 + max(int(name.split("/")[0]) for name in tensors))]
    for name, tensor in tensors.items():
        number, *rest = name.split("/")
        if rest[0] == model and len(rest) == 2:
            given[int(number)][rest[1]] = tensor
        elif rest[0] == model:
            given[int(number)].setdefault(rest[1], {})[rest[2]] = tensor
    return given


def endings_in(folder: Path) -> dict[str, str]:
    """How the names of an export's TorchScript files end, `.pt` or `.int8.pt`, and how far their scores may be from the
    trainer's."""
    names = json.loads((folder / "manifest.json").read_text())["files"]
    endings = [name.removeprefix("ranker") for name in names if name.startswith("ranker.") and name.endswith(".pt")]
    assert ".pt" in endings
    return {ending: "1e-5" if ending == ".pt" else INT8_ALLOWED for ending in endings}


def assert_equal(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """To the last bit."""
    assert len(found) == len(expected) == 12
    for ours, pythons in zip(found, expected, strict=True):
        assert np.array_equal(ours, pythons)


@pytest.mark.parametrize("model", ["small", "three blocks"])
def test_scores_of_the_whole_ranker(client: Client, exports: dict[str, Path], requests: dict[str, Path], model: str):
    for ending, allowed in endings_in(exports[model]).items():
        file = exports[model] / f"ranker{ending}"
        done = client(file, requests[model], "--tolerance", allowed)
        assert done.returncode == 0, done.stderr
        assert "greatest difference from 12 requests' expected scores: " in done.stderr  # the trainer's
        loaded = torch.jit.load(str(file))
        with torch.no_grad():
            expected = [loaded(**inputs).numpy() for inputs in requests_in(requests[model], "ranker")]
        found = printed(done.stdout)
        assert_equal(found, expected)
        assert np.concatenate(found).std(0).min() > 1e-3  # there is something to tell apart


@pytest.mark.parametrize("model", ["small", "three blocks"])
def test_scores_of_the_pair(client: Client, exports: dict[str, Path], requests: dict[str, Path], model: str):
    asked, own = (requests_in(requests[model], name) for name in ("user_encoder", "candidate_ranker"))
    for ending, allowed in endings_in(exports[model]).items():
        pair = pair_in(exports[model], ending)
        done = client(*pair, requests[model], "--tolerance", allowed, "--repeat", "1")
        assert done.returncode == 0, done.stderr
        encoder, ranker = (torch.jit.load(str(file)) for file in pair[1:])
        expected: list[np.ndarray] = []
        with torch.no_grad():
            for history, candidates in zip(asked, own, strict=True):
                memory = encoder(**{"probes": {}} | history) | candidates.get("memory", {})
                expected.append(ranker(**candidates | {"memory": memory}).numpy())
        assert_equal(printed(done.stdout), expected)
        timed = [line.split()[1:4] for line in done.stderr.splitlines() if line.startswith("latency")]
        assert timed == [["user_encoder", "calls", "12"], ["candidate_ranker", "calls", "12"]]
