"""The delta rule's fast form against its definition, token by token: outputs, last states and all gradients."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from ranker.ops.delta_rule import (
    Writes,
    chunked_delta_rule,
    delta_rule,
    delta_rule_kernel,
    naive_delta_rule,
    read_state,
)
from ranker.ops.delta_rule_forward import pieces_of
from ranker.ops.jagged import offsets_of
from ranker.ops.query_tiles import in_tiles, out_of_tiles, tiles_of

HEADS, DK, DV = 2, 3, 4
any_lengths = st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 16, 33]), max_size=5)
any_chunk = st.sampled_from([1, 2, 7, 8, 16, 64])
any_seed = st.integers(0, 2**31)


class Inputs:
    """Random sequences, every tensor asking for its gradient; `at`: the tokens after which states are asked for."""

    def __init__(
        self,
        lengths: list[int],
        decay: bool,
        begin: bool,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        at: list[int] | None = None,
    ):
        self.generator = torch.Generator().manual_seed(seed)
        self.offsets = offsets_of(torch.tensor(lengths, dtype=torch.int64))
        tokens, self.dtype = sum(lengths), dtype
        self.at = None if at is None else torch.tensor(at, dtype=torch.int64)
        self.tensors: list[Tensor | None] = [
            self.normal(tokens, HEADS, DK),
            normalize(self.normal(tokens, HEADS, DK), dim=2),
            self.normal(tokens, HEADS, DV),
            torch.sigmoid(self.normal(tokens, HEADS)),
            torch.sigmoid(self.normal(tokens, HEADS)),
            -self.normal(tokens, HEADS).exp() if decay else None,
            self.normal(len(lengths), HEADS, DK, DV) if begin else None,
        ]
        self.leaves = [x.requires_grad_() for x in self.tensors if x is not None]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def run(self, form, chunk: int = 8) -> tuple[Tensor, Tensor]:
        """o and states of a form."""
        return form(Writes(*self.tensors[:6]), self.offsets, chunk, self.tensors[6], self.at)

    def everything(self, form, chunk: int = 8) -> list[Tensor]:
        """o, states, and the gradients of a fixed weighting of both in all inputs."""
        o, last = self.run(form, chunk)
        generator = torch.Generator().manual_seed(7)
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (o, last)]
        loss = (o * weights[0]).sum() + (last * weights[1]).sum()
        return [o, last, *torch.autograd.grad(loss, self.leaves, allow_unused=True, materialize_grads=True)]


def assert_all_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    """Pairwise."""
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", [delta_rule, chunked_delta_rule])
@given(lengths=any_lengths, chunk=any_chunk, decay=st.booleans(), begin=st.booleans(), seed=any_seed)
@example(lengths=[], chunk=8, decay=True, begin=False, seed=0)
@example(lengths=[0, 0], chunk=8, decay=True, begin=True, seed=0)
@example(lengths=[1], chunk=8, decay=False, begin=False, seed=0)
@example(lengths=[5, 0, 41, 8], chunk=8, decay=True, begin=True, seed=0)
@settings(deadline=None, max_examples=25)
def test_equals_the_token_loop(form, lengths: list[int], chunk: int, decay: bool, begin: bool, seed: int):
    """For every chunk size, with and without decay and a state to begin with; so do all gradients."""
    inputs = Inputs(lengths, decay, begin, seed)
    assert_all_close(inputs.everything(form, chunk), inputs.everything(naive_delta_rule))


@pytest.mark.parametrize("form", [delta_rule, chunked_delta_rule])
@given(data=st.data(), lengths=any_lengths, chunk=any_chunk, decay=st.booleans(), begin=st.booleans(), seed=any_seed)
@settings(deadline=None, max_examples=25)
def test_states_after_any_tokens(form, data: st.DataObject, lengths: list[int], chunk: int, decay, begin, seed: int):
    """In any order, several of a chunk or one twice, none at all: as the token loop has them; so are all gradients."""
    any_token = st.integers(0, max(sum(lengths) - 1, 0))
    at = data.draw(st.lists(any_token, max_size=9 if sum(lengths) else 0))
    inputs = Inputs(lengths, decay, begin, seed, at=at)
    assert_all_close(inputs.everything(form, chunk), inputs.everything(naive_delta_rule))


def test_states_after_the_last_tokens_are_the_last_ones():
    """Where every sequence has a token."""
    lengths = [5, 41, 1, 8]
    ends = (offsets_of(torch.tensor(lengths))[1:] - 1).tolist()
    last, asked = (Inputs(lengths, decay=True, begin=True, at=at) for at in (None, ends))
    assert_all_close(asked.everything(delta_rule), last.everything(delta_rule))


def test_more_chunks_than_a_block():
    """Blocks of chunks and ranks that end inside a block change nothing."""
    inputs = Inputs([700, 1, 300, 299], decay=True, begin=True)
    assert_all_close(inputs.everything(delta_rule, 1), inputs.everything(delta_rule, 100), 1e-8)
    inputs = Inputs([700, 1, 300, 299], decay=True, begin=True, at=[1299, 0, 650, 651, 700, 1000])
    assert_all_close(inputs.everything(delta_rule, 1), inputs.everything(delta_rule, 100), 1e-8)
    many = Inputs([3] * 600, decay=True, begin=False)
    assert_all_close(many.everything(delta_rule, 32), many.everything(chunked_delta_rule, 3), 1e-8)


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 20), st.integers(1, 3))
@settings(deadline=None)
def test_blocks_have_every_chunk_once(counts: list[int], step: int, heads: int):
    """In order, and in no more pieces than there are ranks and blocks: the work is that of the chunks."""
    active = sorted(counts, reverse=True)
    blocks = pieces_of(active, heads, step)
    rows = [range(piece.first, piece.end) for block in blocks for piece in block]
    assert [row for piece in rows for row in piece] == list(range(sum(active) * heads))
    for number, block in enumerate(blocks):
        assert all(number * step * heads <= p.first < p.end <= (number + 1) * step * heads for p in block)
    assert len(rows) <= len(active) + len(blocks)


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("at", [None, [3, 0, 2, 0]])
def test_gradients_are_those_of_finite_differences(decay: bool, at: list[int] | None):
    """In float64, over chunks that are full, partial and missing."""
    inputs = Inputs([3, 0, 1], decay, begin=True, at=at)
    present = [i for i, x in enumerate(inputs.tensors) if x is not None]

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        tensors: list[Tensor | None] = [None] * 7
        for i, leaf in zip(present, leaves, strict=True):
            tensors[i] = leaf
        return delta_rule(Writes(*tensors[:6]), inputs.offsets, 2, tensors[6], inputs.at)

    assert torch.autograd.gradcheck(run, inputs.leaves)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_short_floats_lose_little(dtype: torch.dtype, tolerance: float):
    """Of the greatest output, and a few times that of the greatest gradient, over 3,000 tokens."""
    exact = Inputs([3000, 1000], decay=True, begin=True)
    rounded = Inputs([3000, 1000], decay=True, begin=True, dtype=dtype)
    for i, (found, expected) in enumerate(
        zip(rounded.everything(delta_rule, 32), exact.everything(delta_rule, 32), strict=True)
    ):
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error < (tolerance if i < 2 else 4 * tolerance)


def test_strong_decay_is_finite():
    """A gap that underflows e^g forgets; it divides by nothing."""
    inputs = Inputs([40], decay=False, begin=True)
    inputs.tensors[5] = torch.full([40, HEADS], -500.0, dtype=torch.float64).requires_grad_()
    found = inputs.everything(delta_rule, 16)
    assert all(x.isfinite().all() for x in found)
    assert_all_close(found, inputs.everything(naive_delta_rule))


@given(any_lengths, st.integers(0, 40), any_seed)
@settings(deadline=None, max_examples=20)
def test_later_tokens_continue_a_state(lengths: list[int], split: int, seed: int):
    """All at once, or some tokens now and the rest later from the state kept."""
    inputs = Inputs(lengths, decay=True, begin=False, seed=seed)
    o, last = inputs.run(delta_rule)
    ends = [
        (a, min(a + split, b), b) for a, b in zip(inputs.offsets.tolist(), inputs.offsets[1:].tolist(), strict=False)
    ]
    state = None
    pieces: list[list[Tensor]] = []
    for part in (0, 1):
        rows = torch.cat([torch.zeros(0, dtype=torch.int64)] + [torch.arange(e[part], e[part + 1]) for e in ends])
        offsets = offsets_of(torch.tensor([e[part + 1] - e[part] for e in ends], dtype=torch.int64))
        writes = Writes(*[x[rows] for x in inputs.tensors[:6] if x is not None])
        found, state = delta_rule(writes, offsets, 8, state)
        pieces.append([found[a:b] for a, b in zip(offsets.tolist(), offsets[1:].tolist(), strict=False)])
    joined = torch.cat([o[:0]] + [torch.cat(both) for both in zip(*pieces, strict=True)])
    torch.testing.assert_close(joined, o)
    torch.testing.assert_close(state, last)


@given(st.integers(1, 30), any_seed)
@settings(deadline=None, max_examples=20)
def test_full_erasure_overwrites(length: int, seed: int):
    """With a = b = 1 and no decay a key read back gives the value last written to it."""
    inputs = Inputs([length], decay=False, begin=True, seed=seed)
    _, k, v, erase, write, _, state = inputs.tensors
    writes = Writes(k, k, v, torch.ones_like(erase), torch.ones_like(write), None)
    o, _ = delta_rule(writes, inputs.offsets, 8, state)
    torch.testing.assert_close(o, v, rtol=1e-8, atol=1e-8)


@given(st.lists(st.integers(0, 5), max_size=5), any_seed)
@settings(deadline=None, max_examples=30)
def test_queries_read_their_requests_state(counts: list[int], seed: int):
    """Any number of queries a request, one far more than the others too."""
    counts = [*counts, 150]
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(counts), HEADS, DK, generator=generator)
    state = torch.randn(len(counts), HEADS, DK, DV, generator=generator)
    request = [r for r, n in enumerate(counts) for _ in range(n)]
    expected = torch.stack([torch.stack([q[n, h] @ state[r, h] for h in range(HEADS)]) for n, r in enumerate(request)])
    tiles = tiles_of(offsets_of(torch.tensor(counts)))
    found = read_state(in_tiles(q, tiles), tiles, state).flatten(2)
    torch.testing.assert_close(out_of_tiles(found, tiles), expected.flatten(1))


def test_reading_nothing():
    """No queries, and no requests."""
    for requests in (0, 2):
        tiles = tiles_of(torch.zeros(requests + 1, dtype=torch.int64))
        found = read_state(in_tiles(torch.zeros(0, 2, 3), tiles), tiles, torch.zeros(requests, 2, 3, 4))
        assert out_of_tiles(found.flatten(2), tiles).shape == (0, 8)


@pytest.mark.parametrize("decay", [False, True])
def test_scripts(decay: bool):
    """TorchScript gives the same, on every size."""
    scripted = torch.jit.script(delta_rule)
    sizes = [([9, 0, 30], None), ([9, 0, 30], [38, 3, 20]), ([1], None), ([], None), ([], []), ([17, 17], [0])]
    for lengths, at in sizes:
        inputs = Inputs(lengths, decay, begin=False, at=at)
        for _ in range(2):
            found = inputs.run(scripted)
            torch.testing.assert_close(found, inputs.run(naive_delta_rule))


def test_the_backward_pass_keeps_no_chunk_by_chunk_matrix():
    """What is saved for it grows with the tokens like a few copies of the inputs, whatever the chunk."""
    inputs = Inputs([4096], decay=True, begin=False)

    def saved(form, chunk: int) -> int:
        numbers = 0

        def count(x: Tensor) -> Tensor:
            nonlocal numbers
            numbers += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            inputs.run(form, chunk)
        return numbers

    assert saved(delta_rule, 128) < 0.1 * saved(chunked_delta_rule, 128)
    assert saved(delta_rule, 64) <= 4096 * HEADS * (3 * DK + DV + 3) + 4096 // 64 * HEADS * (DK * DK + DK * DV)


def test_the_kernel_is_named():
    """The processor runs our own."""
    assert delta_rule_kernel(torch.device("cpu")) == "chunked"


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("fla") is None,
    reason="needs a CUDA device, with flash-linear-attention",
)
def test_flash_linear_attention_agrees():
    """To the kernel's own rounding."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([300, 0, 77])
    q, k, v = (torch.randn(377, 2, 32, generator=generator) for _ in range(3))
    erase, write = (torch.rand(377, 2, generator=generator) for _ in range(2))
    log_decay = -torch.rand(377, 2, generator=generator)
    inputs = [normalize(q, dim=2), normalize(k, dim=2), v, erase.clamp(min=1e-2), write, log_decay]
    offsets = offsets_of(lengths)
    on_device = delta_rule(Writes(*[x.cuda() for x in inputs]), offsets.cuda())
    assert delta_rule_kernel(torch.device("cuda")) == "flash-linear-attention"
    for found, expected in zip(on_device, delta_rule(Writes(*inputs), offsets), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=2e-2, atol=2e-2)
