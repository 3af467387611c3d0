"""Jagged data padded to the greatest length: what operators do while ``torch.export`` traces them.

A traced graph keeps no decision that depends on data, and no loop over it; the sizes that it holds open are those of
its inputs, and few numbers read from them. Here that is one number for all lengths, their greatest. So each operator
has, beside the form whose work follows Σ L, a padded one, whose work follows R × max L: for one request, as a server
scores them, it is the same. Padding reads a spare row of zeros behind the tokens: there need be no token at all.
"""

import torch
from torch import Tensor

from ranker.ops.jagged import segments_of


@torch.jit.unused
def exporting() -> bool:
    """Whether ``torch.export`` is tracing. TorchScript must not come to ask: ``if not torch.jit.is_scripting():``."""
    return torch.compiler.is_exporting()


@torch.jit.unused
def promise(condition: bool) -> None:
    """Let the traced graph rely on what is so of its open sizes, and check it when it runs."""
    torch._check(condition)  # pyright: ignore[reportPrivateUsage]


@torch.jit.unused
def held_open(size: Tensor) -> int:
    """A number of the data, as a size that the graph holds open; int() would hold it fixed."""
    number = size.item()
    promise(number >= 0)
    promise(number < 1 << 40)  # times a number's bytes, compilers hold bounds in 64 bits
    return number  # type: ignore[return-value]


@torch.jit.unused
def widest(lengths: Tensor) -> int:
    """The greatest length, at least 2, as a number that the graph holds open: of 0 and 1 a compiler would ask."""
    size = held_open(lengths.max().clamp(min=2))
    promise(size >= 2)
    return size


def with_spare(x: Tensor) -> Tensor:
    """Rows `[T, ...]` and one of zeros behind them."""
    spare = torch.zeros([1] + list(x.shape[1:]), dtype=x.dtype, device=x.device)  # noqa: RUF005  TorchScript
    return torch.cat([x, spare])


def padded_rows(start: Tensor, end: Tensor, width: int, spare: int) -> Tensor:
    """The token at each place of every window ``[start, end)``: `[R, width]`, `spare` for padding at the end."""
    token = start.unsqueeze(1) + torch.arange(width, device=start.device)
    return torch.where(token < end.unsqueeze(1), token, spare)


def in_places(x: Tensor, row: Tensor) -> Tensor:
    """Tokens `[T, ...]` at the places `[R, width]` of :func:`padded_rows`, zero for padding: `[R, width, ...]`."""
    return with_spare(x).index_select(0, row.flatten()).unflatten(0, row.shape)


def out_of_places(x: Tensor, offsets: Tensor, tokens: int) -> Tensor:
    """`[R, width, ...]` of the sequences ``offsets[r] : offsets[r + 1]`` to their T = `tokens` tokens `[T, ...]`."""
    owner = segments_of(offsets, tokens)
    within = torch.arange(tokens, device=x.device) - offsets.index_select(0, owner)
    return x.flatten(0, 1).index_select(0, owner * x.size(1) + within)
