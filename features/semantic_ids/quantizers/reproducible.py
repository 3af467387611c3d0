"""Training that gives the same numbers again."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def reproducibly(seed: int) -> Generator[None]:
    """Within: own random numbers and one thread, as sums in another order would make other codes. After: torch's random
    numbers and threads as before."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
