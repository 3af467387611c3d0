"""When a step waits for collectives, told to who counts it.

TorchRec waits in many places, the backward passes of its autograd functions among them, by `Work.wait`, which is
where it is heard. So do torch.distributed's blocking calls on CPUs; on GPUs they wait within the call and are not
heard, so that a step makes them in its part `ranks` alone. DDP waits in C++: a communication hook sends the same
buckets, and waits for them where the backward pass ends, as DDP would a moment later.

The hook also adds gradients up in the order of the ranks, on CPUs. Gloo's sums of three and more numbers depend on
their place in a bucket, and DDP fills its buckets in another order after the first step of a process: a run that was
resumed would not be the undisturbed one to the last bit.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import reduce
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
    """Let DDP average gradients by collectives whose waits :func:`hear_waits` hears: the means of two ranks are its own
    to the last bit, those of more but for rounding."""
    group = replica.process_group
    assert group is not None
    ordered = group.size() > 2 and next(replica.parameters()).device.type == "cpu"

    # DDP compares the hook's annotations, so that this module's are no strings
    def averaged(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        share = bucket.buffer().div_(group.size())
        shares = [torch.empty_like(share) for _ in range(group.size())] if ordered else [share]
        if ordered:
            sent = dist.all_gather(shares, share, group=group, async_op=True)
        else:
            sent = dist.all_reduce(share, group=group, async_op=True)
        assert sent is not None
        # DDP's own waiting is a callback of the same queue, put there after the last bucket's hook
        torch.autograd.Variable._execution_engine.queue_callback(sent.wait)  # type: ignore[attr-defined]
        return sent.get_future().then(lambda _: reduce(torch.add, shares))

    replica.register_comm_hook(None, averaged)
