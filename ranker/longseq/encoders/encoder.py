"""What all encoders share: events become tokens, layers make outputs of them, and candidates read the outputs."""

import torch
from torch import Tensor, nn

from ranker.longseq.encoders.outputs import OutputMemory, Outputs
from ranker.longseq.encoders.tokens import Tokens
from ranker.longseq.protocol import History, Probes, Target
from ranker.longseq.stored import Stored


class Encoder(nn.Module):
    """A long-sequence method given by :meth:`encoded`, which subclasses define.

    Args:
        tokens: of events and of candidates.
        outputs: what is kept of the last layer's tokens, and how candidates read it.
        length: the latest events that are read; 0: all.
    """

    def __init__(self, tokens: Tokens, outputs: Outputs, length: int) -> None:
        super().__init__()
        self.out_dim, self.length = outputs.width, length
        self.tokens, self.outputs = tokens, outputs

    def encoded(self, history: History) -> tuple[Tensor, Tensor, Tensor]:
        """The last layer's tokens `[S, width]`, and each request's `[R]` start and end in them."""
        raise NotImplementedError

    def encode(self, history: History, probes: Probes) -> OutputMemory:
        """The outputs that candidates will read."""
        x, start, end = self.encoded(history)
        return self.outputs.keep(x, start, end)

    def read(self, memory: OutputMemory, target: Target) -> Tensor:
        """`[N, width]`, zero where there are no events."""
        return self.outputs(self.tokens(target.x), target.offsets, memory)

    @torch.jit.export
    def store(self, memory: OutputMemory) -> Stored:
        """Each request's outputs."""
        return self.outputs.store(memory)

    @torch.jit.export
    def restore(self, stored: Stored, now: Tensor) -> OutputMemory:
        """A lost record has no outputs."""
        return self.outputs.restore(stored)

    def auxiliary(self, history: History, memory: OutputMemory) -> Tensor:
        """None of its own."""
        return torch.zeros([], dtype=history.x.dtype, device=history.x.device)

    def forward(self, history: History, probes: Probes, target: Target) -> Tensor:
        """`encode` and `read` in one: `[N, out_dim]`."""
        return self.read(self.encode(history, probes), target)
