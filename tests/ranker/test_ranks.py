"""What a process sets up before it joins the others."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from ranker.ranks import join_ranks
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    for size in (9_000_000, 12_000_000, 10_000_000):
        torch.empty(size).fill_(1.0)
with join_ranks("cpu", 1):
    for _ in range(8):  # until the heap has found its shape
        step()
    before = faults()
    for _ in range(4):
        step()
    print(faults() - before)
"""


def faults(**environment: str) -> int:
    """New pages of four steps whose tensors, 124 MB each step, are of the sizes of the steps before."""
    unset = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env=unset | environment, capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_freed_memory_is_kept_for_the_next_step():
    """No page comes anew, where the environment does not ask malloc for something else."""
    pages = 4 * 4 * 31_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert faults() < pages / 50
    assert faults(MALLOC_TRIM_THRESHOLD_="131072") > pages / 2


LEFT = """
import hashlib, threading
from ranker.ranks import join_ranks
done = []
def work():
    hashlib.pbkdf2_hmac("sha256", b"key", b"salt", 300_000)
    done.append(True)
with join_ranks("cpu", 1):
    thread = threading.Thread(target=work)
    thread.start()
print(bool(done))
"""


def test_native_threads_are_waited_for_before_the_process_group_goes():
    """Leaving waits for a thread that works without Python's lock, as one of gloo's that still drops a tensor: that
    would abort a process that ends."""
    done = subprocess.run(
        [sys.executable, "-c", LEFT], capture_output=True, text=True, timeout=120, check=True, env=dict(os.environ)
    )
    assert done.stdout.split()[-1] == "True"
