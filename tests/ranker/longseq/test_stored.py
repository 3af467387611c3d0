"""Stored memories of every compressor: nothing that is read is lost, and a lost record is an empty history."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.longseq import HiSAC, History, HyTRec, MeanPooling, Probes, Target, UxSID
from ranker.longseq.encoders import ELASTIC, HSTU, LONGER, SASRec
from ranker.longseq.groups import LSH, SDIM, VQL, Aggregator, CFormer, KMeans, Patching, PolyEncoder
from ranker.longseq.stored import Stored, restore_parts, restore_rows, store_parts, store_rows
from ranker.ops.probing import distinct_probes
from tests.ranker.histories import EDGES, Shape, inputs_of, shape, shapes

DIM, WIDTH = 6, 4
any_shape = st.one_of(shapes(), st.sampled_from(list(EDGES.values())))
CODEWORDS = [
    torch.cat([torch.zeros(1, 3), torch.randn(k, 3, generator=torch.Generator().manual_seed(k))]) for k in (4, 3)
]
PER_PROBE = ("uxsid", "uxsid, one row")
COMPRESSORS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "mean": (MeanPooling, {}),
    "uxsid": (UxSID, {"probe_dim": WIDTH, "width": 4, "anchors": 3}),
    "uxsid, one row": (UxSID, {"probe_dim": WIDTH, "width": 4, "local_probe": False}),
    "hisac": (HiSAC, {"codewords": CODEWORDS, "keep": [3, 2], "head_dim": 3}),
    "hytrec": (HyTRec, {"width": 4, "layers": 2, "ratio": 1, "short_length": 5}),
    "hytrec, decaying state": (HyTRec, {"width": 4, "layers": 2, "ratio": 1, "short_length": 5, "decay": "state"}),
    "sdim": (SDIM, {"hashes": 3, "bits": 2}),
    "vql": (VQL, {"codes": 4, "head_dim": 3}),
    "cformer": (CFormer, {"queries": 3, "width": 4, "head_dim": 3}),
    "kmeans": (KMeans, {"clusters": 4, "head_dim": 3}),
    "lsh": (LSH, {"bits": 2, "head_dim": 3}),
    "patching": (Patching, {"patches": 4, "head_dim": 3, "sizes": False}),
    "aggregator": (Aggregator, {"queries": 3, "width": 4, "head_dim": 3}),
    "poly_encoder": (PolyEncoder, {"codes": 3, "width": 4}),
    "longer": (LONGER, {"width": 4, "recent": 3, "global_tokens": 2, "layers": 1}),
    "elastic": (ELASTIC, {"width": 4, "experts": 3, "pool": 5, "retrieve": 2}),
    "sasrec": (SASRec, {"width": 4, "layers": 1, "length": 10}),
    "sasrec, last": (SASRec, {"width": 4, "layers": 1, "length": 10, "read": "last"}),
    "hstu": (HSTU, {"width": 4, "layers": 1, "length": 10}),
    "hstu, last": (HSTU, {"width": 4, "layers": 1, "length": 0, "read": "last"}),
}


def dtype_of(name: str) -> torch.dtype:
    """Compared is the same number by other ways; in float32 rounding is far from even where HyTRec brings a small read
    to size."""
    return torch.float64 if name.startswith("hytrec") else torch.float32


def block_of(name: str) -> Any:
    """With random weights: zeros, as many start, would hide what is lost."""
    method, options = COMPRESSORS[name]
    torch.manual_seed(0)
    block = method(DIM, **options).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return block.to(dtype_of(name))


def batch_of(name: str, batch: Shape) -> tuple[History, Probes, Target]:
    """Random events and candidates, those of one group with one probe."""
    history, target = inputs_of(batch, DIM)
    generator = batch.generator()
    code = torch.randint(0, 4, [batch.events, 2], generator=generator)
    content = torch.randn(batch.events, 3, generator=generator)
    history = history._replace(x=history.x.to(dtype_of(name)), code=code, content=content)
    target, none = target._replace(x=target.x.to(dtype_of(name))), target.probe
    if name not in PER_PROBE:
        return history, Probes(target.x[:0], none, none), target
    group, request, probe, _ = distinct_probes(
        torch.randint(0, 3, [batch.candidates], generator=generator), target.offsets
    )
    embedding = torch.randn(3, WIDTH, generator=generator)
    return history, Probes(embedding[group], group, request), target._replace(probe=probe)


def kept(stored: Stored, keep: Tensor) -> Stored:
    """The same records, those that are not in `keep` `[U]` lost."""
    record = torch.arange(keep.numel())
    of_value, of_exact = (torch.repeat_interleave(record, stored.lengths[:, i]) for i in range(2))
    lengths = stored.lengths * keep.unsqueeze(1)
    return Stored(stored.values[keep[of_value]], stored.exact[keep[of_exact]], lengths, stored.time * keep)


def restored(block: Any, stored: Stored, history: History) -> Any:
    return block.restore(stored, history.now)


def emptied(history: History, keep: Tensor) -> History:
    """The same requests, those that are not in `keep` `[R]` without events."""
    return history._replace(end=torch.where(keep, history.end, history.start))


@pytest.mark.parametrize("name", COMPRESSORS)
@given(any_shape)
@settings(deadline=None, max_examples=20)
def test_a_stored_memory_reads_the_same(name: str, batch: Shape):
    """To the bit, and its numbers are those that the lengths tell, request by request or probe by probe."""
    block = block_of(name)
    history, probes, target = batch_of(name, batch)
    memory = block.encode(history, probes)
    stored = block.store(memory)
    records = probes.request.numel() if name in PER_PROBE else batch.requests
    assert stored.lengths.shape == (records, 2)
    assert stored.lengths.sum(0).tolist() == [stored.values.numel(), stored.exact.numel()]
    assert stored.time.shape == (records,)
    assert stored.exact.dtype == torch.float32
    assert stored.lengths.dtype == stored.time.dtype == torch.int64
    found = block.read(restored(block, stored, history), target)
    torch.testing.assert_close(found, block.read(memory, target), rtol=0, atol=0)


@pytest.mark.parametrize("name", COMPRESSORS)
@given(any_shape, st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_a_lost_record_reads_as_an_empty_history(name: str, batch: Shape, seed: int):
    """Whichever are lost, among others that are not."""
    block = block_of(name)
    history, probes, target = batch_of(name, batch)
    keep = torch.rand(batch.requests, generator=torch.Generator().manual_seed(seed)) < 0.5
    record = probes.request if name in PER_PROBE else torch.arange(batch.requests)
    stored = kept(block.store(block.encode(history, probes)), keep[record])
    found = block.read(restored(block, stored, history), target)
    expected = block.read(block.encode(emptied(history, keep), probes), target)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", COMPRESSORS)
@given(shapes(longest=20), st.booleans())
@settings(deadline=None, max_examples=10)
def test_records_of_single_requests_read_as_those_made_together(name: str, batch: Shape, scripted: bool):
    """What is stored user by user is read request by request; eager or scripted."""
    block = block_of(name)
    history, probes, target = batch_of(name, batch)
    expected = block.read(block.encode(history, probes), target)
    made = [Stored(*(x[:0] for x in block.store(block.encode(history, probes))))]
    user = _scripted(name) if scripted else block
    for r in range(batch.requests):
        alone = history._replace(start=history.start[r : r + 1], end=history.end[r : r + 1], now=history.now[r : r + 1])
        own = probes.request == r
        asked = Probes(probes.x[own], probes.code[own], torch.zeros_like(probes.request[own])) if len(own) else probes
        made.append(user.store(user.encode(alone, asked)))
    together = Stored(*(torch.cat(parts) for parts in zip(*made, strict=True)))
    found = user.read(restored(user, together, history), target)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


_SCRIPTED: dict[str, Any] = {}


def _scripted(name: str) -> Any:
    """Compiled once for all examples."""
    if name not in _SCRIPTED:
        _SCRIPTED[name] = torch.jit.script(block_of(name))
    return _SCRIPTED[name]


@pytest.mark.parametrize("name", COMPRESSORS)
def test_scripted_records_are_the_same(name: str):
    """Compiled twice over, as TorchScript specialises what it has seen; every size of batch after another."""
    block = block_of(name)
    for batch in [*EDGES.values(), *reversed(EDGES.values())]:
        history, probes, target = batch_of(name, batch)
        stored = block.store(block.encode(history, probes))
        found = _scripted(name).store(_scripted(name).encode(history, probes))
        for ours, theirs in zip(found, stored, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        out = _scripted(name).read(restored(_scripted(name), found, history), target)
        torch.testing.assert_close(out, block.read(restored(block, stored, history), target), rtol=1e-5, atol=1e-5)


def test_vql_is_read_at_any_later_time():
    """Its memory is brought to the time of reading, as if made then."""
    block = block_of("vql")
    history, probes, target = batch_of("vql", shape([12, 3, 0], [(0, 0, 12), (1, 0, 3), (2, 0, 0)], [3, 2, 2]))
    stored = block.store(block.encode(history, probes))
    later = history._replace(now=history.now + 30 * 86_400_000)
    found = block.read(block.restore(stored, later.now), target)
    torch.testing.assert_close(found, block.read(block.encode(later, probes), target), rtol=0, atol=0)
    assert (found - block.read(block.restore(stored, history.now), target)).abs().max() > 1e-4


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=6))
def test_parts_lie_one_after_another_in_a_record(counts: list[tuple[int, int]]):
    """Record u is its rows of the first part, then its rows of the second, and both are found again."""
    first, second = (torch.tensor([c[i] for c in counts], dtype=torch.int64) for i in range(2))
    a = torch.arange(int(first.sum()) * 2).view(-1, 2).float()
    b = 1000 + torch.arange(int(second.sum()) * 3).view(-1, 1, 3).float()
    stored = store_parts([a, b], [first, second], a[:, 0])
    expected: list[float] = []
    for u in range(len(counts)):
        expected += a[int(first[:u].sum()) :][: counts[u][0]].flatten().tolist()
        expected += b[int(second[:u].sum()) :][: counts[u][1]].flatten().tolist()
    assert stored.values.tolist() == expected
    assert stored.lengths.tolist() == [[2 * m + 3 * n, m] for m, n in counts]
    assert stored.exact.tolist() == a[:, 0].tolist()
    found = restore_parts(stored.values, stored.lengths[:, 0], [first, second], [[2], [1, 3]])
    assert torch.equal(found[0], a)
    assert torch.equal(found[1], b)


def test_lost_rows_are_zero():
    """The others are where they were."""
    rows = torch.arange(1.0, 13.0).view(3, 2, 2)
    stored = kept(store_rows(rows), torch.tensor([True, False, True]))
    found = restore_rows(stored.values, stored.lengths[:, 0], [2, 2])
    assert torch.equal(found, rows * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1))
