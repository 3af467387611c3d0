"""Tables with fewer rows than ids: which rows an id reads.

Dense indices of a vocabulary ascend as frequency falls, so with 1 + (i − 1) mod B as the first row the most frequent B
ids do not meet one another, and all rows have as many ids. A second row by a hash that mixes bits tells apart most ids
that share the first: two partitions of the ids, composed by a sum, as in Shi et al. 2020, Compositional Embeddings
Using Complementary Partitions; here both rows are of one table, and the second partition is a hash, as in Svenstrup et
al. 2017, Hash Embeddings, without the weights of those.
"""

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


def mixed(i: Tensor) -> Tensor:
    """A hash below 2³² of numbers below 2³¹: multiply and shift twice. No product passes 2⁶³."""
    h = (i * 0x9E3779B1) & 0xFFFFFFFF
    h = (((h ^ (h >> 15)) & 0x7FFFFFFF) * 0x85EBCA6B) & 0xFFFFFFFF
    return h ^ (h >> 13)


@torch.fx.wrap
def bucketed(ids: KeyedJaggedTensor, rows: list[int], hashes: list[int]) -> KeyedJaggedTensor:
    """Ids as rows of smaller tables: with B = rows − 1, id i > 0 reads row 1 + (i − 1) mod B, and with two hashes
    1 + mixed(i − 1) mod B after it; id 0 reads row 0, once or twice.

    Args:
        rows: of each key's table, row 0 included; empty where no table is smaller than its ids are many.
        hashes: rows that an id of each key reads, 1 or 2.
    """
    if len(rows) == 0:
        return ids
    values, lengths = ids.values(), ids.lengths().view(len(rows), -1)
    of_key = (torch.tensor(rows, device=values.device) - 1).clamp(min=1)
    times_of_key = torch.tensor(hashes, device=values.device)
    keys = torch.arange(len(rows), device=values.device)
    key = torch.repeat_interleave(keys, lengths.sum(1), output_size=values.numel())
    times = times_of_key[key]
    buckets, i = torch.repeat_interleave(of_key[key], times), torch.repeat_interleave(values, times)
    first = torch.repeat_interleave(times.cumsum(0) - times, times)
    is_second = torch.arange(i.numel(), device=values.device) > first
    hashed = torch.where(is_second, mixed(i - 1), i - 1)
    row = torch.where(i > 0, 1 + hashed % buckets, torch.zeros_like(i))
    return KeyedJaggedTensor(ids.keys(), row, lengths=(lengths * times_of_key.unsqueeze(1)).view(-1))


@torch.fx.wrap
def summed(embedded: Tensor, hashes: int) -> Tensor:
    """The embeddings `[n · hashes, d]` of each id's rows, added: `[n, d]`."""
    return embedded if hashes == 1 else embedded.view(-1, hashes, embedded.size(1)).sum(1)
