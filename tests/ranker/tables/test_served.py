"""Tables as servers have them: TorchRec's numbers in float32, and within half a step of them in bytes."""

from __future__ import annotations

from io import BytesIO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ranker.tables.served import ByteRows, with_served_tables

LENGTHS = st.lists(st.integers(0, 4), min_size=4, max_size=4).filter(any)  # TorchRec's own cannot look up nothing


class Both(nn.Module):
    """Bags and single ids, as a ranker has them."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name="a", embedding_dim=4, num_embeddings=9, feature_names=["a"]),
                EmbeddingBagConfig(
                    name="b", embedding_dim=8, num_embeddings=9, feature_names=["b"], pooling=PoolingType.MEAN
                ),
            ]
        )
        self.rows = EmbeddingCollection(
            tables=[EmbeddingConfig(name="c", embedding_dim=4, num_embeddings=9, feature_names=["a", "b"])]
        )
        self.none: nn.Module | None = None

    def forward(self, ids: KeyedJaggedTensor) -> list[Tensor]:
        bags, rows = self.bags(ids), self.rows(ids)
        return [bags["a"], bags["b"], rows["a"].values(), rows["b"].values(), rows["b"].lengths()]


def ids_of(lengths: list[int]) -> KeyedJaggedTensor:
    """Two keys at a stride of two."""
    values = torch.arange(sum(lengths)) * 5 % 9
    return KeyedJaggedTensor(["a", "b"], values, lengths=torch.tensor(lengths))


@given(LENGTHS)
@settings(deadline=None, max_examples=30)
def test_float_tables_are_torchrecs(lengths: list[int]):
    both = Both()
    for found, expected in zip(with_served_tables(both, False)(ids_of(lengths)), both(ids_of(lengths)), strict=True):
        torch.testing.assert_close(found, expected)


@given(LENGTHS)
@settings(deadline=None, max_examples=30)
def test_tables_of_bytes_are_within_half_a_step(lengths: list[int]):
    both = Both()
    step = max(float((p.amax(1) - p.amin(1)).max()) for p in both.state_dict().values()) / 255
    longest = max(1, *lengths)
    for found, expected in zip(with_served_tables(both, True)(ids_of(lengths)), both(ids_of(lengths)), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=longest * (step / 2 + 1e-6))


@given(st.integers(0, 2**31), st.floats(-6, 6))
@settings(deadline=None, max_examples=30)
def test_a_row_keeps_its_own_scale(seed: int, magnitude: float):
    """Beside rows of any other size, however small its numbers are."""
    weight = torch.randn([5, 12], generator=torch.Generator().manual_seed(seed))
    weight[2] *= 10**magnitude
    found = ByteRows(weight)(torch.tensor([2]))[0]
    step = (weight[2].amax() - weight[2].amin()) / 255
    rounding = 1e-6 * weight[2].abs().max() + 2e-8  # FBGEMM adds 1e-8 to a row's range
    assert (found - weight[2]).abs().max() <= 0.5001 * step + rounding


@pytest.mark.parametrize(("rows", "dim"), [(1000, 64), (300, 8)])
def test_a_row_takes_a_byte_a_number_and_eight(rows: int, dim: int):
    table = ByteRows(torch.randn(rows, dim))
    assert sum(x.numel() * x.element_size() for x in table.state_dict().values()) == rows * (dim + 8)


def test_the_module_itself_stays_as_it_is():
    both = Both()
    before = {name: x.clone() for name, x in both.state_dict().items()}
    served = with_served_tables(both, True)
    assert type(served) is Both
    assert served.none is None
    assert isinstance(both.bags, EmbeddingBagCollection)
    assert all(torch.equal(x, before[name]) for name, x in both.state_dict().items())
    assert before.keys() == both.state_dict().keys()


@pytest.mark.parametrize("in_bytes", [False, True])
def test_nothing_is_looked_up_without_ids(in_bytes: bool):
    """Which TorchRec's collections cannot do."""
    found = with_served_tables(Both(), in_bytes)(ids_of([0, 0, 0, 0]))
    assert [list(x.shape) for x in found] == [[2, 4], [2, 8], [0, 4], [0, 4], [2]]
    assert not any(x.any() for x in found)


@pytest.mark.parametrize("in_bytes", [False, True])
def test_they_script(in_bytes: bool):
    module, file = with_served_tables(Both(), in_bytes), BytesIO()

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = module

        def forward(self, values: Tensor, lengths: Tensor) -> list[Tensor]:
            return self.both(KeyedJaggedTensor(["a", "b"], values, lengths=lengths))

    torch.jit.save(torch.jit.script(Plain()), file)
    file.seek(0)
    ids = ids_of([1, 2, 0, 3])
    for found, expected in zip(torch.jit.load(file)(ids.values(), ids.lengths()), module(ids), strict=True):
        assert torch.equal(found, expected)
