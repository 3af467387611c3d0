"""Unsharded tables as a server has them, of float32 numbers or of bytes, in the place of TorchRec's collections.

Same inputs as those, and outputs that are read by key in the same way. They script; they are traced by ``torch.export``
without a size held fixed; and what they script to loads where only torch and fbgemm_gpu are.

Rows of bytes are FBGEMM's fused ones: every row by itself, between its least and its greatest number,

    code = round((x − min) / s),   s = (max − min) / 255,   so that |x − x'| <= s / 2

and takes d + 8 bytes instead of 4 d. Its scale and its minimum stay float32: of half precision, those of rare ids,
whose rows are nearly as small as they were drawn, would lose digits that count. What is looked up is float32 again.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from ranker.ops.padded import exporting, promise


class FloatRows(nn.Module):
    """One table `[rows, d]`."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        """`[n, d]` of `[n]` int64."""
        return torch.nn.functional.embedding(ids, self.weight)


class ByteRows(nn.Module):
    """One table `[rows, d]`, in bytes."""

    rows: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.dim = weight.size(1)
        self.register_buffer("rows", torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(weight.detach().float()))

    def forward(self, ids: Tensor) -> Tensor:
        """`[n, d]` of `[n]` int64."""
        if ids.numel() == 0:  # FBGEMM's operator takes at least one row
            return torch.zeros([0, self.dim], device=ids.device)
        return torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(self.rows.index_select(0, ids))


class ServedEmbeddings(nn.Module):
    """In the place of an EmbeddingCollection.

    Args:
        in_bytes: whether rows are bytes.
    """

    _keys: list[list[str]]

    def __init__(self, collection: EmbeddingCollection, in_bytes: bool) -> None:
        super().__init__()
        configs = collection.embedding_configs()
        self._keys = [config.feature_names for config in configs]
        self.tables = nn.ModuleDict(
            {config.name: _rows(collection.embeddings[config.name].weight, in_bytes) for config in configs}
        )

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """The rows of every id, by key."""
        ids, lengths = by_key(features)
        found: dict[str, JaggedTensor] = {}
        for i, table in enumerate(self.tables.values()):
            for key in self._keys[i]:
                found[key] = JaggedTensor(table(ids[key]), lengths=lengths[key])
        return found


class ServedBags(nn.Module):
    """In the place of an EmbeddingBagCollection each of whose tables has one key.

    Args:
        in_bytes: whether rows are bytes.
    """

    _keys: list[str]
    _modes: list[str]

    def __init__(self, collection: EmbeddingBagCollection, in_bytes: bool) -> None:
        super().__init__()
        configs = collection.embedding_bag_configs()
        assert all(len(config.feature_names) == 1 for config in configs)
        self._keys = [config.feature_names[0] for config in configs]
        self._modes = ["mean" if config.pooling == PoolingType.MEAN else "sum" for config in configs]
        self.tables = nn.ModuleDict(
            {config.name: _rows(collection.embedding_bags[config.name].weight, in_bytes) for config in configs}
        )

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Every key's pooled rows `[stride, d]`, zero for an empty bag."""
        ids, lengths = by_key(features)
        found: dict[str, Tensor] = {}
        for i, table in enumerate(self.tables.values()):
            rows, bags = table(ids[self._keys[i]]), lengths[self._keys[i]]
            place = torch.arange(rows.size(0), device=rows.device)
            found[self._keys[i]] = torch.nn.functional.embedding_bag(
                place, rows, torch.cumsum(bags, 0) - bags, mode=self._modes[i]
            )
        return found


def by_key(features: KeyedJaggedTensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Ids `[n]` and lengths `[stride]` of every key. TorchRec's own division cannot be traced without any ids."""
    keys = features.keys()
    lengths = features.lengths().view(len(keys), -1)
    sizes: list[int] = lengths.sum(1).tolist()
    if not torch.jit.is_scripting() and exporting():
        for size in sizes:
            promise(size >= 0)
    parts = features.values().split(sizes)
    ids: dict[str, Tensor] = {}
    of: dict[str, Tensor] = {}
    for i, key in enumerate(keys):
        ids[key], of[key] = parts[i], lengths[i]
    return ids, of


def with_served_tables(module: nn.Module, in_bytes: bool) -> nn.Module:
    """The same module on served tables. Everything else is shared with it, and stays as it is."""
    if isinstance(module, EmbeddingBagCollection):
        return ServedBags(module, in_bytes)
    if isinstance(module, EmbeddingCollection):
        return ServedEmbeddings(module, in_bytes)
    replaced = copy.copy(module)
    vars(replaced)["_modules"] = {  # a shallow copy would share them
        name: None if child is None else with_served_tables(child, in_bytes)
        for name, child in vars(module)["_modules"].items()
    }
    return replaced


def _rows(weight: Any, in_bytes: bool) -> nn.Module:
    """weight: a parameter `[rows, d]`."""
    return ByteRows(weight) if in_bytes else FloatRows(weight)
