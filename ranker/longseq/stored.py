"""What a store keeps of a memory: flat records, one for each request (a user, offline) or for each of its probes.

A block turns its memory into records by ``store`` and records into a memory by ``restore``. Between the two anything
may happen to a record: it is written, read elsewhere, held in less precision, put beside the records of other users,
or lost. A record of no numbers stands for a lost one, and restores to what an empty history encodes to.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ranker.ops.jagged import expand_windows, offsets_of
from ranker.ops.padded import exporting, with_spare


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


def store_rows(rows: Tensor, exact: Tensor | None = None, time: Tensor | None = None) -> Stored:
    """Records of one size: row u of `rows` `[U, ...]`, and of `exact` `[U, ...]` if there is one, is record u."""
    records, values = rows.size(0), rows.flatten(1)
    none = torch.zeros([records, 0], dtype=torch.float32, device=rows.device)
    kept = none if exact is None else exact.flatten(1).to(torch.float32)
    lengths = torch.tensor([values.size(1), kept.size(1)], device=rows.device).repeat(records, 1)
    if time is None:
        time = torch.zeros([records], dtype=torch.int64, device=rows.device)
    return Stored(values.flatten(), kept.flatten(), lengths, time)


def store_parts(parts: list[Tensor], counts: list[Tensor], exact: Tensor | None = None) -> Stored:
    """Records of any size, each of several parts: what `parts[0]` has of it, then what `parts[1]` has of it, …

    Args:
        parts: each `[n, ...]`, record after record; counts: for each part, how many of its rows a record has `[U]`.
        exact: `[E]`, one for each row of the first part.
    """
    sizes = [part.flatten(1).size(1) * count for part, count in zip(parts, counts)]  # noqa: B905  TorchScript
    whole = torch.stack(sizes).sum(0)
    start = offsets_of(whole)[:-1]
    total = 0
    for part in parts:
        total += part.numel()
    values = torch.zeros([total], dtype=parts[0].dtype, device=parts[0].device)
    for part, size in zip(parts, sizes):  # noqa: B905
        place, _ = expand_windows(start, start + size)
        values = values.index_copy(0, place, part.flatten())
        start = start + size
    none = torch.zeros([0], dtype=torch.float32, device=values.device)
    few = torch.zeros_like(whole) if exact is None else counts[0]
    kept = none if exact is None else exact.to(torch.float32)
    return Stored(values, kept, torch.stack([whole, few], 1), torch.zeros_like(whole))


def restore_rows(values: Tensor, lengths: Tensor, shape: list[int]) -> Tensor:
    """The rows of :func:`store_rows` again `[U, *shape]`, zero for a lost record.

    Args:
        values: `[V]`; lengths: `[U]`, each the product of `shape`, or 0.
    """
    records = lengths.numel()
    if not torch.jit.is_scripting() and exporting():
        return _padded_rows(values, lengths, shape)
    rows = torch.zeros([records] + shape, dtype=values.dtype, device=values.device)  # noqa: RUF005  TorchScript
    kept = (lengths > 0).nonzero().squeeze(1)
    return rows.index_copy(0, kept, values.view([kept.numel()] + shape))  # noqa: RUF005


@torch.jit.unused
def _padded_rows(values: Tensor, lengths: Tensor, shape: list[int]) -> Tensor:
    """The same without a look at how many records are lost: these read zeros behind the values."""
    width = math.prod(shape)
    place = offsets_of(lengths)[:-1].unsqueeze(1) + torch.arange(width, device=values.device)
    place = torch.where(lengths.unsqueeze(1) > 0, place, values.numel())
    return with_spare(values).index_select(0, place.flatten()).view([-1, *shape])


def restore_parts(values: Tensor, lengths: Tensor, counts: list[Tensor], shapes: list[list[int]]) -> list[Tensor]:
    """The parts of :func:`store_parts` again, each `[n, *shape]`.

    Args:
        values: `[V]`; lengths: `[U]` numbers of a record; counts, shapes: for each part, a record's rows `[U]`, and a
            row's shape.
    """
    if (torch.jit.is_scripting() or not exporting()) and lengths.numel() == 1:
        return _parts_of_one(values, counts, shapes)
    start = offsets_of(lengths)[:-1]
    parts: list[Tensor] = []
    for count, shape in zip(counts, shapes):  # noqa: B905
        width = _product(shape)
        row, record = expand_windows(torch.zeros_like(count), count)
        place = (start.index_select(0, record) + width * row).unsqueeze(1) + torch.arange(width, device=values.device)
        parts.append(values.index_select(0, place.flatten()).view([place.size(0)] + shape))  # noqa: RUF005
        start = start + width * count
    return parts


def _parts_of_one(values: Tensor, counts: list[Tensor], shapes: list[list[int]]) -> list[Tensor]:
    """The same of one record, as a server most often has: its parts lie in it one after another."""
    parts: list[Tensor] = []
    start = 0
    for count, shape in zip(counts, shapes):  # noqa: B905
        rows = int(count)
        end = start + rows * _product(shape)
        parts.append(values[start:end].view([rows] + shape))  # noqa: RUF005
        start = end
    return parts


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
