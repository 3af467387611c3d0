"""Batches as inputs of exported files: what is cut off is what nobody reads."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from features.batch import RequestBatch
from ranker.config import TrainConfig
from ranker.export import (
    StoredBlock,
    encoder_inputs_of,
    inputs_of,
    no_pair_because,
    probes_of,
    ranker_inputs_of,
)
from tests.ranker.block_configs import ALL, SEARCHES
from tests.ranker.export.conftest import Exported

ExportedOf = Callable[[str], Exported]


def events_of(inputs: dict[str, Tensor], features: int, request: int) -> list[list[int]]:
    """The ids and times of a request's events, feature by feature, in a file's inputs."""
    start, end = int(inputs["start"][request]), int(inputs["end"][request])
    events = inputs["event_time"].numel()
    ids = inputs["sequence_values"][: features * events].view(features, events)
    return [*ids[:, start:end].tolist(), inputs["event_time"][start:end].tolist()]


@pytest.mark.parametrize("short", [None, 0, 1, 3, 1000])
def test_the_candidate_ranker_gets_the_latest_events(exported_of: ExportedOf, short: int | None):
    """Of each request, though requests of a user share a row; and the candidates as they were."""
    exported = exported_of("all")
    batch, spec = exported.batch(24, group=4), exported.spec
    whole, found = inputs_of(batch), ranker_inputs_of(batch, spec, short)
    learned = len(spec.sequence) + len(spec.event)
    for r in range(batch.requests):
        expected = events_of(whole, learned, r)
        if short != 0:
            expected = [x[len(x) - min(short or 0, len(x)) :] for x in expected]
        assert events_of(found, learned, r) == expected
    events, history = found["event_time"].numel(), learned + len(spec.content)
    candidates = whole["sequence_values"][history * len(batch.event_time) :]
    assert torch.equal(found["sequence_values"][learned * events :], candidates)
    lengths = found["sequence_lengths"].view(-1, batch.requests)
    assert lengths[:learned].sum(1).tolist() == [events] * learned
    assert torch.equal(lengths[learned:], whole["sequence_lengths"].view(-1, batch.requests)[history:])
    longest = int((batch.end - batch.start).max()) if short == 0 else short or 0
    assert events <= batch.requests * longest


def test_candidates_name_the_record_of_their_group(exported_of: ExportedOf):
    batch = exported_of("all").batch()
    groups = [StoredBlock(1, "uxsid", "item.sid_1", 0), StoredBlock(4, "uxsid", "item.sid_2", 1)]
    blocks = [StoredBlock(0, "mean"), *groups]
    asked, records = probes_of(batch, blocks)
    assert asked.keys() == {"1.code", "1.request", "4.code", "4.request"}
    request = torch.repeat_interleave(torch.arange(batch.requests), batch.offsets.diff())
    for block in groups:
        record = records[f"{block.number}.probe"]
        assert torch.equal(asked[f"{block.number}.code"][record], batch.candidate_codes[:, block.column])
        assert torch.equal(asked[f"{block.number}.request"][record], request)
        pairs = torch.stack([asked[f"{block.number}.request"], asked[f"{block.number}.code"]], 1).tolist()
        assert pairs == sorted(pairs)
        assert len(pairs) == len(set(map(tuple, pairs)))


def test_the_user_encoder_gets_history_alone(exported_of: ExportedOf):
    exported = exported_of("all")
    batch = exported.batch()
    inputs = encoder_inputs_of(batch, {})
    history = [key for key in batch.sequence.keys() if key.startswith("history:")]  # noqa: SIM118  no dictionary
    assert torch.equal(inputs["history_values"], torch.cat([batch.sequence[key].values() for key in history]))
    assert torch.equal(inputs["history_lengths"], torch.cat([batch.sequence[key].lengths() for key in history]))
    assert not any("candidate" in name or name in ("labels", "offsets") for name in inputs)
    assert set(RequestBatch._fields) >= inputs.keys() - {"history_values", "history_lengths", "probes"}


NO_PAIR = {
    "": "model.long is empty: there is no memory to keep",
    f"{{type: mean}}, {SEARCHES['eta']}, {SEARCHES['twin']}": r"model.long\[1\] \(eta\), model.long\[2\] \(twin\)",
    "{type: target_attention}": r"model.long\[0\] \(target_attention\): reads the history itself for every candidate",
}


@pytest.mark.parametrize("blocks", NO_PAIR)
def test_why_there_is_no_pair(config_of: Callable[..., TrainConfig], blocks: str):
    reason = no_pair_because(config_of(f"model.long=[{blocks}]"))
    assert reason is not None
    assert re.match(NO_PAIR[blocks], reason)


def test_compressors_leave_no_reason(config_of: Callable[..., TrainConfig]):
    assert no_pair_because(config_of(f"model.long=[{{type: mean}}, {ALL}]")) is None
