"""The one protocol of every long-sequence method: `encode` a history once per request, `read` once per candidate.

What `encode` may know is the history and the probes; what it returns, the memory, is what a store keeps, so that
offline and online are one code path. A method is a compressor if the cost of `read` does not grow with the history's
length.

Symbols: R requests, N candidates of all requests, T events of all distinct histories, Q probes, M levels of semantic
IDs, d width.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ranker.longseq.stored import Stored
from ranker.ops.jagged import expand_windows, offsets_of


class History(NamedTuple):
    """Histories of a batch of requests. Requests of one user share the events of one row.

    x: `[T, d]` events, distinct histories one after another, each sorted by time.
    time: `[T]` int64, milliseconds.
    start, end: `[R]` int64; request r has the events ``[start[r], end[r])``, all strictly before it.
    now: `[R]` int64, the requests' times in milliseconds.
    code: `[T, M]` int64, the semantic IDs of the events' items, 0 for none; M = 0 where the model reads none.
    content: `[T, dz]` frozen content vectors of the events' items; dz = 0 where the model reads none.
    """

    x: Tensor
    time: Tensor
    start: Tensor
    end: Tensor
    now: Tensor
    code: Tensor
    content: Tensor


class Probes(NamedTuple):
    """The distinct target groups that requests ask about, each (request, group) once; empty for methods that need none.

    x: `[Q, dp]` embedding of the group; code: `[Q]` int64 the group itself; request: `[Q]` int64, ascending.
    """

    x: Tensor
    code: Tensor
    request: Tensor


class Target(NamedTuple):
    """Candidates. x: `[N, d]`; offsets: `[R + 1]` int64, the candidates of request r are ``offsets[r] : offsets[r +
    1]``; probe: `[N]` int64, the probe (of Q) of each candidate's group, or empty where there are no probes; code: `[N,
    M]` int64, semantic IDs as :class:`History` has them of events; M = 0 where the model reads none of candidates."""

    x: Tensor
    offsets: Tensor
    probe: Tensor
    code: Tensor


class LongSequence(Protocol):
    """What a long-sequence block offers. Implementations are scriptable ``nn.Module``s whose memory is a NamedTuple
    of tensors.

    A block whose memory is not trained by what candidates read of it may predict clicks itself, in training, by
    ``click_logits(memory, target)``: `[N, k]` (:class:`ranker.longseq.search.sim_soft.SimSoft`).

    A block without a loss of its own may offer ``read_few(history, target)``, which is `read` of `encode` by a way that
    is shorter where ``few(history, target)``: training takes it (:class:`ranker.longseq.groups.sdim.SDIM`).
    """

    out_dim: int

    def encode(self, history: History, probes: Probes) -> Any:
        """The memory of each request (or of each of its probes)."""
        ...

    def read(self, memory: Any, target: Target) -> Tensor:
        """What each candidate finds in its request's memory: `[N, out_dim]`."""
        ...

    def auxiliary(self, history: History, memory: Any) -> Tensor:
        """The block's own loss, a scalar already weighted; zero for most. Added to the loss in training."""
        ...


class Compressor(LongSequence, Protocol):
    """A block whose memory a store keeps: it has, beside the protocol's methods, the two that make records of it."""

    def store(self, memory: Any) -> Stored:
        """What `read` needs of a memory, as records."""
        ...

    def restore(self, stored: Stored, now: Tensor) -> Any:
        """The memory of records, to be read at `now` `[R]`, milliseconds. A lost record is of an empty history."""
        ...


def latest(history: History, length: int) -> History:
    """The same histories cut to each request's latest `length` events; 0 leaves them whole. No copy."""
    if length == 0:
        return history
    start = torch.maximum(history.start, history.end - length)
    return History(history.x, history.time, start, history.end, history.now, history.code, history.content)


def compact(history: History) -> History:
    """The same windows over a copy of their own events alone, request after request."""
    event, _ = expand_windows(history.start, history.end)
    offsets = offsets_of(history.end - history.start)
    return _selected(history, event, offsets[:-1], offsets[1:])


def covered(history: History) -> History:
    """The same windows over a copy of the events that any of them has, where that is less than three quarters of all;
    else as they are: what is done to every event of `x` is not done to the rest, but copying costs."""
    edges = torch.zeros([history.time.numel() + 1], dtype=torch.int64, device=history.time.device)
    one = torch.ones_like(history.start)
    edges = edges.index_add(0, history.start, one).index_add(0, history.end, -one)
    event = (torch.cumsum(edges, 0)[:-1] > 0).nonzero().squeeze(1)
    if 4 * event.numel() > 3 * history.time.numel():
        return history
    start = torch.searchsorted(event, history.start)
    return _selected(history, event, start, start + history.end - history.start)


def shared_passes(history: History) -> tuple[History, Tensor]:
    """One window for all requests whose windows begin at the same event, up to the last of their ends, and which of
    them each request has `[R]`: for encoders whose tokens depend on earlier ones alone, and not on the request."""
    start, row = torch.unique(history.start, return_inverse=True)
    end = start.scatter_reduce(0, row, history.end, "amax")
    now = torch.zeros_like(start).scatter_reduce(0, row, history.now, "amax")
    return History(history.x, history.time, start, end, now, history.code, history.content), row


def _selected(history: History, event: Tensor, start: Tensor, end: Tensor) -> History:
    return History(
        history.x.index_select(0, event),
        history.time.index_select(0, event),
        start,
        end,
        history.now,
        history.code.index_select(0, event),
        history.content.index_select(0, event),
    )
