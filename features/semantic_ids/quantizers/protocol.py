"""What every quantiser offers: from content vectors to M codes each, and the codewords they stand for.

Symbols: n items, d width of content vectors, dz width of codewords, M levels, K_l codes of level l.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int32]
State = dict[str, npt.NDArray[Any]]
Log = Callable[[str], None]


class Quantizer(Protocol):
    """A fitted quantiser. The module of each also has ``fit(config, levels, vectors, seed, …)`` that makes one."""

    def encode(self, vectors: Floats) -> tuple[Codes, Floats]:
        """Codes `[n, M]`, counted from 0, of `[n, d]` vectors, and the vectors in the codewords' space `[n, dz]`."""
        ...

    def codewords(self) -> list[Floats]:
        """`[K_l, dz]` of each level: the sum of an item's codewords approximates its vector in their space."""
        ...

    def decode(self, summed: Floats) -> Floats:
        """Content vectors `[n, d]` of sums of codewords `[n, dz]`, of all levels or of the first few."""
        ...

    def state(self) -> State:
        """What :func:`features.semantic_ids.quantizers.load` needs to make the same quantiser again."""
        ...
