"""Passes of HyTRec's long branch: over which events it runs, and what each request takes of it."""

from typing import NamedTuple

from torch import Tensor

from ranker.longseq.protocol import History, compact, shared_passes


class Passes(NamedTuple):
    """G passes of the long branch, each over a row's events from the first up to a split.

    long: the events of the passes, as :func:`~ranker.longseq.protocol.compact` has them.
    first, end: `[R]` int64; request r has seen the tokens ``first[r] : end[r]`` of a pass.
    at: `[P]` int64, the last token of each request with tokens, or None where each pass is one request's.
    """

    long: History
    first: Tensor
    end: Tensor
    at: Tensor | None


def between(history: History, start: Tensor, end: Tensor) -> History:
    """The same events in other windows."""
    return History(history.x, history.time, start, end, history.now, history.code, history.content)


def pass_each(history: History, split: Tensor) -> Passes:
    """One pass a request."""
    long = compact(between(history, history.start, split))
    return Passes(long, long.start, long.end, None)


def pass_a_row(history: History, split: Tensor) -> Passes:
    """One pass for all requests whose windows begin at the same event, up to the last of their splits."""
    passes, row = shared_passes(between(history, history.start, split))
    if passes.start.numel() == split.numel():
        return pass_each(history, split)
    long = compact(passes)
    first = long.start[row]
    seen = split - history.start
    return Passes(long, first, first + seen, (first + seen - 1)[seen > 0])
