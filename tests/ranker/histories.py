"""Random batches of requests for property tests: histories of any length, shared rows, any number of candidates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from ranker.longseq import History, Probes, Target

NONE = torch.zeros(0, dtype=torch.int64)
NO_PROBES = Probes(torch.zeros(0, 0), NONE, NONE)


@dataclass(frozen=True)
class Shape:
    """T events; request r has the events ``[start[r], end[r])`` and the candidates ``offsets[r] : offsets[r + 1]``."""

    events: int
    start: list[int]
    end: list[int]
    offsets: list[int]
    seed: int

    @property
    def requests(self) -> int:
        """R."""
        return len(self.start)

    @property
    def candidates(self) -> int:
        """N."""
        return self.offsets[-1]

    def windows(self) -> tuple[Tensor, Tensor, Tensor]:
        """start `[R]`, end `[R]`, offsets `[R + 1]`."""
        start, end, offsets = (torch.tensor(x, dtype=torch.int64) for x in (self.start, self.end, self.offsets))
        return start, end, offsets

    def generator(self) -> torch.Generator:
        """For the batch's numbers."""
        return torch.Generator().manual_seed(self.seed)


def shape(rows: list[int], requests: list[tuple[int, int, int]], candidates: list[int], seed: int = 0) -> Shape:
    """A batch from the lengths of its rows and, for each request, its row and its window in it."""
    first = [sum(rows[:i]) for i in range(len(rows))]
    offsets = [sum(candidates[:i]) for i in range(len(candidates) + 1)]
    return Shape(
        sum(rows), [first[row] + a for row, a, _ in requests], [first[row] + b for row, _, b in requests], offsets, seed
    )


