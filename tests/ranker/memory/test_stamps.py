"""Stamps say what they were told, through a store's bytes; coverage counts what a loop over requests counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import UserError
from features.users import NEVER
from ranker.config import TrainConfig
from ranker.memory.build import build
from ranker.memory.config import CodesConfig, MemoryConfig
from ranker.memory.coverage import Share
from ranker.memory.decode import decode
from ranker.memory.encode import encode
from ranker.memory.stamps import Asked, read_stamps, stamped
from ranker.memory.versions import MemoryVersions
from ranker.run import Run
from tests.ranker.memory.built_memories import run_with_blocks
from tests.ranker.memory.test_policy import ranked

CODES = st.lists(st.integers(0, 2**24 - 1), unique=True, max_size=4)
USER = st.tuples(
    st.integers(0, 2**40), st.one_of(st.just(NEVER), st.integers(0, 2**50)), st.tuples(CODES, CODES), st.booleans()
)


@settings(deadline=None)
@given(users=st.lists(USER, max_size=6), dtype=st.sampled_from(["float32", "float16", "int8"]))
def test_stamps_come_back_from_their_records_and_lost_ones_are_known(users: list, dtype: str):
    asked = [
        Asked(
            torch.tensor([code for user in users for code in user[2][block]], dtype=torch.int64),
            torch.tensor([r for r, user in enumerate(users) for _ in user[2][block]], dtype=torch.int64),
        )
        for block in range(2)
    ]
    events, last = (torch.tensor([user[i] for user in users], dtype=torch.int64) for i in range(2))
    prints, versions = np.arange(len(users), dtype=np.uint32), MemoryVersions(1, 2)
    records = encode(stamped(events, last, asked), prints, versions, 0, dtype).values  # type: ignore[arg-type]
    kept = [None if user[3] else record for user, record in zip(users, records, strict=True)]
    found = read_stamps(decode(kept, prints, versions).stored, 2)
    assert found.found.tolist() == [not user[3] for user in users]
    there = [r for r, user in enumerate(users) if not user[3]]
    assert found.events[there].tolist() == [users[r][0] for r in there]
    assert found.last[there].tolist() == [users[r][1] for r in there]
    for block in range(2):
        pairs = zip(found.asked[block].request.tolist(), found.asked[block].code.tolist(), strict=True)
        assert list(pairs) == [(r, code) for r in there for code in users[r][2][block]]


def test_a_code_that_no_stamp_holds_is_refused():
    one = torch.ones([1], dtype=torch.int64)
    with pytest.raises(UserError, match=r"a probe's code is 16,777,216.*feature of fewer values"):
        stamped(one, one, [Asked(one << 24, one - 1)])


def test_coverage_is_what_a_loop_over_requests_counts(
    once: Callable[..., Path], config_of: Callable[..., TrainConfig], coded: Path, tmp_path: Path
):
    config = MemoryConfig(codes=CodesConfig(policy="frequent", most=2, without_code=False), before="valid")
    report = build(run_with_blocks(once, config_of, coded), str(tmp_path / "store"), config)
    assert report is not None
    dataset = Run(run_with_blocks(once, config_of, coded)).dataset()
    codes = dataset.items().column("item.sid_1").to_pylist()
    found = {"candidates": [0, 0], "probes": [0, 0]}
    for p, info in enumerate(dataset.manifest.partitions):
        histories, requests = dataset.histories(p).to_pylist(), dataset.requests(p).to_pylist()
        ends = {row: len(history["item"]) for row, history in enumerate(histories)}
        for request in requests[slice(*info.requests["valid"])]:
            ends[request["row"]] = min(ends[request["row"]], request["history_end"])
        for request in requests[slice(*info.requests["test"])]:
            items = histories[request["row"]]["item"][: ends[request["row"]]]
            have = ranked(config.codes, [codes[item] for item in items], [])
            shown = [codes[item] for item in request["items"]]
            for name, asks in (("candidates", shown), ("probes", sorted(set(shown)))):
                found[name][0] += sum(code in have for code in asks)
                found[name][1] += len(asks)
    assert report.coverage["0.candidates"] == Share(*found["candidates"])
    assert report.coverage["0.probes"] == Share(*found["probes"])
    assert 0 < found["probes"][0] < found["candidates"][0] < found["candidates"][1]
