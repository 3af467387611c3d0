"""The machine that figures were measured on, in one line: a figure without it says nothing."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def machine(*packages: str, threads: int | None = None) -> str:
    """Processor, cores this process may use, memory, load (others' work slows ours), threads if given, Python and the
    versions of `packages`."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [names[0] if names else platform.processor(), f"{cores} cores", f"{memory_gib:.0f} GiB"]
    parts.append(f"load {os.getloadavg()[0]:.1f}")
    if threads is not None:
        parts.append(f"{threads} thread{'s' if threads > 1 else ''}")
    parts.append(f"Python {platform.python_version()}")
    return ", ".join(parts + [f"{name} {version(name)}" for name in packages])
