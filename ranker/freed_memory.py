"""Memory of one step, or request, for the next: its tensors are of like sizes, and pages that come anew from the system
cost more than what is written to them."""

from __future__ import annotations

import ctypes
import os
import sys


def keep_freed_memory() -> None:
    """Let glibc hand freed memory out again, in all of this process, instead of returning it to the system. Not where
    the environment sets malloc's own variables, and without effect under other allocators."""
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        top_pad, trim_threshold, mmap_max = -2, -1, -4  # malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
        mallopt(top_pad, 64 << 20)
