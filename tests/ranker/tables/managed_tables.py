"""Managed tables in tests: a config with one at every place, and training them on CPUs.

Training is for GPUs. TorchRec's modules run on CPUs too, so that our own refusal is all that tests take away.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import pytest

from ranker.planning import constraints

TABLES = (
    "tables.managed_collision={user: {rows: 150, eviction: lru, every: 4}, item: {rows: 30, every: 3}, "
    "item.category: {rows: 4, every: 5}, candidate.position: {rows: 5, eviction: lfu, every: 2}, "
    "event.action: {rows: 4, every: 1}}"
)


@contextmanager
def on_cpus() -> Generator[None]:
    """Let managed tables be trained here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constraints, "refuse_managed_on_cpus", lambda table, device: None)
        yield