@st.composite
def shapes(draw: st.DrawFn, longest: int = 40, most_candidates: int = 6) -> Shape:
    """Any batch: empty and one-event histories, requests that share a row or have no candidates, no requests at all."""
    rows = draw(st.lists(st.integers(0, longest), min_size=1, max_size=5))
    requests: list[tuple[int, int, int]] = []
    for _ in range(draw(st.integers(0, 6))):
        if requests and draw(st.booleans()):  # of the user before, an event or two later
            row, start, end = requests[-1]
            end = min(end + draw(st.integers(0, 2)), rows[row])
            requests.append((row, min(start + draw(st.integers(0, 1)), end), end))
            continue
        row = draw(st.integers(0, len(rows) - 1))
        end = draw(st.integers(0, rows[row]))
        requests.append((row, draw(st.sampled_from([0, end, end // 2])), end))
    skewed = st.one_of(st.integers(0, most_candidates), st.just(7 * most_candidates))
    candidates = [draw(skewed) for _ in requests]
    return shape(rows, requests, candidates, draw(st.integers(0, 2**31)))


EDGES = {
    "no requests, but events": shape([5, 3], [], []),
    "nothing at all": shape([0], [], []),
    "requests without candidates": shape([4, 6], [(0, 0, 4), (1, 0, 6)], [0, 0]),
    "no events": shape([0, 0], [(0, 0, 0), (1, 0, 0)], [2, 1]),
    "empty beside full": shape([0, 9, 0], [(0, 0, 0), (1, 0, 9), (2, 0, 0)], [3, 2, 1]),
    "one event": shape([1], [(0, 0, 1)], [2]),
    "overlapping windows of one row": shape([12], [(0, 0, 12), (0, 3, 9), (0, 8, 12), (0, 0, 0)], [2, 3, 0, 1]),
    "windows that drift along a row": shape(
        [300, 60],
        [(0, 0, 270), (0, 0, 285), (0, 3, 290), (0, 10, 299), (0, 20, 300), (1, 0, 60), (1, 0, 60), (1, 1, 60)],
        [1, 1, 2, 0, 1, 3, 1, 1],
    ),
    "longer than a chunk and than any cap": shape([300, 7], [(0, 0, 300), (1, 0, 7), (0, 0, 290)], [2, 1, 1]),
    "skewed candidates": shape([20, 20, 20], [(0, 0, 20), (1, 0, 20), (2, 0, 20)], [1, 150, 0]),
}
"""Batches that must work, by name."""


def inputs_of(batch: Shape, dim: int) -> tuple[History, Target]:
    """Random float64 events and candidates, times in milliseconds that ascend in every window."""
    generator = batch.generator()
    start, end, offsets = batch.windows()
    gap_ms = torch.randint(0, 10_000_000, [batch.events], generator=generator)
    time = gap_ms.cumsum(0)
    before_now = torch.randint(1, 5_000, [batch.requests], generator=generator)
    last = torch.cat([torch.zeros(1, dtype=torch.int64), time])[end]
    x = torch.randn(batch.events, dim, generator=generator, dtype=torch.float64)
    candidates = torch.randn(batch.candidates, dim, generator=generator, dtype=torch.float64)
    no_code = torch.zeros(batch.events, 0, dtype=torch.int64)
    history = History(x, time, start, end, last + before_now, no_code, x[:, :0])
    return history, Target(candidates, offsets, NONE, candidates.long()[:, :0])


def randomise(module: nn.Module) -> nn.Module:
    """Float64, and every parameter away from its special first value (zero biases would hide a forgotten one)."""
    module.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def assert_same(found: Tensor, expected: Tensor, inputs: list[Tensor], tolerance: float = 1e-9) -> None:
    """Equal outputs, and equal gradients of a random weighting of them in all `inputs`."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=found.dtype)
    gradients = [
        torch.autograd.grad((out * direction).sum(), inputs, allow_unused=True, materialize_grads=True)
        if out.requires_grad
        else tuple(torch.zeros_like(x) for x in inputs)
        for out in (found, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def differentiable(history: History, target: Target) -> tuple[History, Target, list[Tensor]]:
    """The same inputs, tracked by autograd."""
    history = history._replace(x=history.x.clone().requires_grad_())
    target = target._replace(x=target.x.clone().requires_grad_())
    return history, target, [history.x, target.x]


def permuted(batch: Shape) -> Tensor:
    """An order of the candidates that keeps each with its request: `[N]`."""
    generator = batch.generator()
    parts = [
        a + torch.randperm(b - a, generator=generator) for a, b in zip(batch.offsets, batch.offsets[1:], strict=False)
    ]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])


def outside(batch: Shape, length: int = 0) -> Tensor:
    """Which events no request may see: `[T]` bool. `length`: the block's cap."""
    unseen = torch.ones(batch.events, dtype=torch.bool)
    for a, b in zip(batch.start, batch.end, strict=True):
        unseen[max(a, b - length) if length else a : b] = False
    return unseen


def own_rows(history: History) -> History:
    """The same histories, every request with its own copy of its events."""
    windows = list(zip(history.start.tolist(), history.end.tolist(), strict=True))
    lengths = torch.tensor([b - a for a, b in windows], dtype=torch.int64)
    end = lengths.cumsum(0)
    return History(
        torch.cat([history.x[:0], *(history.x[a:b] for a, b in windows)]),
        torch.cat([history.time[:0], *(history.time[a:b] for a, b in windows)]),
        end - lengths,
        end,
        history.now,
        torch.cat([history.code[:0], *(history.code[a:b] for a, b in windows)]),
        torch.cat([history.content[:0], *(history.content[a:b] for a, b in windows)]),
    )


def normalised(norm: nn.Module, y: Tensor) -> Tensor:
    """LayerNorm of one vector."""
    assert isinstance(norm, nn.LayerNorm)
    normal = (y - y.mean()) / (((y - y.mean()) ** 2).mean() + norm.eps) ** 0.5 * norm.weight
    return normal if norm.bias is None else normal + norm.bias  # pyright: ignore[reportUnnecessaryComparison]
