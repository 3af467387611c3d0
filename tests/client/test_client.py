"""A C++ program scores exported models as Python does, and says what is wrong when it cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.client.conftest import Changed, Client
from tests.client.outcomes import Exit, assert_message, pair_in


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


def printed(stdout: str) -> list[np.ndarray]:
    """Scores `[N, tasks]` float32 of each request; its candidates come in order."""
    rows = [line.split("\t") for line in stdout.splitlines()]
    found: list[list[list[str]]] = []
    for request, candidate, *scores in rows:
        if candidate == "0":
            found.append([])
        assert (int(request), int(candidate)) == (len(found) - 1, len(found[-1]))
        found[-1].append(scores)
    return [np.array(scores, np.float32) for scores in found]


@pytest.mark.parametrize("model", ["small", "three blocks"])
def test_scores_are_pythons_bit_for_bit(
    client: Client, exports: dict[str, Path], requests: dict[str, Path], model: str
):
    done = client(exports[model] / "ranker.pt", requests[model], "--tolerance", "1e-5")
    assert done.returncode == 0, done.stderr
    assert "greatest difference from 12 requests' expected scores: " in done.stderr  # the trainer's
    loaded = torch.jit.load(str(exports[model] / "ranker.pt"))
    with torch.no_grad():
        expected = [loaded(**inputs).numpy() for inputs in requests_in(requests[model], "ranker")]
    found = printed(done.stdout)
    assert_equal(found, expected)
    assert np.concatenate(found).std(0).min() > 1e-3  # there is something to tell apart


def assert_equal(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """To the last bit."""
    assert len(found) == len(expected) == 12
    for ours, pythons in zip(found, expected, strict=True):
        assert np.array_equal(ours, pythons)


@pytest.mark.parametrize("model", ["small", "three blocks"])
def test_a_pairs_scores_are_pythons_bit_for_bit(
    client: Client, exports: dict[str, Path], requests: dict[str, Path], model: str
):
    done = client(*pair_in(exports[model]), requests[model], "--tolerance", "1e-5", "--repeat", "1")
    assert done.returncode == 0, done.stderr
    encoder, ranker = (
        torch.jit.load(str(exports[model] / f"{name}.pt")) for name in ("user_encoder", "candidate_ranker")
    )
    expected: list[np.ndarray] = []
    with torch.no_grad():
        for asked, own in zip(
            *(requests_in(requests[model], x) for x in ("user_encoder", "candidate_ranker")), strict=True
        ):
            memory = encoder(**{"probes": {}} | asked) | own.get("memory", {})
            expected.append(ranker(**own | {"memory": memory}).numpy())
    assert_equal(printed(done.stdout), expected)
    timed = [line.split()[1:4] for line in done.stderr.splitlines() if line.startswith("latency")]
    assert timed == [["user_encoder", "calls", "12"], ["candidate_ranker", "calls", "12"]]


def test_threads_do_not_change_scores(client: Client, exports: dict[str, Path], requests: dict[str, Path]):
    one, two = (client(exports["small"] / "ranker.pt", requests["small"], "--threads", n) for n in ("1", "2"))
    for a, b in zip(printed(one.stdout), printed(two.stdout), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_latency_of_repeated_requests(client: Client, exports: dict[str, Path], requests: dict[str, Path]):
    done = client(exports["small"] / "ranker.pt", requests["small"], "--repeat", "5")
    assert done.returncode == 0, done.stderr
    assert len(printed(done.stdout)) == 12  # printed once
    line = done.stderr.splitlines()[-1].split()
    assert line[:4] == ["latency", "ranker", "calls", "60"]
    assert (line[4], line[6]) == ("p50_ms", "p99_ms")
    assert 0 < float(line[5]) <= float(line[7])


def test_a_model_that_needs_fbgemm_says_so(client: Client, exports: dict[str, Path], requests: dict[str, Path]):
    done = client(exports["small"] / "ranker.pt", requests["small"], libraries=())
    assert done.returncode == Exit.MODEL
    assert done.stdout == ""
    needed = r"needs fbgemm::\w+, which no library has brought: give FBGEMM's by --fbgemm LIB\n"
    assert_message(done.stderr, rf"error: .*ranker\.pt: {needed}")


def test_a_request_that_fails_is_named(client: Client, exports: dict[str, Path], changed: Changed):
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors["2/ranker/candidate_dense"] = torch.zeros(8, 3)

    done = client(exports["small"] / "ranker.pt", changed(widen))
    assert done.returncode == Exit.SCORING
    assert done.stderr.startswith("error: request 2: ")


@pytest.mark.parametrize("wrong", [0.9, float("nan")])
def test_other_scores_than_expected_fail(client: Client, exports: dict[str, Path], changed: Changed, wrong: float):
    file = changed(lambda tensors: tensors["4/expected"][1, 0].fill_(wrong))
    done = client(exports["small"] / "ranker.pt", file, "--tolerance", "1e-5")
    assert done.returncode == Exit.SCORES
    assert done.stderr.endswith("error: scores differ from the expected ones by more than --tolerance\n")
    assert client(exports["small"] / "ranker.pt", file).returncode == 0


def test_nothing_is_compared_without_expected_scores(client: Client, exports: dict[str, Path], changed: Changed):
    file = changed(lambda tensors: tensors.pop("4/expected"))
    done = client(exports["small"] / "ranker.pt", file, "--tolerance", "1e-5")
    assert done.returncode == Exit.SCORES
    assert done.stderr.endswith("requests: 1 requests have no expected scores\n")


def cut(path: Path, to: int) -> None:
    path.write_bytes(path.read_bytes()[:to])


def header(text: str) -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: cut(path, 5), "not a safetensors file"),
        (lambda path: cut(path, 400), "not a safetensors file"),
        (lambda path: cut(path, path.stat().st_size - 4), ".*: the file does not have the bytes .*: cut off"),
        (lambda path: path.write_bytes(header('{"a": [1, 2')), r"not JSON at byte 11: expected \]"),
        (lambda path: path.write_bytes(header("[" * 1000)), "not JSON at byte 65: nested too deeply"),
        (lambda path: path.write_bytes(header("{}")), "not a request file: .*"),
    ],
)
def test_a_damaged_file_is_told(
    client: Client,
    exports: dict[str, Path],
    requests: dict[str, Path],
    tmp_path: Path,
    damage: Callable[[Path], object],
    message: str,
):
    file = Path(shutil.copy(requests["small"], tmp_path / "requests"))
    damage(file)
    done = client(exports["small"] / "ranker.pt", file)
    assert done.returncode == Exit.FILE, done.stderr
    assert_message(done.stderr, rf"error: .*requests: {message}\n")


def renamed(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for name in [name for name in tensors if name.startswith(old)]:
        tensors[new + name.removeprefix(old)] = tensors.pop(name)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("3/", "99/", "requests are numbered from 0 without a gap; one is missing"),
        ("3/", "-3/", "-3/.*: names are REQUEST/MODEL/INPUT, with /KEY in a dictionary"),
        ("3/ranker/now", "now", "now: names are REQUEST/MODEL/INPUT, with /KEY in a dictionary"),
        ("3/ranker/now", "3/ranker/a/b/c", "3/ranker/a/b/c: names are .*"),
    ],
)
def test_names_are_checked(
    client: Client, exports: dict[str, Path], changed: Changed, old: str, new: str, message: str
):
    done = client(exports["small"] / "ranker.pt", changed(lambda tensors: renamed(tensors, old, new)))
    assert done.returncode == Exit.FILE, done.stderr
    assert_message(done.stderr, rf"error: .*requests: {message}\n")


def test_a_model_or_library_that_does_not_load_is_told(
    client: Client, exports: dict[str, Path], requests: dict[str, Path], tmp_path: Path
):
    (tmp_path / "model.pt").write_text("nothing")
    done = client(tmp_path / "model.pt", requests["small"])
    assert done.returncode == Exit.MODEL
    assert done.stderr.startswith(f"error: {tmp_path}/model.pt: does not load: ")
    done = client(exports["small"] / "ranker.pt", requests["small"], "--fbgemm", tmp_path / "model.pt", libraries=())
    assert done.returncode == Exit.MODEL
    assert done.stderr.startswith(f"error: --fbgemm {tmp_path}/model.pt: does not load: ")


def test_the_manifest_is_read_whatever_is_in_it(
    client: Client, exports: dict[str, Path], requests: dict[str, Path], tmp_path: Path
):
    model = shutil.copy(exports["small"] / "ranker.pt", tmp_path)
    without = client(model, requests["small"])
    assert without.returncode == 0
    assert "no manifest.json beside" in without.stderr
    manifest = json.loads((exports["small"] / "manifest.json").read_text())
    manifest["files"]["ranker.pt"]["inputs"]["now"]["dtype"] = 'größe\n\t"\\ 🙂'
    manifest["metrics"] = {
        "auc": float("nan"),
        "loss": -1.5e-7,
        "greatest": float("inf"),
        "of": [True, False, None, {}],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    done = client(model, requests["small"])
    assert done.returncode == Exit.INPUTS
    assert done.stderr.endswith('  now: int64 of 1 dimensions, and the model reads größe\n\t"\\ 🙂 of 1\n')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.pt"], "usage: .*"),
        (["--pair", "encoder.pt", "ranker.pt"], "usage: .*"),
        (["model.pt", "requests", "--threads", "0"], "--threads 0: a number, at least 1, is expected"),
        (["model.pt", "requests", "--repeat"], "--repeat: a value is missing"),
        (["model.pt", "requests", "--repaet", "2"], "--repaet: no such option"),
    ],
)
def test_the_command_line_is_checked(client: Client, arguments: list[str], message: str):
    done = client(*arguments, libraries=())
    assert done.returncode == Exit.USAGE
    assert_message(done.stderr, f"error: {message}\n")
