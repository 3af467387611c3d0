"""Time of full-length target attention against Σ L, beside padded attention, whose time follows R × max L.

    python -m tests.benchmarks.target_attention [--threads 1] [--repeats 9]

Forward and backward of TargetAttention (width 32, 2 heads of 16) for 32 requests × 16 candidates with 32,000 events in
all, their lengths equal, log-normal, or one of them 16 times the others. The named alternative is PyTorch's
scaled_dot_product_attention on the same projections, padded to the longest history with a mask. It has no age bias, so
ours is timed without one too; both give the same output. Then equal lengths from 250 to 4,000: time per event. The ways
alternate and medians are reported; peak memory is what a process of its own needed beyond its inputs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ranker.freed_memory import keep_freed_memory
from ranker.longseq import History, Probes, Target, TargetAttention
from ranker.ops.jagged import offsets_of
from tests.benchmarks.machine import machine

REQUESTS, CANDIDATES, DIM = 32, 16, 32
NONE = torch.zeros(0, dtype=torch.int64)
NO_PROBES = Probes(torch.zeros(0, 0), NONE, NONE)
Way = Callable[[TargetAttention, History, Target], Tensor]


def lengths_of(case: str, events: int) -> Tensor:
    """Lengths of 32 histories that sum to about `events`."""
    if case == "equal":
        weights = torch.ones(REQUESTS)
    elif case == "log-normal":
        weights = torch.randn(REQUESTS, generator=torch.Generator().manual_seed(0)).exp()
    else:
        weights = torch.ones(REQUESTS)
        weights[0] = 16.0
    return (weights / weights.sum() * events).round().long().clamp(min=1)


def batch_of(lengths: Tensor) -> tuple[History, Target]:
    """Random events and candidates that ask for gradients."""
    generator = torch.Generator().manual_seed(1)
    offsets = offsets_of(lengths)
    events = int(offsets[-1])
    x = torch.randn(events, DIM, generator=generator).requires_grad_()
    candidates = torch.randn(REQUESTS * CANDIDATES, DIM, generator=generator).requires_grad_()
    event_time = torch.randint(0, 10**9, [events], generator=generator)
    now = torch.full([REQUESTS], 10**9)
    no_code = torch.zeros(x.size(0), 0, dtype=torch.int64)
    history = History(x, event_time, offsets[:-1], offsets[1:], now, no_code, x[:, :0])
    return history, Target(candidates, torch.arange(REQUESTS + 1) * CANDIDATES, NONE, candidates.long()[:, :0])


def jagged(block: TargetAttention, history: History, target: Target) -> Tensor:
    """Ours."""
    return block(history, NO_PROBES, target)


def padded(block: TargetAttention, history: History, target: Target) -> Tensor:
    """The alternative: padded to the longest history, with a mask; after the projections, which favours it."""
    lengths = history.end - history.start
    real = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)  # [R, longest]

    def heads_first(x: Tensor) -> Tensor:
        return x.view(REQUESTS, -1, block.heads, DIM // block.heads).transpose(1, 2)

    def pad(x: Tensor) -> Tensor:
        return heads_first(x.new_zeros(*real.shape, DIM).masked_scatter(real.unsqueeze(2), x))

    q = heads_first(block.project.queries(target.x))
    k, v = (pad(x.flatten(1)) for x in block.project.keys_values(history.x))
    return scaled_dot_product_attention(q, k, v, real[:, None, None, :]).transpose(1, 2).reshape(-1, DIM)


WAYS: dict[str, tuple[Way, int]] = {"jagged": (jagged, 0), "padded": (padded, 0), "jagged, age bias": (jagged, 32)}


def block_of(age_buckets: int) -> TargetAttention:
    """The same weights every time."""
    torch.manual_seed(0)
    return TargetAttention(DIM, heads=2, head_dim=16, age_buckets=age_buckets)


def step(way: str, history: History, target: Target) -> float:
    """Seconds of one forward and backward pass."""
    run, age_buckets = WAYS[way]
    block = block_of(age_buckets)
    history.x.grad = target.x.grad = None
    begin = time.perf_counter()
    run(block, history, target).sum().backward()
    return time.perf_counter() - begin


def medians(history: History, target: Target, ways: list[str], repeats: int) -> dict[str, float]:
    """Median milliseconds of each way; the first, untimed, round warms up."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way in ways:
            took = step(way, history, target)
            if repeat:
                times[way].append(took)
    return {way: 1e3 * statistics.median(found) for way, found in times.items()}


def peak_mib(way: str, case: str, events: int) -> float:
    """Peak memory of one pass beyond the inputs, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.target_attention", "--events", str(events)]
    command += ["--only", way, "--case", case]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def resident_mib(field: str) -> float:
    """A line of this process's status: VmRSS, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def print_peak(way: str, case: str, events: int) -> None:
    """What the process started by `peak_mib` does."""
    history, target = batch_of(lengths_of(case, events))
    step(way, *batch_of(lengths_of("equal", REQUESTS * 4)))  # libraries and thread pools
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident_mib("VmRSS")
    step(way, history, target)
    print(resident_mib("VmHWM") - before)


def main() -> None:
    """Print machine, sizes, medians, peaks and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--case", default="equal", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only:
        print_peak(options.only, options.case, options.events)
        return
    keep_freed_memory()  # as the trainer does: else pages that come anew are timed too
    print(f"machine   {machine('torch', threads=options.threads)}")
    print(f"sizes     {REQUESTS} requests × {CANDIDATES} candidates, {options.events:,} events, 2 heads of 16, float32")
    print(
        f"{'lengths':<14}{'Σ L':>8}{'R × max L':>11}"
        + "".join(f"{way + ', ms':>21}{'MiB':>6}" for way in WAYS)
        + "   padded / jagged"
    )
    first: dict[str, float] = {}
    for case in ("equal", "log-normal", "one × 16"):
        lengths = lengths_of(case, options.events)
        history, target = batch_of(lengths)
        plain = block_of(0)
        torch.testing.assert_close(jagged(plain, history, target), padded(plain, history, target), rtol=1e-4, atol=1e-5)
        median = medians(history, target, list(WAYS), options.repeats)
        peak = {way: peak_mib(way, case, options.events) for way in WAYS}
        first = first or median
        print(
            f"{case:<14}{int(lengths.sum()):>8,}{REQUESTS * int(lengths.max()):>11,}"
            + "".join(f"{median[way]:>21.1f}{peak[way]:>6.0f}" for way in WAYS)
            + f"   time {median['padded'] / median['jagged']:.2f}, memory {peak['padded'] / peak['jagged']:.2f}",
            flush=True,
        )
    print(
        "time against equal lengths, last case: " + ", ".join(f"{way} × {median[way] / first[way]:.2f}" for way in WAYS)
    )
    for length in (250, 500, 1000, 2000, 4000):
        history, target = batch_of(torch.full([REQUESTS], length))
        took_ms = medians(history, target, ["jagged"], options.repeats)["jagged"]
        print(f"Σ L {REQUESTS * length:>8,}: {took_ms:7.1f} ms, {took_ms / (REQUESTS * length) * 1e6:.0f} ns per event")


if __name__ == "__main__":
    main()
