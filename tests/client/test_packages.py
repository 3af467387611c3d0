"""The client scores by compiled packages as Python does, to the last bit, without FBGEMM's operators."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ranker.export.compiled import load, no_compiler
from tests.client.conftest import Changed, Client
from tests.client.outcomes import Exit, assert_message, pair_in, printed
from tests.client.test_misfits import wrong_kinds
from tests.client.test_scores import assert_equal, requests_in

pytestmark = pytest.mark.skipif(no_compiler() is not None, reason=f"{no_compiler()}")


def test_scores_of_the_whole_ranker(client: Client, with_packages: Path, requests: dict[str, Path]):
    file = with_packages / "ranker.pt2"
    done = client(file, requests["small"], "--tolerance", "1e-5", libraries=())
    assert done.returncode == 0, done.stderr
    assert "greatest difference from 12 requests' expected scores: " in done.stderr  # the trainer's
    package, found = load(file), printed(done.stdout)
    assert_equal(found, [package(**inputs).numpy() for inputs in requests_in(requests["small"], "ranker")])
    assert np.concatenate(found).std(0).min() > 1e-3  # there is something to tell apart


def test_scores_of_the_pair(client: Client, with_packages: Path, requests: dict[str, Path]):
    pair = pair_in(with_packages, ".pt2")
    done = client(*pair, requests["small"], "--tolerance", "1e-5", "--repeat", "1", libraries=())
    assert done.returncode == 0, done.stderr
    encoder, ranker = (load(Path(file)) for file in pair[1:])
    asked, own = (requests_in(requests["small"], name) for name in ("user_encoder", "candidate_ranker"))
    expected = [
        ranker(**candidates | {"memory": encoder(**{"probes": {}} | history)}).numpy()
        for history, candidates in zip(asked, own, strict=True)
    ]
    assert_equal(printed(done.stdout), expected)


def test_a_package_beside_torchscript(client: Client, with_packages: Path, requests: dict[str, Path]):
    pair = "--pair", with_packages / "user_encoder.pt", with_packages / "candidate_ranker.pt2"
    done = client(*pair, requests["small"], "--tolerance", "1e-5")
    assert done.returncode == 0, done.stderr


def test_inputs_are_looked_at_before_native_code_is_given_them(client: Client, with_packages: Path, changed: Changed):
    done = client(with_packages / "ranker.pt2", changed(wrong_kinds), libraries=())
    assert done.returncode == Exit.INPUTS
    assert "  now: float32 of 1 dimensions, and the model reads int64 of 1\n" in done.stderr


def test_a_package_is_not_run_without_its_manifest(
    client: Client, with_packages: Path, requests: dict[str, Path], tmp_path: Path
):
    file = shutil.copy(with_packages / "ranker.pt2", tmp_path)
    done = client(file, requests["small"], libraries=())
    assert done.returncode == Exit.FILE
    assert_message(done.stderr, r"error: .*ranker\.pt2: no manifest\.json beside it describes it: .*\n")


@pytest.fixture
def described(with_packages: Path, tmp_path: Path) -> Callable[..., Path]:
    """The packages, after a change of what the manifest tells of one."""

    def described(file: str, change: Callable[[dict[str, Any]], object]) -> Path:
        folder = Path(shutil.copytree(with_packages, tmp_path / "described"))
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest["files"][file])
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return described


@pytest.mark.parametrize(
    ("file", "change", "untold"),
    [
        ("ranker", lambda entry: entry.clear(), "request_values"),
        ("ranker", lambda entry: entry["inputs"].pop("now"), "now"),
        ("ranker", lambda entry: entry["inputs"]["now"].pop("dtype"), "now"),
        ("ranker", lambda entry: entry["inputs"]["candidate_dense"].pop("dims"), "candidate_dense"),
        ("user_encoder", lambda entry: entry["inputs"].pop("probes"), "probes"),
        ("candidate_ranker", lambda entry: entry["inputs"].pop("memory"), "memory"),
        ("candidate_ranker", lambda entry: entry["inputs"]["memory"].pop("0.time"), "memory/0.time"),
        ("candidate_ranker", lambda entry: entry["inputs"]["memory"]["0.time"].pop("dims"), "memory/0.time"),
    ],
)
def test_a_package_is_not_run_where_its_manifest_tells_too_little(
    client: Client,
    described: Callable[..., Path],
    requests: dict[str, Path],
    file: str,
    change: Callable[[dict[str, Any]], object],
    untold: str,
):
    folder = described(f"{file}.pt2", change)
    models = (folder / "ranker.pt2",) if file == "ranker" else pair_in(folder, ".pt2")
    done = client(*models, requests["small"], libraries=())
    assert done.returncode == Exit.FILE
    assert done.stdout == ""
    message = rf"{file}\.pt2: input {untold}: manifest\.json does not tell its dtype and dims, and .*"
    assert_message(done.stderr, rf"error: .*{message}\n")


def test_an_entry_that_a_package_does_not_read_is_told(client: Client, with_packages: Path, changed: Changed):
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["0/user_encoder/probes/0.code"] = torch.zeros(1, dtype=torch.int64)

    done = client(*pair_in(with_packages, ".pt2"), changed(add), libraries=())
    assert done.returncode == Exit.INPUTS
    assert "  probes/0.code: the model has no such input\n" in done.stderr


def test_memories_are_looked_at_before_native_code_is_given_them(
    client: Client, described: Callable[..., Path], requests: dict[str, Path]
):
    folder = described("candidate_ranker.pt2", lambda entry: entry["inputs"]["memory"]["0.time"].update(dtype="int32"))
    done = client(*pair_in(folder, ".pt2"), requests["small"], libraries=())
    assert done.returncode == Exit.SCORING
    wrong = r"  memory/0\.time: int64 of 1 dimensions, and the model reads int32 of 1"
    assert_message(done.stderr, rf"error: request 0: .*candidate_ranker\.pt2:\n{wrong}\n")


def test_a_memory_without_an_entry_is_told(client: Client, described: Callable[..., Path], requests: dict[str, Path]):
    tensors: list[str] = []
    folder = described("user_encoder.pt", lambda entry: tensors.extend(entry["inputs"]))
    tensors.remove("probes")
    encoder = torch.jit.ScriptModule()
    encoder.define(
        f"def forward(self, {', '.join(tensors)}, probes: Dict[str, Tensor]) -> Dict[str, Tensor]: return {{}}\n"
    )
    torch.jit.save(encoder, folder / "user_encoder.pt")
    done = client(
        "--pair", folder / "user_encoder.pt", folder / "candidate_ranker.pt2", requests["small"], libraries=()
    )
    assert done.returncode == Exit.SCORING
    assert_message(done.stderr, r"error: request 0: .*candidate_ranker\.pt2: memory/0\.values: missing\n")


def test_a_request_that_fails_is_told_without_a_backtrace(client: Client, with_packages: Path, changed: Changed):
    def shorten(tensors: dict[str, Tensor]) -> None:
        tensors["2/ranker/sequence_lengths"] = tensors["2/ranker/sequence_lengths"][:-1].clone()

    file = with_packages / "ranker.pt2"
    done = client(file, changed(shorten), libraries=())
    assert done.returncode == Exit.SCORING
    assert f"error: request 2: {file}: " in done.stderr
    assert "Exception raised from" not in done.stderr


def test_a_package_that_does_not_load_is_told(
    client: Client, with_packages: Path, requests: dict[str, Path], tmp_path: Path
):
    shutil.copy(with_packages / "manifest.json", tmp_path)
    torch.save({}, tmp_path / "ranker.pt2")
    done = client(tmp_path / "ranker.pt2", requests["small"], libraries=())
    assert done.returncode == Exit.MODEL
    assert done.stderr.startswith(f"error: {tmp_path}/ranker.pt2: does not load: ")
    assert "Exception raised from" not in done.stderr
