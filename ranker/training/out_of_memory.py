"""Which batch, or which tables, a rank had no memory for: the allocator's own message names neither."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import nn

from features.batch import RequestBatch
from features.errors import UserError
from ranker.ranks import Ranks


class OutOfMemory(UserError):
    """Memory ran out."""


@contextmanager
def _told(what: Callable[[], str]) -> Generator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # PyTorch's CPU allocator raises a RuntimeError of no type of its own
        lack = ("DefaultCPUAllocator", "can't allocate memory", "out of memory", "bad allocation", "std::bad_alloc")
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and not any(sign in str(error) for sign in lack):
            raise
        raise OutOfMemory(f"{what()}. {str(error).strip().splitlines()[0] if str(error) else ''}".strip()) from error


@contextmanager
def naming_the_batch(batch: RequestBatch | None, ranks: Ranks, step: int) -> Generator[None]:
    """Say how large a batch was that memory did not suffice for in here; None: the next one, as it comes.

    Raises:
        OutOfMemory: that.
    """

    def what() -> str:
        remedy = (
            "lower loader.requests (training.accumulate keeps what a step learns from) or the length of the histories "
            "that model.long and model.short read"
        )
        if batch is None:
            return (
                f"rank {ranks.rank} of {ranks.world} ran out of memory when it read a batch for step {step}; {remedy}"
            )
        longest = int((batch.end - batch.start).max()) if batch.requests else 0
        return (
            f"rank {ranks.rank} of {ranks.world} ran out of memory in step {step}, with a batch of {batch.requests:,} "
            f"requests, {batch.candidates:,} candidates and {batch.event_time.numel():,} events (the longest history: "
            f"{longest:,}); {remedy}"
        )

    with _told(what):
        yield


@contextmanager
def naming_the_tables(tables: nn.Module, ranks: Ranks) -> Generator[None]:
    """Say how large the tables are that memory did not suffice for in here; `tables` may be on the meta device.

    Raises:
        OutOfMemory: that.
    """

    def what() -> str:
        sizes = {name.split(".")[-2]: p.numel() * p.element_size() for name, p in tables.named_parameters()}
        largest = sorted(sizes, key=lambda name: -sizes[name])
        shown = [f"{name} {sizes[name] / 2**30:,.3g} GiB" for name in largest[:5]]
        return (
            f"rank {ranks.rank} of {ranks.world} ran out of memory when its part of the tables was made, which have "
            f"{sum(sizes.values()) / 2**30:,.3g} GiB over all ranks: {', '.join(shown)}"
            f"{f' and {len(sizes) - 5} more' if len(sizes) > 5 else ''}; take more ranks, a smaller tables.dim or "
            "tables.dims, or a sharding that divides them"
        )

    with _told(what):
        yield
