"""The client's options, and what it says when a file, a model or a score is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.client.conftest import Changed, Client
from tests.client.outcomes import Exit, assert_message, printed


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
    assert "Exception raised from" not in done.stderr
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
        (
            ["model.pt"],
            r"usage: ranker_client MODEL\.pt\|\.pt2 REQUESTS \| --pair ENCODER\.pt\|\.pt2 RANKER\.pt\|\.pt2 .*",
        ),
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
