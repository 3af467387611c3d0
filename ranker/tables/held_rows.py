"""Managed-collision tables once they are trained: which row an id has, as a table of plain tensors.

What TorchRec's modules hold (:mod:`ranker.tables.managed_collision`) can be neither scripted nor quantised, and is cut
by the ranks that trained it. Of it, evaluation and export need no more than the ids that have rows, sorted, and their
rows:

    row(i) = rows[k]             where ids[k] = i, found by bisection
             fallback[i // b]    where no k is: the last row of the rank whose ids i is among, b ids to a rank

Any number of ranks reads this, and a server without TorchRec too. The embeddings behind it are an ordinary table.
"""

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from ranker.tables.served import by_key

NOBODY = torch.iinfo(torch.int64).max
"""the id of a row that no id has"""


class HeldRows(nn.Module):
    """One table and its ids; nobody's until :meth:`hold`.

    Attributes:
        ids: `[n]` ascending, n >= 1; rows: `[n]`; fallback: `[ranks]` of training; of_rank: `[1]`, ids of each.
    """

    ids: Tensor
    rows: Tensor
    fallback: Tensor
    of_rank: Tensor

    def __init__(self, table: EmbeddingConfig, size: int, device: torch.device | None) -> None:
        super().__init__()
        self.name, self.size, self._keys = table.name, size, list(table.feature_names)
        # by the name that it has in training's checkpoints; ids come from elsewhere in them
        self.table = nn.ModuleDict({"_embedding_module": EmbeddingCollection(tables=[table], device=device)})
        for name, start in (("ids", NOBODY), ("rows", 0), ("fallback", table.num_embeddings - 1), ("of_rank", size)):
            self.register_buffer(name, torch.tensor([start]), persistent=False)

    def hold(self, ids: Tensor, rows: Tensor, fallback: Tensor) -> None:
        """Let these ids have these rows.

        Args:
            ids: `[n]` of any order, NOBODY's among them; rows: `[n]`; fallback: `[ranks]`, each rank's.
        """
        ids, rows = ids[ids != NOBODY], rows[ids != NOBODY]
        if ids.numel() == 0:  # there must be something to search
            ids, rows = torch.full_like(fallback[:1], NOBODY), fallback[:1]
        order, device = torch.argsort(ids), self.ids.device
        self.ids, self.rows, self.fallback = (x.to(device) for x in (ids[order], rows[order], fallback))
        self.of_rank = torch.full_like(self.of_rank, -(-self.size // fallback.numel()))

    def take(self, other: "HeldRows") -> None:
        """Hold what another holds."""
        self.hold(other.ids, other.rows, other.fallback)

    def row_of(self, ids: Tensor) -> Tensor:
        """Rows `[n]` of ids `[n]` in 0 … size − 1."""
        place = torch.searchsorted(self.ids, ids).clamp(max=self.ids.size(0) - 1)
        known = self.ids[place] == ids
        return torch.where(known, self.rows[place], self.fallback[torch.div(ids, self.of_rank, rounding_mode="floor")])

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """The rows of every id of the table's keys, by key."""
        ids, lengths = by_key(features)
        rows: list[Tensor] = []
        of: list[Tensor] = []
        for key in self._keys:
            rows.append(self.row_of(ids[key]))
            of.append(lengths[key])
        return self.table["_embedding_module"](KeyedJaggedTensor(self._keys, torch.cat(rows), lengths=torch.cat(of)))
