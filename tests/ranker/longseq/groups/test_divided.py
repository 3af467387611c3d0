"""K-Means, LSH and Patching against loops over requests, groups and events."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.longseq import History, Target
from ranker.longseq.groups import LSH, KMeans, Patching
from tests.ranker.histories import EDGES, NO_PROBES, Shape, assert_same, differentiable, inputs_of, shape, shapes
from tests.ranker.longseq.groups.literal import DIM, age_bias, attended, block_of, window_of

VARIANTS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "K-Means": (KMeans, {}),
    "K-Means, no step": (KMeans, {"steps": 0}),
    "K-Means, groups of one size": (KMeans, {"sizes": False}),
    "LSH": (LSH, {}),
    "LSH, no ages": (LSH, {"age_buckets": 0}),
    "Patching": (Patching, {}),
    "Patching, no ages, groups of one size": (Patching, {"age_buckets": 0, "sizes": False}),
}
caps = st.sampled_from([0, 1, 7, 25])


def repeated(history: History, seed: int, distinct: int = 6) -> History:
    """Events of few different values, as of a user who comes back to the same items."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(distinct, DIM, generator=generator, dtype=torch.float64)
    return history._replace(x=values[torch.randint(0, distinct, [len(history.x)], generator=generator)])


def clusters_of(block: KMeans, x: list[Tensor]) -> list[int]:
    """Lloyd's steps from events at even quantiles, of equal ones the first."""
    n, m = len(x), min(len(x), block.clusters)
    centres = [x[(2 * k + 1) * n // (2 * m)] for k in range(m)]
    first = [k for k in range(m) if not any(bool((centres[k] == centres[j]).all()) for j in range(k))]

    def nearest(x_i: Tensor) -> int:
        return min(first, key=lambda k: float((x_i - centres[k]).square().sum()))

    group = [nearest(x_i) for x_i in x]
    for _ in range(block.steps):
        for k in first:
            members = [x_i for x_i, g in zip(x, group, strict=True) if g == k]
            if members:
                centres[k] = torch.stack(members).mean(0)
        group = [nearest(x_i) for x_i in x]
    return group


def groups_of(block: Any, x: list[Tensor]) -> list[int]:
    """The group of each event of a request, by the method's definition."""
    x = [x_i.detach() for x_i in x]
    if isinstance(block, KMeans):
        return clusters_of(block, x) if x else []
    if isinstance(block, LSH):
        return [sum(2**b for b in range(block.planes.size(2)) if x_i @ block.planes[:, 0, b] > 0) for x_i in x]
    return [j * block.patches // len(x) for j in range(len(x))]


def reference(block: Any, batch: Shape, history: History, target: Target) -> Tensor:
    """Weighted means of groups, and attention to them with the logarithm of their summed weights."""
    rows = [torch.zeros(0, block.out_dim).double()]
    for r in range(batch.requests):
        window = window_of(batch, r, block.length)
        group = groups_of(block, [history.x[i] for i in window])
        weight = [age_bias(block.age.bias, history, r, i).exp() for i in window]
        means: list[Tensor] = []
        sizes: list[Tensor] = []
        for k in sorted(set(group)):
            members = [(w, history.x[i]) for w, i, g in zip(weight, window, group, strict=True) if g == k]
            size = torch.stack([w for w, _ in members]).sum()
            means.append(torch.stack([w * x_i for w, x_i in members]).sum(0) / size)
            sizes.append(size if block.attention.sizes else torch.ones((), dtype=torch.float64))
        for n in range(batch.offsets[r], batch.offsets[r + 1]):
            rows.append(attended(block.attention.project, target.x[n], means, sizes).unsqueeze(0))
    return torch.cat(rows)


def check(batch: Shape, length: int, variant: str, repeats: bool = False) -> None:
    """Outputs, and gradients in events, candidates and all weights."""
    method, options = VARIANTS[variant]
    block = block_of(method, length=length, **options)
    history, target = inputs_of(batch, DIM)
    history, target, inputs = differentiable(repeated(history, batch.seed) if repeats else history, target)
    found = block(history, NO_PROBES, target)
    assert_same(found, reference(block, batch, history, target), [*inputs, *block.parameters()])


@given(shapes(longest=12, most_candidates=2), caps, st.sampled_from(list(VARIANTS)), st.booleans())
@settings(deadline=None, max_examples=50)
def test_equals_the_loop(batch: Shape, length: int, variant: str, repeats: bool):
    """On any batch, with events that are all different or often the same."""
    check(batch, length, variant, repeats)


@pytest.mark.parametrize("variant", ["K-Means", "LSH", "Patching"])
@pytest.mark.parametrize("name", [name for name in EDGES if name != "skewed candidates"])
def test_equals_the_loop_at_the_edges(name: str, variant: str):
    """On the batches that break things."""
    check(EDGES[name], 250, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_loop_in_every_variant(variant: str):
    """With requests that share events."""
    check(EDGES["overlapping windows of one row"], 7, variant, repeats=True)


@pytest.mark.parametrize(("events", "pieces"), [(3, [1, 1, 1]), (4, [1, 1, 1, 1]), (10, [3, 2, 3, 2])])
def test_pieces_are_equal_and_in_order(events: int, pieces: list[int]):
    """Without ages, the logarithm of a piece's size is that of its events; −∞ where there is no event."""
    block = block_of(Patching, age_buckets=0)
    history, _ = inputs_of(shape([events], [(0, 0, events)], [1]), DIM)
    size = block.encode(history, NO_PROBES).size[0].exp()
    assert [round(float(n)) for n in size if n > 0] == pieces


def test_clusters_find_what_is_apart():
    """Four far kinds of events, mixed in time, of unequal numbers: a cluster each, though two start in one kind."""
    kinds = 10 * torch.eye(4, DIM, dtype=torch.float64)
    kind = torch.tensor([0, 0, 1, 0, 2, 0, 3, 1, 0, 2, 0, 3])
    history, _ = inputs_of(shape([12], [(0, 0, 12)], [1]), DIM)
    block = block_of(KMeans, clusters=4)
    group = block.cluster(history._replace(x=kinds[kind] + 0.01 * history.x))
    found = {(int(k), int(g)) for k, g in zip(kind, group, strict=True)}
    assert len({k for k, _ in found}) == 4
    assert len(found) >= 4


def test_clusters_of_few_distinct_events_are_as_many():
    """However many clusters are asked for."""
    history, _ = inputs_of(shape([40], [(0, 0, 40)], [1]), DIM)
    block = block_of(KMeans, clusters=16)
    few = repeated(history, seed=1, distinct=3)
    assert block.cluster(few).unique().numel() == 3
    assert int((~block.encode(few, NO_PROBES).size.isneginf()).sum()) == 3
