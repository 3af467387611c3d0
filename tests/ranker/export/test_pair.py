"""User encoder and candidate ranker score as the whole ranker does, whatever becomes of records between them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from features.batch import RequestBatch
from ranker.export import (
    encoder_inputs_of,
    inputs_of,
    probes_of,
    ranker_inputs_of,
    short_length_of,
    stored_blocks,
)
from tests.ranker.export.conftest import PAIRS, Exported
from tests.ranker.export.server import answered_elsewhere

ExportedOf = Callable[[str], Exported]
Memory = dict[str, Tensor]


def asked(exported: Exported, batch: RequestBatch) -> tuple[Memory, Memory]:
    return probes_of(batch, stored_blocks(exported.run.config, exported.spec))


def encoded(exported: Exported, batch: RequestBatch) -> Memory:
    """The records of a batch, and which each candidate reads."""
    probes, records = asked(exported, batch)
    return exported.loaded("user_encoder.pt")(**encoder_inputs_of(batch, probes)) | records


def ranker_inputs(exported: Exported, batch: RequestBatch) -> dict[str, Tensor]:
    return ranker_inputs_of(batch, exported.spec, short_length_of(exported.run.config))


def read(exported: Exported, batch: RequestBatch, memory: Memory) -> Tensor:
    return exported.loaded("candidate_ranker.pt")(**ranker_inputs(exported, batch), memory=memory)


def lost(memory: Memory) -> Memory:
    """No record is there any more."""
    empty = {name: x[:0] if name.endswith(("values", "exact")) else torch.zeros_like(x) for name, x in memory.items()}
    return empty | {name: x for name, x in memory.items() if name.endswith("probe")}


@pytest.mark.parametrize("name", PAIRS)
def test_the_pair_scores_as_the_whole(exported_of: ExportedOf, name: str):
    """As the manifest says of hundreds of requests; and here requests of one user share a history."""
    exported = exported_of(name)
    parity = json.loads((exported.folder / "manifest.json").read_text())["parity"]
    assert parity["requests"] >= 200
    assert parity["ways"]["pair"]["against"] == "ranker"
    assert parity["ways"]["pair"]["greatest_difference"] <= 1e-5
    batch = exported.batch(32, group=4)
    whole = exported.loaded("ranker.pt")(**inputs_of(batch))
    assert whole[:, 0].std() > 1e-3
    torch.testing.assert_close(read(exported, batch, encoded(exported, batch)), whole, rtol=0, atol=1e-5)


def test_they_run_where_only_torch_and_fbgemm_are_imported(exported_of: ExportedOf, tmp_path: Any):
    mean = exported_of("mean")
    calls: list[tuple[Any, dict[str, Any]]] = [(mean.folder / "ranker.pt", inputs_of(mean.batch()))]
    for name in PAIRS:
        exported = exported_of(name)
        batch = exported.batch()
        probes, _ = asked(exported, batch)
        inputs = ranker_inputs(exported, batch) | {"memory": encoded(exported, batch)}
        calls.append((exported.folder / "user_encoder.pt", encoder_inputs_of(batch, probes)))
        calls.append((exported.folder / "candidate_ranker.pt", inputs))
    answered_elsewhere(tmp_path / "requests.pt", *calls)


@pytest.mark.parametrize("name", PAIRS)
def test_records_are_read_wherever_they_were_made(exported_of: ExportedOf, name: str):
    """One request at a time, as a store is filled, in place of all together."""
    exported = exported_of(name)
    batch = exported.batch(6)
    encoder, (probes, records) = exported.loaded("user_encoder.pt"), asked(exported, batch)
    made: list[Memory] = []
    for r in range(batch.requests):
        window = {"now": batch.now[r : r + 1], "start": batch.start[r : r + 1], "end": batch.end[r : r + 1]}
        inputs = encoder_inputs_of(batch, _own(probes, r)) | window
        lengths = batch.sequence.lengths().view(-1, batch.requests)[: len(inputs["history_lengths"]) // batch.requests]
        made.append(encoder(**inputs | {"history_lengths": lengths.sum(1)}))
    memory = {name: torch.cat([one[name] for one in made]) for name in made[0]}
    whole = exported.loaded("ranker.pt")(**inputs_of(batch))
    torch.testing.assert_close(read(exported, batch, memory | records), whole, rtol=0, atol=1e-5)


def _own(probes: Memory, request: int) -> Memory:
    """What one request asks."""
    own: Memory = {}
    for block in {name.split(".")[0] for name in probes}:
        mine = probes[f"{block}.request"] == request
        own |= {f"{block}.code": probes[f"{block}.code"][mine], f"{block}.request": torch.zeros(int(mine.sum())).long()}
    return own


def test_a_probes_records_may_come_in_any_order(exported_of: ExportedOf):
    """With others among them, as a store gives them: a candidate names its own."""
    exported = exported_of("uxsid")
    batch = exported.batch()
    memory = encoded(exported, batch)
    n = len(memory["0.lengths"])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    rows = memory["0.values"].view(n, -1)[torch.cat([order, order[:2]])]
    moved = {
        "0.values": rows.flatten(),
        "0.exact": memory["0.exact"],
        "0.lengths": torch.cat([memory["0.lengths"], memory["0.lengths"][:2]]),
        "0.time": torch.cat([memory["0.time"], memory["0.time"][:2]]),
        "0.probe": order.argsort()[memory["0.probe"]],
    }
    torch.testing.assert_close(read(exported, batch, moved), read(exported, batch, memory), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["hytrec", "all"])
def test_lost_records_score_as_empty_histories(exported_of: ExportedOf, name: str):
    """The whole ranker without a short history, whose windows are emptied, is the reference."""
    exported = exported_of(name)
    batch = exported.batch()
    memory = encoded(exported, batch)
    found = read(exported, batch, lost(memory))
    expected = exported.loaded("ranker.pt")(**inputs_of(batch) | {"end": batch.start})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - read(exported, batch, memory)).abs().max() > 1e-4


def test_a_longer_history_than_the_short_one_changes_nothing(exported_of: ExportedOf):
    """The candidate ranker takes what it needs: a server need not cut."""
    exported = exported_of("mean")
    batch = exported.batch()
    memory = encoded(exported, batch)
    uncut = ranker_inputs_of(batch, exported.spec, 0)
    assert uncut["event_time"].numel() > ranker_inputs(exported, batch)["event_time"].numel()
    found = exported.loaded("candidate_ranker.pt")(**uncut, memory=memory)
    torch.testing.assert_close(found, read(exported, batch, memory), rtol=0, atol=1e-6)


def test_an_unknown_group_probes_as_group_0_does(exported_of: ExportedOf):
    """Its embedding is that of unknown ids."""
    exported = exported_of("uxsid")
    batch, encoder = exported.batch(), exported.loaded("user_encoder.pt")
    request = torch.arange(batch.requests)
    found: list[Tensor] = []
    for code in (0, 10**9, -3, 1):
        probes = {"0.code": torch.full_like(request, code), "0.request": request}
        found.append(encoder(**encoder_inputs_of(batch, probes))["0.values"])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])


def test_each_file_has_the_tables_that_it_reads(exported_of: ExportedOf):
    exported = exported_of("all")

    def tables(file: str) -> set[str]:
        names = [name.split(".") for name, _ in exported.loaded(file).named_parameters()]
        return {name[-2] for name in names if name[0] == "tables"}

    history = {"sequence_item", "sequence_item_sid_1", "sequence_item_sid_2", "sequence_event_action"}
    encoder, ranker = tables("user_encoder.pt"), tables("candidate_ranker.pt")
    assert encoder == history | {"content_item_sid_vector"}
    assert ranker == tables("ranker.pt") - {"content_item_sid_vector"}
    assert ranker > history | {"request_user", "candidate_item"}


def test_a_block_that_reads_the_history_itself_leaves_no_pair(exported_of: ExportedOf):
    exported = exported_of("target_attention")
    files = {"ranker.pt", "ranker.int8.pt"}
    assert {file.name for file in exported.folder.iterdir()} == files | {"manifest.json"}
    manifest = json.loads((exported.folder / "manifest.json").read_text())
    reason = "model.long[1] (target_attention): reads the history itself for every candidate, so that no store can"
    assert manifest["memory"]["no_pair_because"].startswith(reason)
    assert manifest["memory"]["blocks"] == []
    assert manifest["files"].keys() == files
    assert manifest["parity"]["ways"].keys() == {"ranker", "int8 ranker"}
