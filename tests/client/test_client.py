"""A C++ program scores exported models as Python does, and says what is wrong when it cannot."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.client.conftest import Client

FILE, MODEL, INPUTS, SCORING, SCORES, USAGE = 3, 4, 5, 6, 7, 2
Change = Callable[[dict[str, Tensor]], object]


def requests_in(path: Path) -> list[dict[str, Tensor]]:
    """What each request of a file gives to the whole ranker."""
    tensors = load_file(path)
    count = 1 + max(int(name.split("/")[0]) for name in tensors)
    given: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        number, *rest = name.split("/")
        if rest[0] == "ranker":
            given[int(number)][rest[1]] = tensor
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
        expected = [loaded(**inputs).numpy() for inputs in requests_in(requests[model])]
    found = printed(done.stdout)
    assert len(found) == len(expected) == 12
    for ours, pythons in zip(found, expected, strict=True):
        assert np.array_equal(ours, pythons)
    assert np.concatenate(found).std(0).min() > 1e-3  # there is something to tell apart


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
    assert done.returncode == MODEL
    assert done.stdout == ""
    needed = r"needs fbgemm::\w+, which no library has brought: give FBGEMM's by --fbgemm LIB\n"
    assert_message(done.stderr, rf"error: .*ranker\.pt: {needed}")


def assert_message(found: str, pattern: str) -> None:
    """The whole of stderr is one message."""
    assert re.fullmatch(pattern, found), found


@pytest.fixture
def changed(requests: dict[str, Path], tmp_path: Path) -> Callable[[Change], Path]:
    """The small request file after a change of its tensors."""

    def changed(change: Change) -> Path:
        tensors = load_file(requests["small"])
        change(tensors)
        with safe_open(requests["small"], "pt") as file:
            save_file(tensors, tmp_path / "requests", file.metadata())
        return tmp_path / "requests"

    return changed


def wrong_names(tensors: dict[str, Tensor]) -> None:
    tensors["3/ranker/time_now"] = tensors.pop("3/ranker/now")


def wrong_kinds(tensors: dict[str, Tensor]) -> None:
    tensors["0/ranker/now"] = tensors["0/ranker/now"].float()
    tensors["0/ranker/candidate_dense"] = tensors["0/ranker/candidate_dense"].flatten()


def wrong_dictionary(tensors: dict[str, Tensor]) -> None:
    tensors["0/ranker/now/1.code"] = tensors.pop("0/ranker/now")


def another_model(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("5/ranker/")]:
        tensors[name.replace("ranker", "reranker")] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (wrong_names, ["request 3 does not fit .*", "  now: missing", "  time_now: the model has no such input"]),
        (
            wrong_kinds,
            [
                "request 0 does not fit .*",
                "  candidate_dense: float32 of 1 dimensions, and the model reads float32 of 2",
                "  now: float32 of 1 dimensions, and the model reads int64 of 1",
            ],
        ),
        (wrong_dictionary, ["request 0 does not fit .*", "  now: missing", "  now: a dictionary, .* reads a tensor"]),
        (another_model, [r"request 5: nothing for ranker \(.*ranker\.pt\)"]),
    ],
)
def test_inputs_that_do_not_fit_are_named(
    client: Client, exports: dict[str, Path], changed: Callable[[Change], Path], change: Change, lines: list[str]
):
    done = client(exports["small"] / "ranker.pt", changed(change))
    assert done.returncode == INPUTS, done.stderr
    assert done.stdout == ""  # before anything is scored
    assert_message(done.stderr, r"error: .*requests: " + "\n".join(lines) + "\n")


def test_a_request_that_fails_is_named(client: Client, exports: dict[str, Path], changed: Callable[[Change], Path]):
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors["2/ranker/candidate_dense"] = torch.zeros(8, 3)

    done = client(exports["small"] / "ranker.pt", changed(widen))
    assert done.returncode == SCORING
    assert done.stderr.startswith("error: request 2: ")


@pytest.mark.parametrize("wrong", [0.9, float("nan")])
def test_other_scores_than_expected_fail(
    client: Client, exports: dict[str, Path], changed: Callable[[Change], Path], wrong: float
):
    file = changed(lambda tensors: tensors["4/expected"][1, 0].fill_(wrong))
    done = client(exports["small"] / "ranker.pt", file, "--tolerance", "1e-5")
    assert done.returncode == SCORES
    assert done.stderr.endswith("error: scores differ from the expected ones by more than --tolerance\n")
    assert client(exports["small"] / "ranker.pt", file).returncode == 0


def test_nothing_is_compared_without_expected_scores(
    client: Client, exports: dict[str, Path], changed: Callable[[Change], Path]
):
    file = changed(lambda tensors: tensors.pop("4/expected"))
    done = client(exports["small"] / "ranker.pt", file, "--tolerance", "1e-5")
    assert done.returncode == SCORES
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
    assert done.returncode == FILE, done.stderr
    assert_message(done.stderr, rf"error: .*requests: {message}\n")


def test_a_model_or_library_that_does_not_load_is_told(
    client: Client, exports: dict[str, Path], requests: dict[str, Path], tmp_path: Path
):
    (tmp_path / "model.pt").write_text("nothing")
    done = client(tmp_path / "model.pt", requests["small"])
    assert done.returncode == MODEL
    assert done.stderr.startswith(f"error: {tmp_path}/model.pt: does not load: ")
    done = client(exports["small"] / "ranker.pt", requests["small"], "--fbgemm", tmp_path / "model.pt", libraries=())
    assert done.returncode == MODEL
    assert done.stderr.startswith(f"error: --fbgemm {tmp_path}/model.pt: does not load: ")


def test_the_manifest_is_read_whatever_is_in_it(
    client: Client, exports: dict[str, Path], requests: dict[str, Path], tmp_path: Path
):
    model = shutil.copy(exports["small"] / "ranker.pt", tmp_path)
    without = client(model, requests["small"])
    assert without.returncode == 0
    assert "no manifest.json beside" in without.stderr
    manifest = json.loads((exports["small"] / "manifest.json").read_text())
    manifest["inputs"]["now"]["dtype"] = 'größe\n\t"\\ 🙂'
    manifest["metrics"] = {
        "auc": float("nan"),
        "loss": -1.5e-7,
        "greatest": float("inf"),
        "of": [True, False, None, {}],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    done = client(model, requests["small"])
    assert done.returncode == INPUTS
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
    assert done.returncode == USAGE
    assert_message(done.stderr, f"error: {message}\n")
