"""Before anything is scored, requests are compared with what exported models read; all that is wrong is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from tests.client.conftest import Change, Changed, Client
from tests.client.outcomes import Exit, assert_message, pair_in


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
        (wrong_dictionary, ["request 0 does not fit .*", "  now: a dictionary, and the model reads a tensor"]),
        (another_model, [r"request 5: nothing for ranker \(.*ranker\.pt\)"]),
    ],
)
def test_inputs_that_do_not_fit_are_named(
    client: Client, exports: dict[str, Path], changed: Changed, change: Change, lines: list[str]
):
    done = client(exports["small"] / "ranker.pt", changed(change))
    assert done.returncode == Exit.INPUTS, done.stderr
    assert done.stdout == ""  # before anything is scored
    assert_message(done.stderr, r"error: .*requests: " + "\n".join(lines) + "\n")


def wrong_records(tensors: dict[str, Tensor]) -> None:
    tensors["7/candidate_ranker/memory/0.prob"] = tensors.pop("7/candidate_ranker/memory/0.probe")


def wrong_record_kinds(tensors: dict[str, Tensor]) -> None:
    tensors["7/candidate_ranker/memory/0.probe"] = tensors["7/candidate_ranker/memory/0.probe"].float()


def no_dictionary(tensors: dict[str, Tensor]) -> None:
    tensors["7/candidate_ranker/memory"] = tensors.pop("7/candidate_ranker/memory/0.probe")


def wrong_probes(tensors: dict[str, Tensor]) -> None:
    del tensors["1/user_encoder/probes/0.code"]


def no_encoder(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("0/user_encoder/")]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (
            wrong_records,
            [
                r"request 7 does not fit .*candidate_ranker\.pt:",
                r"  memory/0\.prob: the model has no such input",
                r"  memory/0\.probe: missing",
            ],
        ),
        (wrong_record_kinds, [".*", r"  memory/0\.probe: float32 of 1 dimensions, and the model reads int64 of 1"]),
        (
            no_dictionary,
            [".*", "  memory: a tensor, and the model reads a dictionary of tensors"],
        ),
        (wrong_probes, [r"request 1 does not fit .*user_encoder\.pt:", r"  probes/0\.code: missing"]),
        (no_encoder, [r"request 0: nothing for user_encoder \(.*user_encoder\.pt\)"]),
    ],
)
def test_inputs_that_do_not_fit_a_pair_are_named(
    client: Client, exports: dict[str, Path], changed: Changed, change: Change, lines: list[str]
):
    done = client(*pair_in(exports["three blocks"]), changed(change, "three blocks"))
    assert done.returncode == Exit.INPUTS, done.stderr
    assert_message(done.stderr, r"error: .*requests: " + "\n".join(lines) + "\n")
