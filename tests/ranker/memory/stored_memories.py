"""Memories of some users in a store, as a build would put them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch

from ranker.longseq.stored import Stored, store_rows
from ranker.memory.encode import encode
from ranker.memory.keys import hashes_of, keys_of
from ranker.memory.record import Dtype
from ranker.memory.store import Generation, GenerationWriter, MemoryStore
from ranker.memory.versions import MemoryVersions

VERSIONS = MemoryVersions(model=2**64 - 5, codebook=17)
CODES = 8


def generation_of(name: str = "monday", dtype: Dtype = "float32", begun_ms: int = 5, **changes: object) -> Generation:
    """Of one block that has records by probe."""
    blocks: dict[int, Literal["request", "probe"]] = {0: "probe"}
    made = Generation(
        name=name,
        model=VERSIONS.model,
        codebook=VERSIONS.codebook,
        dtype=dtype,
        blocks=blocks,
        as_of_ms=1_000,
        begun_ms=begun_ms,
    )
    return made.model_copy(update=changes)


def memory_of(user: int, shift: float = 0.0) -> Stored:
    """CODES records of 4 values that tell user, code and build."""
    codes = torch.arange(CODES).float()
    rows = torch.stack([torch.full([CODES], float(user)), codes, codes * 0 + shift, -codes], 1)
    return store_rows(rows)


def put(
    writer: GenerationWriter,
    users: Iterable[int],
    shift: float = 0.0,
    block: int = 0,
    versions: MemoryVersions = VERSIONS,
    dtype: Dtype = "float32",
) -> None:
    """Every user's memory, with all codes."""
    for user in users:
        keys = keys_of(hashes_of([user]), block, np.zeros(CODES, np.int64), np.arange(CODES))
        writer.put_many(keys.key, encode(memory_of(user, shift), keys.fingerprint, versions, 1_000, dtype).values)


def build(store: MemoryStore, generation: Generation, users: Iterable[int], shift: float = 0.0) -> None:
    """A finished generation that readers are switched to."""
    writer = store.begin(generation)
    put(writer, users, shift, versions=generation.versions, dtype=generation.dtype)
    writer.done("all")
    writer.close()
    store.finish(generation.model_copy(update={"finished_ms": 9}))
    store.switch(generation.name)


def probes_of(users: int, block: int = 0) -> dict[str, torch.Tensor]:
    """Every code of so many requests."""
    return {
        f"{block}.request": torch.arange(users).repeat_interleave(CODES),
        f"{block}.code": torch.arange(CODES).repeat(users),
    }


def expected(users: Iterable[int], shift: float = 0.0) -> torch.Tensor:
    """The values that reading them must give."""
    return torch.cat([memory_of(user, shift).values for user in users])
