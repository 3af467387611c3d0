"""Batches built by worker processes, or in this one."""

from __future__ import annotations

import atexit
import signal
from collections.abc import Iterator
from multiprocessing import active_children
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from features.collate import pack, unpack


def built(
    source: TorchDataset[dict[str, Tensor]], steps: range, workers: int, prefetch: int
) -> Iterator[dict[str, Tensor]]:
    """``source[step]`` for each step, in order.

    Args:
        workers: processes; 0 builds here.
        prefetch: batches that each of them keeps ready.
    """
    if workers == 0:
        return map(source.__getitem__, steps)
    packed = DataLoader(
        cast("TorchDataset[Any]", source),
        batch_size=None,
        sampler=steps,
        collate_fn=cast(Any, pack),  # without a batch size it is given one sample, not a list as its type says
        num_workers=workers,
        worker_init_fn=_leave_sigterm_to_the_parent,
        prefetch_factor=prefetch,
        generator=torch.Generator(),  # by default the global one, whose state belongs to the model
    )
    return map(unpack, packed)


def _leave_sigterm_to_the_parent(worker: int) -> None:
    """Schedulers tell every process of a job to end; the parent does so when it has saved its work, and ends us."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register  # before multiprocessing's own, which was registered with its import
def _end_workers() -> None:
    """Workers that still wait for work when this process ends, as after an error: multiprocessing would end them by
    SIGTERM, which they leave to us, and then wait for them without end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the killed as a failure of their own
    for child in active_children():
        if child.daemon:
            child.kill()
