"""The client scores by compiled packages as Python does, to the last bit, without FBGEMM's operators."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

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


def test_a_package_that_does_not_load_is_told(
    client: Client, with_packages: Path, requests: dict[str, Path], tmp_path: Path
):
    shutil.copy(with_packages / "manifest.json", tmp_path)
    torch.save({}, tmp_path / "ranker.pt2")
    done = client(tmp_path / "ranker.pt2", requests["small"], libraries=())
    assert done.returncode == Exit.MODEL
    assert done.stderr.startswith(f"error: {tmp_path}/ranker.pt2: does not load: ")
