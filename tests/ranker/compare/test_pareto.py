"""The Pareto front: exactly the points that no other beats."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ranker.compare.pareto import pareto_front

Point = tuple[int, int]


def beats(a: Point, b: Point) -> bool:
    """Cheaper and no worse, or better and no dearer."""
    return a[0] <= b[0] and a[1] >= b[1] and a != b


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_a_point_is_on_the_front_if_and_only_if_none_beats_it(points: list[Point]):
    front = pareto_front([cost for cost, _ in points], [value for _, value in points])
    assert sorted(front) == [i for i, p in enumerate(points) if not any(beats(q, p) for q in points)]
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)
