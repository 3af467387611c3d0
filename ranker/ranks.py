"""The ranks of a run: one process or many, the same code. Started by torchrun (`torchx run dist.ddp`) or by hand."""

from __future__ import annotations

import logging
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from features.errors import UserError
from ranker.freed_memory import keep_freed_memory
from ranker.native_threads import wait_until_idle

T = TypeVar("T")


class _Outcome(NamedTuple):
    """What the first rank made, pickled, or what it raised."""

    value: bytes = b""
    error: str = ""
    of_user: bool = False


_OF_GLOO = ("gloo/", "Application timeout caused pair closure")
"""what errors of its collectives say"""


@dataclass(frozen=True)
class Ranks:
    """This process among the others, and its device."""

    rank: int
    world: int
    local_world: int
    device: torch.device
    timeout_s: float = 1800.0
    """how long a collective waits for the others"""

    @property
    def first(self) -> bool:
        """Whether this rank writes logs, files and tables."""
        return self.rank == 0

    def total(self, value: float) -> float:
        """The sum of `value` over ranks."""
        return self.totals(value)[0]

    def totals(self, *values: float) -> list[float]:
        """The sum of each value over ranks, in one collective."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.world == 1:
            return [value]
        values: list[T | None] = [None] * self.world
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def agree(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first rank, on every rank; what it raises too, so that no rank waits in vain.

        Raises:
            UserError: it raised one; on the others with the same message.
            RuntimeError: on the others, where it raised anything else.
        """
        if self.world == 1:
            return make()
        # as bytes: what cannot be pickled is an error of the first rank, too, and comes before the collective
        outcome: list[_Outcome | None] = [None]
        value: T | None = None
        raised: Exception | None = None
        if self.first:
            try:
                value = make()
                outcome[0] = _Outcome(pickle.dumps(value))
            except Exception as error:
                raised = error
                outcome[0] = _Outcome(error=str(error) or type(error).__name__, of_user=isinstance(error, UserError))
        dist.broadcast_object_list(outcome)
        if raised is not None:
            raise raised
        if self.first:
            return value  # type: ignore[return-value]
        came = outcome[0]
        assert came is not None
        if came.of_user:
            raise UserError(came.error)
        if came.error:
            raise RuntimeError(f"rank 0 failed, its own log says where: {came.error}")
        return pickle.loads(came.value)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def named(self, where: Callable[[], str]) -> Generator[None]:
        """Say which rank it was, and where, when a collective in here does not come to its end.

        Raises:
            RuntimeError: another rank died, or did not come within the timeout.
        """
        try:
            yield
        except RuntimeError as error:
            # gloo's own errors have no type, but most name the file of gloo that they come from
            if isinstance(error, dist.DistError) or any(words in str(error) for words in _OF_GLOO):
                raise RuntimeError(
                    f"rank {self.rank} of {self.world}, {where()}: another rank died, or did not come within "
                    f"{self.timeout_s:g} s (training.collective_timeout_s); its own log says why"
                ) from error
            raise


def quiet_libraries() -> None:
    """Silence what the libraries say of their own internals at every start; errors still show."""
    for module in ("torchrec", "torch"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
        warnings.filterwarnings("ignore", category=UserWarning, module=module)
    warnings.filterwarnings("ignore", message=".*ShardedTensor", category=FutureWarning)
    for name in ("torchrec", "torch.fx", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _cuda_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        raise UserError("training.device: cuda, but torch sees no CUDA device (`ranker doctor`); set it to auto or cpu")
    if local_rank >= (count := torch.cuda.device_count()):
        raise UserError(
            f"training.device: rank {local_rank} of this machine has no GPU of its own, there are {count}; "
            "start at most so many ranks here, or set it to cpu"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def join_ranks(
    device: str = "auto", threads: int | None = None, workers: int = 0, timeout_s: float = 1800.0
) -> Generator[Ranks]:
    """Join the process group that the environment describes, or make one of this process alone; leave it at the end.

    Args:
        device: auto, cpu or cuda.
        threads: CPU threads of this process; default: the machine's cores divided by its ranks, less the loader's
            workers. More threads than cores cost far more than they bring: OpenMP's threads spin while they wait.
        workers: loader processes of this rank.
        timeout_s: how long a collective waits for the others.

    Raises:
        UserError: there is no CUDA device for this rank.
    """
    quiet_libraries()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    where = _cuda_device(int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(where)
    else:
        keep_freed_memory()
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_world - workers))
    backend = "cuda:nccl,cpu:gloo" if cuda else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Ranks(rank, world, local_world, where, timeout_s)
    finally:
        try:
            if not wait_until_idle(5.0 if world > 1 else 1.0) and world > 1:
                print(f"rank {rank}: threads still run as it leaves the others", file=sys.stderr)
        finally:
            dist.destroy_process_group()
