"""The batch's keyed tensors: keys, strides, devices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.batch import RequestBatch, from_tensors, names, sequence_keys
from features.collate import pack, unpack
from features.loader import Loader, LoaderConfig, Selection
from tests.features.datasets import everything, write_dataset


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> tuple[Selection, dict[str, Tensor]]:
    """What is read, and one batch of it as plain tensors."""
    dataset = write_dataset(tmp_path_factory.mktemp("dataset"), seed=5, partitions=2, users=20)
    selection = everything(dataset, 5)
    return selection, Loader(dataset, ("train",), selection, LoaderConfig(workers=0)).epoch(0)[0]


def test_keys_and_strides(read: tuple[Selection, dict[str, Tensor]]) -> None:
    selection, tensors = read
    batch = from_tensors(selection.spec, tensors)
    requests, candidates, events = batch.requests, batch.candidates, batch.event_time.numel()
    assert batch.request.keys() == names(selection.spec.request)
    assert batch.candidate.keys() == names(selection.spec.candidate)
    assert batch.sequence.keys() == sequence_keys(selection.spec)
    assert batch.sequence.keys() == [
        "history:item.category",
        "history:item",
        "history:event.action",
        "candidate:item.category",
        "candidate:item",
    ]
    assert batch.request.stride() == batch.sequence.stride() == requests
    assert batch.candidate.stride() == candidates == int(batch.offsets[-1])
    for key in sequence_keys(selection.spec):
        size = events if key.startswith("history:") else candidates
        assert batch.sequence[key].values().numel() == size
    assert batch.sequence["candidate:item"].lengths().tolist() == batch.offsets.diff().tolist()
    assert batch.request_dense.shape == (requests, 2)
    assert batch.candidate_dense.shape == (candidates, 2)
    assert batch.event_dense.shape == (events, 1)
    assert batch.labels.shape == (candidates, 2)
    assert batch.oracles.shape == (candidates, 1)
    for x in (batch.now, batch.start, batch.end, batch.user, batch.history_length):
        assert x.shape == (requests,)


def test_types(read: tuple[Selection, dict[str, Tensor]]) -> None:
    selection, tensors = read
    floats = {"request_dense", "candidate_dense", "event_dense", "labels", "oracles"}
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if name in floats else torch.int64), name
        assert tensor.is_contiguous()
    assert set(from_tensors(selection.spec, tensors)._fields) - {"request", "candidate", "sequence"} <= set(tensors)


def test_packed_and_unpacked_it_is_the_same(read: tuple[Selection, dict[str, Tensor]]) -> None:
    _, tensors = read
    tensors = tensors | {"odd": torch.rand(3), "none": torch.empty(0, 2), "last": torch.arange(6).view(3, 2)}
    packed = pack(tensors)
    assert packed.memory.numel() == sum(x.numel() * x.element_size() for x in tensors.values())
    again = unpack(packed)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert again[name].shape == tensor.shape
        assert torch.equal(again[name], tensor)


def test_what_numpy_made_without_elements_is_packed_too() -> None:
    """As in a batch without candidates, which a rank without requests left has."""
    tensors = {"none": torch.from_numpy(np.zeros(0, np.int64)), "some": torch.arange(3)}
    again = unpack(pack(tensors))
    assert {name: tensor.tolist() for name, tensor in again.items()} == {"none": [], "some": [0, 1, 2]}


def test_to_another_device_moves_every_tensor(read: tuple[Selection, dict[str, Tensor]]) -> None:
    selection, tensors = read
    moved = from_tensors(selection.spec, tensors).to(torch.device("meta"))
    assert isinstance(moved, RequestBatch)
    for x in moved:
        assert (x.values() if isinstance(x, KeyedJaggedTensor) else x).device.type == "meta"


def test_a_batch_without_bags_and_dense_features(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, seed=5, partitions=2, users=20)
    spec = everything(dataset).spec
    bare = type(spec)((), spec.candidate[:1], (), (), spec.sequence[:1], (), ())
    selection = Selection(bare, ("click",), 0)
    batch = next(iter(Loader(dataset, ("train",), selection, LoaderConfig(workers=0)).batches()))
    assert batch.request.keys() == []
    assert batch.request_dense.shape == (batch.requests, 0)
    assert batch.event_dense.shape == (batch.event_time.numel(), 0)
    assert batch.oracles.shape == (batch.candidates, 0)
