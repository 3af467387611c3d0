"""Which points are worth having: those that no other beats in both cost and value."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Indices of the points that no other has lower or equal cost and higher or equal value than, one of them strictly;
    by cost, of equal points all.

    >>> pareto_front([1, 2, 3, 2], [0.5, 0.7, 0.6, 0.4])
    [0, 1]
    """
    front: list[int] = []
    best = float("-inf")
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i])):
        twin = bool(front) and (costs[i], values[i]) == (costs[front[-1]], values[front[-1]])
        if values[i] > best or twin:
            front.append(i)
            best = max(best, values[i])
    return front
