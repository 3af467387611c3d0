"""A run with compressors of every kind of record, and what stores of its memories hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ranker.config import TrainConfig
from ranker.memory.decode import decode
from ranker.memory.record import HEADER_BYTES
from ranker.memory.store import open_store
from ranker.training.trainer import train
from tests.ranker.block_configs import HISAC, HYTREC, UXSID
from tests.ranker.test_blocks import options_of

BLOCKS = f"{UXSID}, {{type: mean}}, {{type: target_attention}}, {HISAC}, {HYTREC}"
"""a record a probe; a record a user, of one size, of none, of any size, and with a time"""


def run_with_blocks(once: Callable[..., Path], config_of: Callable[..., TrainConfig], coded: Path) -> Path:
    """A run of a few steps; made once."""
    return once("memory_run", lambda out: train(config_of(*options_of(coded, BLOCKS, "training.max_steps=4")), out))


def everything_in(url: str, generation: str | None = None) -> dict[int, bytes]:
    """A generation's records, by default those of the only current one."""
    store = open_store(url)
    (name,) = [generation] if generation else store.currents().values()
    return dict(store.records(name))


def same_numbers(found: dict[int, bytes], wanted: dict[int, bytes]) -> None:
    """The same records to float tolerance: headers whole, but for their checksums."""
    assert found.keys() == wanted.keys()
    both = [[records[key] for key in sorted(found)] for records in (found, wanted)]
    assert [record[8:HEADER_BYTES] for record in both[0]] == [record[8:HEADER_BYTES] for record in both[1]]
    prints = np.array([int.from_bytes(record[12:16], "little") for record in both[0]], np.uint32)
    one, other = (decode(records, prints).stored for records in both)
    torch.testing.assert_close(one.values, other.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.exact, other.exact, rtol=1e-4, atol=1e-5)
