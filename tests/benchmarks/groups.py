"""The methods that keep a constant number of vectors: what grows with a history, and what must not.

    python -m tests.benchmarks.groups [--threads 1] [--repeats 5] [--methods SDIM VQL]

With their defaults, on events of width 32: 32 groups, codes or queries, an attention of two heads of 16 (SDIM: 16 × 8
buckets). Growth: one training `encode` (with the block's own loss) of 100,000 events over 10,000, forward, backward and
peak memory in a process of its own. Read, without gradients: 500 candidates of one request read a memory made of 10,000
events, against one made of 100, and against exact target attention to the 10,000 events with its keys and values at
hand. The ways alternate and medians are reported, of this process's processor time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ranker.freed_memory import keep_freed_memory
from ranker.longseq import History, Probes, Target, TargetAttention
from ranker.longseq.groups import LSH, SDIM, VQL, Aggregator, CFormer, KMeans, Patching, PolyEncoder
from tests.benchmarks.machine import machine
from tests.benchmarks.target_attention import resident_mib
from tests.benchmarks.uxsid import medians_ms, seconds

DIM, CANDIDATES, SHORT, LONG = 32, 500, 10_000, 100_000
METHODS: dict[str, Callable[..., Any]] = {
    method.__name__: method for method in (SDIM, VQL, CFormer, KMeans, LSH, Patching, Aggregator, PolyEncoder)
}


def block_of(name: str) -> Any:
    """The same weights every time."""
    torch.manual_seed(0)
    return METHODS[name](DIM)


def batch_of(length: int) -> tuple[History, Probes, Target]:
    """One request with a history of `length` events over a year, and 500 candidates."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(length, DIM, generator=generator).requires_grad_()
    year_ms = 365 * 86_400_000
    event_time = torch.randint(0, year_ms, [length], generator=generator).sort()[0]
    start, none = torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    history = History(x, event_time, start, start + length, start + year_ms, none.expand(length, 0), x.detach()[:, :0])
    candidates = torch.randn(CANDIDATES, DIM, generator=generator)
    target = Target(candidates, torch.tensor([0, CANDIDATES]), none, candidates.long()[:, :0])
    return history, Probes(x.detach()[:0], none, none), target


def floats_of(memory: Any) -> list[Tensor]:
    """The tensors of a memory that take a gradient."""
    if isinstance(memory, Tensor):
        return [memory] if memory.requires_grad else []
    return [tensor for part in memory for tensor in floats_of(part)]


def encode_step(block: Any, history: History, probes: Probes) -> list[float]:
    """Seconds of `encode` with the block's own loss, forward and backward."""
    history.x.grad = None
    begin = time.process_time()
    memory = block.encode(history, probes)
    # −∞ marks what has no events
    loss = torch.stack([t.clamp(min=-1e3).sum() for t in floats_of(memory)]).sum() + block.auxiliary(history, memory)
    forward = time.process_time()
    loss.backward()
    return [forward - begin, time.process_time() - forward]


def peak_mib(name: str, length: int) -> float:
    """Peak memory of one `encode` and its backward beyond the inputs, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.groups", "--only-peak", str(length), "--methods", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(name: str, length: int) -> None:
    """What the process started by `peak_mib` does."""
    history, probes, _ = batch_of(length)
    encode_step(block_of(name), *batch_of(100)[:2])  # libraries and thread pools
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident_mib("VmRSS")
    encode_step(block_of(name), history, probes)
    print(resident_mib("VmHWM") - before)


def growth(names: list[str], repeats: int) -> None:
    """`encode` of ten times as many events."""
    print(f"{'encode, L 10,000':<14}{'fwd ms':>9}{'bwd ms':>9}{'MiB':>7}{'ns/event':>10}   L 100,000 over 10,000")
    for name in names:
        parts: list[list[float]] = []
        for length in (SHORT, LONG):
            history, probes, _ = batch_of(length)
            step = partial(encode_step, block_of(name), history, probes)
            (took,) = medians_ms({"": step}, repeats).values()
            parts.append([*took, peak_mib(name, length)])
        forward, backward, peak = parts[0]
        ratios = [long / max(short, 1e-9) for short, long in zip(*parts, strict=True)]
        print(
            f"{name:<16}{forward:>9.1f}{backward:>9.1f}{peak:>7.0f}{1e6 * (forward + backward) / SHORT:>10.0f}"
            "   forward × {:.1f}, backward × {:.1f}, peak × {:.1f}".format(*ratios),
            flush=True,
        )


def reads(names: list[str], repeats: int) -> None:
    """500 candidates of one request."""
    exact = TargetAttention(DIM).eval()
    history, probes, target = batch_of(SHORT)
    with torch.no_grad():
        known = exact.encode(history, probes)
    exactly = medians_ms({"": lambda: seconds(lambda: exact.read(known, target), 2)}, repeats)[""][0]
    print(f"target attention, 500 candidates, L 10,000, keys and values at hand: {exactly:.2f} ms")
    print(f"{'read, 500':<16}{'bytes':>9}{'L 10,000':>10}{'L 100':>8}{'ratio':>7}   attention / read")
    for name in names:
        block = block_of(name).eval()
        with torch.no_grad():
            long, short = (block.encode(*batch_of(length)[:2]) for length in (SHORT, 100))
        ways = {
            "long": lambda block=block, memory=long: seconds(lambda: block.read(memory, target), 20),
            "short": lambda block=block, memory=short: seconds(lambda: block.read(memory, target), 20),
        }
        of_long, of_short = (parts[0] for parts in medians_ms(ways, 4 * repeats).values())
        print(
            f"{name:<16}{block.memory_bytes():>9,}{of_long:>10.2f}{of_short:>8.2f}{of_long / of_short:>7.2f}"
            f"   {exactly / of_long:.0f}",
            flush=True,
        )


def main() -> None:
    """Print machine, medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--only-peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only_peak:
        print_peak(options.methods[0], options.only_peak)
        return
    keep_freed_memory()  # as the trainer does: else pages that come anew are timed too
    print(f"machine   {machine('torch', threads=options.threads)}")
    print(f"sizes     events {DIM} wide, float32; times in milliseconds of processor time")
    growth(options.methods, options.repeats)
    reads(options.methods, options.repeats)


if __name__ == "__main__":
    main()
