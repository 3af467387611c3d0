"""Int.R@k, the share of a probe's most attended events that have its code, against sorting."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranker.longseq.uxsid import interest_recall
from tests.ranker.histories import Shape, shapes

few = settings(deadline=None, max_examples=15)


def test_interest_recall_counts_the_codes_of_the_most_attended():
    """Two probes of one request, k = 2: events 2 and 0 are the first's, 3 and 1 the second's."""
    weight = torch.tensor([[0.3, 0.1, 0.5, 0.1], [0.1, 0.3, 0.2, 0.4]])
    code = torch.tensor([7, 9, 8, 9])
    assert interest_recall([weight], [code], [torch.tensor([7, 9])], 2).tolist() == [0.5, 1.0]
    assert interest_recall([weight], [code], [torch.tensor([7, 9])], 1).tolist() == [0.0, 1.0]
    assert interest_recall([weight], [code], [torch.tensor([7, 9])], 99).tolist() == [0.25, 0.5]


def test_interest_recall_of_ties_takes_the_most_recent():
    """The same on every machine."""
    weight, code = torch.full([1, 40], 1 / 40), torch.arange(40) // 10 + 1
    assert interest_recall([weight], [code], [torch.tensor([4])], 10).tolist() == [1.0]
    assert interest_recall([weight], [code], [torch.tensor([1])], 30).tolist() == [0.0]


def test_interest_recall_leaves_out_what_has_no_code_or_no_history():
    """Code 0 is no code: a probe of it has no share, an event of it is nobody's."""
    weights = [torch.tensor([[0.6, 0.4], [0.6, 0.4]]), torch.zeros(1, 0)]
    events = [torch.tensor([0, 5]), torch.zeros(0).long()]
    assert interest_recall(weights, events, [torch.tensor([0, 5]), torch.tensor([5])], 2).tolist() == [0.5]
    assert interest_recall([], [], [], 2).tolist() == []


@given(shapes(longest=12), st.integers(1, 15))
@few
def test_interest_recall_equals_the_loop(batch: Shape, k: int):
    """Sorting (weight, position) pairs, probe by probe, on weights with ties."""
    generator = batch.generator()
    lengths = [b - a for a, b in zip(batch.start, batch.end, strict=True)]
    weights = [torch.randint(0, 3, [2, n], generator=generator).double() for n in lengths]
    events = [torch.randint(0, 3, [n], generator=generator) for n in lengths]
    probes = [torch.randint(0, 3, [2], generator=generator) for _ in lengths]
    expected: list[float] = []
    for weight, event, probe in zip(weights, events, probes, strict=True):
        for w, code in zip(weight.tolist(), probe.tolist(), strict=True):
            if code and w:
                top = sorted(range(len(w)), key=lambda i: (w[i], i), reverse=True)[:k]
                expected.append(sum(int(event[i]) == code for i in top) / len(top))
    assert interest_recall(weights, events, probes, k).tolist() == expected
