"""When a step waits for collectives, told to who counts it.

TorchRec waits in many places, the backward passes of its autograd functions among them, and torch.distributed's
blocking calls wait too; all of them by `Work.wait`, which is where it is heard. DDP alone waits in C++: a communication
hook sends the same buckets, and waits for them where the backward pass ends, as DDP would a moment later.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

Begin = TypeVar("Begin")


@contextmanager
def hear_waits(begun: Callable[[], Begin], ended: Callable[[Begin], None]) -> Generator[None]:
    """Call `begun` before and `ended` after each wait for a collective of this process, with what `begun` gave."""
    wait = dist.Work.wait

    def heard(work: dist.Work, *arguments: Any, **named: Any) -> bool:
        begin = begun()
        done = wait(work, *arguments, **named)
        ended(begin)
        return done

    dist.Work.wait = heard  # type: ignore[method-assign]
    try:
        yield
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]


def wait_in_the_open(replica: DistributedDataParallel) -> None:
    """Let DDP average gradients by collectives whose waits :func:`hear_waits` hears: the means are its own, to the last
    bit where the ranks are a power of two, else to the last but one."""
    group = replica.process_group
    assert group is not None

    # DDP compares the hook's annotations, so that this module's are no strings
    def averaged(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        share = bucket.buffer().div_(group.size())
        sent = dist.all_reduce(share, group=group, async_op=True)
        assert sent is not None
        # DDP's own waiting is a callback of the same queue, put there after the last bucket's hook
        torch.autograd.Variable._execution_engine.queue_callback(sent.wait)  # type: ignore[attr-defined]
        return sent.get_future().then(lambda done: done.value()[0])

    replica.register_comm_hook(None, averaged)
