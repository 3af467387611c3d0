"""What a store keeps of a memory: flat records, one for each request (a user, offline) or for each of its probes.

A block turns its memory into records by ``store`` and records into a memory by ``restore``. Between the two anything
may happen to a record: it is written, read elsewhere, held in less precision, put beside the records of other users,
or lost. A record of no numbers stands for a lost one, and restores to what an empty history encodes to.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Stored(NamedTuple):
    """U records one after another: U = R, or Q for blocks with probes.

    values: `[V]`, which a store may keep in half precision or in bytes.
    exact: `[E]` float32, few numbers that are kept as they are: logarithms of weights, −∞ among them.
    lengths: `[U, 2]` int64, how many of `values` and of `exact` a record has; 0 and 0 for a lost one.
    time: `[U]` int64, milliseconds: of the history's last event for blocks that read it, else 0.
    """

    values: Tensor
    exact: Tensor
    lengths: Tensor
    time: Tensor


def store_rows(rows: Tensor) -> Stored:
    """Records of one size, all of it values: row u of `[U, ...]` is record u."""
    records, width = rows.size(0), rows[0].numel() if rows.size(0) > 0 else 0
    lengths = torch.tensor([width, 0], device=rows.device).repeat(records, 1)
    none = torch.zeros([0], dtype=torch.float32, device=rows.device)
    return Stored(rows.flatten(), none, lengths, torch.zeros([records], dtype=torch.int64, device=rows.device))


def restore_rows(values: Tensor, lengths: Tensor, shape: list[int]) -> Tensor:
    """The same rows `[U, *shape]`, zero for a lost record.

    Args:
        values: `[V]`; lengths: `[U]`, each the product of `shape`, or 0.
    """
    records = lengths.numel()
    rows = torch.zeros([records] + shape, dtype=values.dtype, device=values.device)  # noqa: RUF005  TorchScript
    kept = (lengths > 0).nonzero().squeeze(1)
    return rows.index_copy(0, kept, values.view([kept.numel()] + shape))  # noqa: RUF005
