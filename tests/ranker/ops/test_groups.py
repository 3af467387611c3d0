"""Sums by group, nearest centres, attention to groups and SimHash against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranker.ops.group_attention import group_attention, log_size
from ranker.ops.groups import group_sums, naive_group_sums, nearest_group
from ranker.ops.simhash import hash_buckets, hash_signs, random_planes
from tests.ranker.histories import EDGES, Shape, assert_same, shape, shapes

any_shape = st.one_of(shapes(longest=20), st.sampled_from(list(EDGES.values())))


@given(any_shape, st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_sums_by_group_equal_the_definition(batch: Shape, ways: int, groups: int, weights: int):
    """And their gradients; any integer type."""
    start, end, _ = batch.windows()
    generator, pairs = batch.generator(), int((end - start).sum())
    x = torch.randn(batch.events, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(pairs, weights, generator=generator, dtype=torch.float64, requires_grad=True)
    group = torch.randint(0, groups, [pairs, ways], generator=generator, dtype=torch.int16)
    found = group_sums(x, group, weight, start, end, groups)
    assert found.shape == (batch.requests, ways, groups, weights, 3)
    assert_same(found, naive_group_sums(x, group, weight, start, end, groups), [x, weight])


def test_sums_over_many_blocks_equal_the_definition():
    """Of more pairs than are worked on at once."""
    batch = shape([3000, 40], [(0, 0, 3000), (0, 5, 2990), (1, 0, 40)], [1, 1, 1])
    start, end, _ = batch.windows()
    generator, pairs = batch.generator(), 3000 + 2985 + 40
    x = torch.randn(batch.events, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(pairs, 1, generator=generator, dtype=torch.float64, requires_grad=True)
    group = torch.randint(0, 128, [pairs, 1], generator=generator)
    assert_same(
        group_sums(x, group, weight, start, end, 128), naive_group_sums(x, group, weight, start, end, 128), [x, weight]
    )


def peak_growth(length: int) -> int:
    """Bytes of tensors that autograd keeps for the sums of a window beside the inputs."""
    x, start = torch.randn(length, 4, requires_grad=True), torch.tensor([0])
    group, weight = torch.zeros(length, 8, dtype=torch.int16), torch.ones(length, 1, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        if value.data_ptr() not in {t.data_ptr() for t in (x, group, weight)}:
            kept[value.data_ptr()] = value.numel() * value.element_size()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        group_sums(x, group, weight, start, start + length, 8)
    return sum(kept.values())


def test_sums_keep_nothing_of_the_events_for_the_backward_pass():
    """But the inputs, whatever the length."""
    assert peak_growth(10) == peak_growth(1000) <= 16


@given(any_shape, st.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_the_nearest_centre_is_the_nearest_of_those_taken(batch: Shape, k: int):
    """Of its own request."""
    start, end, _ = batch.windows()
    generator = batch.generator()
    x = torch.randn(batch.events, 3, generator=generator, dtype=torch.float64)
    centre = torch.randn(batch.requests, k, 3, generator=generator, dtype=torch.float64)
    taken = torch.rand(batch.requests, k, generator=generator) < 0.6
    taken[:, 0] |= ~taken.any(1)
    expected: list[int] = []
    for r in range(batch.requests):
        for i in range(batch.start[r], batch.end[r]):
            distance = [float((x[i] - c).norm()) if t else math.inf for c, t in zip(centre[r], taken[r], strict=True)]
            expected.append(distance.index(min(distance)))
    assert nearest_group(x, start, end, centre, taken).tolist() == expected


@given(shapes(), st.integers(1, 4), st.booleans())
@settings(deadline=None, max_examples=40)
def test_attention_to_groups_equals_the_loop(batch: Shape, k: int, by_head: bool):
    """Groups without events take no part; where a request has none, candidates get zeros and no gradient."""
    _, _, offsets = batch.windows()
    generator = batch.generator()
    heads, d = 2, 3
    q = torch.randn(batch.candidates, heads, d, generator=generator, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(batch.requests, k, heads, d, generator=generator, dtype=torch.float64, requires_grad=True)
    v = torch.randn(batch.requests, k, heads, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    of = [batch.requests, k, heads if by_head else 1]
    count = torch.randint(0, 3, of, generator=generator).double().requires_grad_()
    found = group_attention(q, offsets, keys, v, log_size(count))
    rows = [torch.zeros(0, heads * 4).double()]
    for r in range(batch.requests):
        for n in range(batch.offsets[r], batch.offsets[r + 1]):
            parts: list[torch.Tensor] = []
            for h in range(heads):
                size = count[r, :, h if by_head else 0]
                seen = [a for a in range(k) if size[a] > 0]
                logits = [q[n, h] @ keys[r, a, h] / d**0.5 + size[a].log() for a in seen]
                values = [v[r, a, h] for a in seen]
                parts.append(
                    torch.softmax(torch.stack(logits), 0) @ torch.stack(values) if seen else torch.zeros(4).double()
                )
            rows.append(torch.cat(parts).unsqueeze(0))
    assert_same(found, torch.cat(rows), [q, keys, v, count])


@pytest.mark.parametrize("bits", [3, 10])
def test_hashes_take_no_part_in_autocast(bits: int):
    torch.manual_seed(0)
    x, planes = torch.randn(2_000, 16), random_planes(16, 4, bits)
    with torch.autocast("cpu", torch.bfloat16):
        bucket, signs = hash_buckets(x, planes), hash_signs(x, planes[:, 0])
    assert torch.equal(bucket, hash_buckets(x, planes))
    assert torch.equal(signs, hash_signs(x, planes[:, 0]))
    assert int(bucket.max()) == 2**bits - 1


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=20)
def test_a_hash_sees_directions_alone(seed: int, scale: float):
    """Bit by bit the side of a plane; the opposite vector is on the other side of all."""
    torch.manual_seed(seed)
    planes = random_planes(4, 3, 5)
    x = torch.randn(7, 4)
    bucket = hash_buckets(x, planes)
    assert torch.equal(hash_buckets(scale * x, planes), bucket)
    assert torch.equal(hash_buckets(-x, planes), 31 - bucket)
    for n, h in ((0, 0), (6, 2)):
        assert int(bucket[n, h]) == sum(2**b for b in range(5) if x[n] @ planes[:, h, b] > 0)


@pytest.mark.parametrize("degrees", [30.0, 90.0, 150.0])
def test_bits_agree_as_the_angle_says(degrees: float):
    """With probability 1 − θ/π: of 10,000 planes, within four standard deviations."""
    torch.manual_seed(0)
    theta = math.radians(degrees)
    x = torch.tensor([[1.0, 0.0], [math.cos(theta), math.sin(theta)]])
    bits = hash_buckets(x, random_planes(2, 10_000, 1))
    agree = float((bits[0] == bits[1]).float().mean())
    expected = 1 - theta / math.pi
    assert abs(agree - expected) < 4 * (expected * (1 - expected) / 10_000) ** 0.5
