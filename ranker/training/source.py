"""Where a rank's batches come from, step by step: read when asked for, or read ahead.

Reading ahead, TorchRec's sparse-distribution pipeline (`TrainPipelineSparseDist`) sends the ids of the next batch to
the ranks that hold their rows while this one is trained on, and sharded modules take what has already arrived. What is
computed stays the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.streamable import Pipelineable

from features.batch import RequestBatch

Pipelineable.register(RequestBatch)


class BatchSource(Protocol):
    """Batches on their device, one after the other: `take`, forward pass, `forward_done`, backward pass, `done`."""

    def take(self) -> RequestBatch:
        """The next batch; there must be one."""
        ...

    def forward_done(self) -> None:
        """The forward pass of the batch taken is through; on every rank alike."""
        ...

    def done(self) -> None:
        """The batch taken is learned from, or left out."""
        ...

    @contextmanager
    def paused(self) -> Generator[None]:
        """The model may read other batches in here, as in validation."""
        ...

    def close(self) -> None:
        """No further batch is taken: the loader's workers end."""
        ...


class ReadWhenAsked:
    """Each batch as it comes."""

    def __init__(self, batches: Generator[RequestBatch], device: torch.device) -> None:
        self._batches, self._device = batches, device

    def take(self) -> RequestBatch:
        """The next batch."""
        return next(self._batches).to(self._device)

    def forward_done(self) -> None:
        """Nothing waits for it."""

    def done(self) -> None:
        """Nothing waits for it."""

    @contextmanager
    def paused(self) -> Generator[None]:
        """Nothing is under way."""
        yield

    def close(self) -> None:
        """No further batch is taken."""
        self._batches.close()


class ReadAhead(TrainPipelineSparseDist[Any, None]):
    """Up to three batches at once: one that is trained on, one whose ids travel, one on its way to the device.

    Every rank must take equally many batches, as :class:`features.loader.Loader` gives them.
    """

    def __init__(
        self, batches: Generator[RequestBatch], device: torch.device, model: DistributedModelParallel,
        optimizer: torch.optim.Optimizer,
    ) -> None:  # fmt: skip
        super().__init__(model, optimizer, device)
        self._read = batches
        self._attached = False  # while true, the model's sharded modules are wholly rewritten

    def take(self) -> RequestBatch:
        """The next batch; the ids of the one after it set out."""
        if not self._attached:
            self.attach()
            if self.batches:
                self.wait_sparse_data_dist(self.contexts[0])
        self.fill_pipeline(self._read)
        self._attached = True
        self._wait_for_batch()
        if len(self.batches) > 1:
            self.start_sparse_data_dist(self.batches[1], self.contexts[1])
        self.enqueue_batch(self._read)
        taken = self.batches[0]
        assert taken is not None
        return taken

    def forward_done(self) -> None:
        """How many ids of the next batch go where is known by now: the ids themselves set out."""
        if len(self.batches) > 1:
            self.wait_sparse_data_dist(self.contexts[1])

    def done(self) -> None:
        """Forget the batch taken."""
        self.dequeue_batch()

    @contextmanager
    def paused(self) -> Generator[None]:
        """The model is as it was without a pipeline; batches that were read are kept."""
        self._detach()
        yield

    def close(self) -> None:
        """No further batch is taken, and the model is as it was without a pipeline."""
        self._read.close()
        self._detach()

    def _detach(self) -> None:
        if self._attached:
            self._attached = False
            self.detach()
