"""The padded forms that ``torch.export`` traces give what the jagged ones give, on any jagged batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ranker.longseq import MeanPooling, UxSID
from ranker.longseq.encoders import ELASTIC, HSTU, LONGER, SASRec
from ranker.longseq.groups import LSH, SDIM, Aggregator, CFormer, KMeans, Patching, PolyEncoder
from ranker.longseq.hytrec import HyTRec
from ranker.longseq.protocol import History, Probes, Target
from ranker.longseq.stored import Stored
from ranker.ops.attention import window_attention
from ranker.ops.delta_rule import Writes, delta_rule
from ranker.ops.group_attention import group_attention
from ranker.ops.jagged import offsets_of
from ranker.ops.local_attention import local_attention
from ranker.ops.padded import exporting, in_places, out_of_places, padded_rows
from ranker.ops.pointwise_attention import pointwise_attention
from ranker.ops.query_tiles import in_tiles, out_of_tiles, tiles_of
from ranker.ops.running_mean import running_mean, running_mean_plan
from ranker.ops.short_attention import short_attention
from ranker.ops.votes import history_leaves, keep_agents, keep_leaves
from ranker.towers import DIN
from tests.ranker.histories import EDGES, NO_PROBES, Shape, inputs_of, randomise, shapes
from tests.ranker.longseq.test_hisac import WAYS, batch_of, block_of

LENGTHS = st.lists(st.integers(0, 90), min_size=1, max_size=5)


@contextmanager
def traced() -> Iterator[None]:
    """Operators take the forms that they have while ``torch.export`` traces them."""
    with patch("torch.compiler.is_exporting", return_value=True):
        assert exporting()
        yield
    assert not exporting()


def check(form: Callable[[], Tensor | tuple[Tensor, ...]]) -> None:
    """Both forms give the same, in float64."""
    with torch.no_grad():
        expected = form()
        with traced():
            found = form()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def normal(seed: int, *size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some(batch: Shape) -> bool:
    """A traced graph is given at least one request."""
    return batch.requests > 0


@given(LENGTHS)
def test_tokens_come_back_from_their_places(lengths: list[int]):
    offsets = offsets_of(torch.tensor(lengths))
    x = torch.arange(1, 1 + int(offsets[-1])).unsqueeze(1)
    places = in_places(x, padded_rows(offsets[:-1], offsets[1:], 100, len(x)))
    assert places.shape == (len(lengths), 100, 1)
    assert [int((row > 0).sum()) for row in places] == lengths
    assert torch.equal(out_of_places(places, offsets, len(x)), x)


@given(shapes().filter(some), st.booleans(), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_window_attention(batch: Shape, bias: bool, seen: bool, shared: bool):
    start, end, offsets = batch.windows()
    q, k, v = (normal(i, n, 2, 4) for i, n in enumerate((batch.candidates, batch.events, batch.events)))
    length = end - start
    b = normal(3, int(length.sum()), 2) if bias else None
    first = (length.repeat_interleave(offsets[1:] - offsets[:-1]) // 2).clamp(min=1) if seen else None
    check(lambda: window_attention(q, offsets, k, k if shared else v, start, end, b, 0, first))


@given(shapes().filter(some), st.booleans())
@settings(deadline=None, max_examples=60)
def test_short_attention_in_tiles(batch: Shape, share: bool):
    start, end, offsets = batch.windows()
    q, k, v = (normal(i, n, 2, 4) for i, n in enumerate((batch.candidates, batch.events, batch.events)))

    def form() -> Tensor:
        tiles = tiles_of(offsets, elements=batch.candidates)
        return out_of_tiles(short_attention(in_tiles(q, tiles), tiles, k, v, start, end).flatten(2), tiles)

    check(form)


@given(shapes().filter(some))
@settings(deadline=None, max_examples=40)
def test_group_attention(batch: Shape):
    q, offsets = normal(0, batch.candidates, 2, 4), batch.windows()[2]
    k, v = normal(1, batch.requests, 3, 2, 4), normal(2, batch.requests, 3, 2, 4)
    size = normal(3, batch.requests, 3, 2)
    size[::2, 1:], size[1::3] = float("-inf"), float("-inf")
    check(lambda: group_attention(q, offsets, k, v, size))


@given(LENGTHS, st.booleans(), st.sampled_from([1, 16, 32]))
@settings(deadline=None, max_examples=40)
def test_delta_rule(lengths: list[int], decays: bool, chunk: int):
    """By doublings, where the jagged form scans."""
    offsets = offsets_of(torch.tensor(lengths))
    tokens = int(offsets[-1])
    q, k, v = normal(0, tokens, 2, 4), nn.functional.normalize(normal(1, tokens, 2, 4), dim=2), normal(2, tokens, 2, 3)
    erase, write = torch.sigmoid(normal(3, tokens, 2)), torch.sigmoid(normal(4, tokens, 2))
    writes = Writes(q, k, v, erase, write, -normal(5, tokens, 2).abs() if decays else None)
    check(lambda: delta_rule(writes, offsets, chunk))


@given(LENGTHS, st.sampled_from([0, 1, 7, 37, 64, 200]))
@settings(deadline=None, max_examples=60)
def test_local_attention(lengths: list[int], window: int):
    offsets = offsets_of(torch.tensor(lengths))
    q, k, v = (normal(i, int(offsets[-1]), 2, 4) for i in range(3))
    check(lambda: local_attention(q, k, v, offsets, window))


@given(LENGTHS)
@settings(deadline=None, max_examples=40)
def test_pointwise_attention(lengths: list[int]):
    offsets = offsets_of(torch.tensor(lengths))
    tokens = int(offsets[-1])
    q, k, v = (normal(i, tokens, 2, 4) for i in range(3))
    second = torch.arange(tokens) * 1000
    between, elapsed = normal(4, 9), normal(5, 8)
    check(lambda: pointwise_attention(q, k, v, offsets, second, between, elapsed, 16))


@given(LENGTHS)
@settings(deadline=None, max_examples=40)
def test_running_mean(lengths: list[int]):
    offsets = offsets_of(torch.tensor(lengths))
    x = normal(0, int(offsets[-1]), 3)
    check(lambda: running_mean(x, running_mean_plan(offsets, x)))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "mean": lambda: MeanPooling(8),
    "hytrec": lambda: HyTRec(8, width=8, layers=2, ratio=1, short_length=5, window=16),
    "hytrec, decay of the state": lambda: HyTRec(8, width=8, layers=2, ratio=1, decay="state", deviation="previous"),
    "longer": lambda: LONGER(8, width=8, recent=5, global_tokens=2, layers=1),
    "elastic": lambda: ELASTIC(8, width=8, experts=4, pool=20, retrieve=3),
    "sasrec": lambda: SASRec(8, width=8, layers=1, length=40),
    "hstu": lambda: HSTU(8, width=8, layers=1, length=40),
    "cformer": lambda: CFormer(8, width=8, queries=4, head_dim=4),
    "aggregator": lambda: Aggregator(8, queries=4, width=8, head_dim=4),
    "poly_encoder": lambda: PolyEncoder(8, codes=4, width=8),
    "kmeans": lambda: KMeans(8, clusters=6, head_dim=4),
    "lsh": lambda: LSH(8, bits=3, head_dim=4),
    "sdim": lambda: SDIM(8, hashes=4, bits=2),
    "patching": lambda: Patching(8, patches=6, head_dim=4),
    "din": lambda: DIN(8, [6], length=20, age_buckets=4),
    "din with softmax": lambda: DIN(8, [6], length=0, softmax=True),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_whole(name: str):
    """Encoding, records and reading, at the edges too."""
    block = randomise(BLOCKS[name]()).eval()
    for batch in filter(some, EDGES.values()):
        check(partial(answers, block, *inputs_of(batch, 8)))


def answers(block: Any, history: History, target: Target) -> tuple[Tensor, ...]:
    """What there is of a block: records, and what candidates read of the memory, of records and of lost ones."""
    if isinstance(block, DIN):
        return (block(history, target),)
    memory = block.encode(history, NO_PROBES)
    stored: Stored = block.store(memory)
    lost = stored._replace(values=stored.values[:0], exact=stored.exact[:0], lengths=stored.lengths * 0)
    read = [block.read(block.restore(records, history.now), target) for records in (stored, lost)]
    return (*stored, block.read(memory, target), *read)


@given(shapes().filter(some))
@settings(deadline=None, max_examples=30)
def test_uxsid(batch: Shape):
    """Whose records are of probes."""
    torch.manual_seed(0)
    block = randomise(UxSID(8, 8, width=8, anchors=3, anchor_hidden=4, gate_hidden=4)).eval()
    history, _ = inputs_of(batch, 8)
    request = torch.arange(batch.requests).repeat_interleave(torch.arange(batch.requests) % 3)
    probes = Probes(normal(1, len(request), 8), request, request)

    def form() -> Tensor:
        stored = block.store(block.encode(history, probes))  # type: ignore[operator]
        return block.restore(stored, history.now).rows  # type: ignore[operator]

    check(form)


@given(shapes().filter(some), st.integers(1, 3), st.sampled_from(["mixed", "one code", "many"]), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_votes(batch: Shape, levels: int, kind: str, most: int):
    """The same leaves, agents by pruning, and agents without it."""
    history, _ = batch_of(batch, levels, kind)

    def form() -> tuple[Tensor, ...]:
        leaves = history_leaves(history.code, history.time, history.start, history.end)
        return (*leaves, *keep_agents(leaves, [2, 1, 2][:levels]), *keep_leaves(leaves, most))

    check(form)


@pytest.mark.parametrize(("routing", "z"), WAYS)
@pytest.mark.parametrize("voting", [False, True])
def test_hisac(routing: str, z: str, voting: bool):
    """Every routing in every space."""
    block = block_of(routing=routing, z=z, voting=voting, most_leaves=3).eval()
    for batch in filter(some, EDGES.values()):
        check(partial(answers, block, *batch_of(batch)))
