"""Time and memory of HiSAC beside full-length target attention of the same width.

    python -m tests.benchmarks.hisac [--threads 1] [--repeats 5] [--codes zipf|uniform] [--candidates 16]

A training step (forward and backward) of 32 requests × 16 candidates at L = 1,000 and 10,000; encode at L = 100,000
over 10,000; read of 500 candidates with as many agents from L = 10,000 as from 100; and what is left online once a
memory is at hand. Semantic IDs have 2 levels × 200 codes. A user's codes are Zipf-distributed over an order of the
codes that is the user's own (`zipf`), or any code is as likely as any other (`uniform`: little repeats, the worst for
leaves).
The ways alternate, medians are reported. Times are the process's CPU time, so that others' load counts for less; peak
memory is what a process of its own needed beyond its inputs.
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
from torch import Tensor, nn

from ranker.freed_memory import keep_freed_memory
from ranker.longseq.hisac import HiSAC
from ranker.longseq.protocol import History, Probes, Target
from ranker.longseq.target_attention import TargetAttention
from tests.benchmarks.machine import machine
from tests.benchmarks.target_attention import resident_mib

DIM, DZ, CODES, REQUESTS, CANDIDATES = 32, 32, 200, 32, 16
NONE = torch.zeros(0, dtype=torch.int64)
NO_PROBES = Probes(torch.zeros(0, 0), NONE, NONE)
KEEP = {"60": [20, 3], "200": [20, 10]}  # the first is the default
REFERENCE = "target attention"
WAYS = [REFERENCE, *(f"{z} {agents}" for z in ("content", "codewords") for agents in KEEP)]
Work = Callable[[], object]


def codewords_of() -> list[Tensor]:
    """Two levels, the second half the size of the first."""
    generator = torch.Generator().manual_seed(2)
    words = [torch.randn(CODES + 1, DZ, generator=generator) / 2**level for level in range(2)]
    for level in words:
        level[0] = 0.0
    return words


def block_of(way: str) -> HiSAC | TargetAttention:
    """The same weights every time; both know the ages of events."""
    torch.manual_seed(0)
    if way == REFERENCE:
        return TargetAttention(DIM, heads=2, head_dim=16)
    z, agents = way.split()
    return HiSAC(DIM, codewords_of(), KEEP[agents], heads=2, head_dim=16, z=z)


def codes_of(requests: int, length: int, kind: str) -> Tensor:
    """Semantic IDs `[requests · length, 2]`."""
    generator = torch.Generator().manual_seed(3)
    if kind == "uniform":
        return torch.randint(1, CODES + 1, [requests * length, 2], generator=generator)
    weights = 1 / torch.arange(1, CODES + 1)
    ranks = torch.multinomial(weights, requests * length * 2, replacement=True, generator=generator)
    first, second = ranks.view(2, requests, length)
    order = torch.rand(requests, CODES, generator=generator).argsort(1)
    first = order.gather(1, first)
    return torch.stack([first, (second + 7 * first) % CODES], 2).view(-1, 2) + 1


def batch_of(requests: int, length: int, candidates: int, codes: Tensor) -> tuple[History, Target]:
    """Random events near their codewords, and candidates, that ask for gradients."""
    generator = torch.Generator().manual_seed(1)
    events = requests * length
    x = torch.randn(events, DIM, generator=generator).requires_grad_()
    words = codewords_of()
    content = words[0][codes[:, 0]] + words[1][codes[:, 1]] + 0.1 * torch.randn(events, DZ, generator=generator)
    clock = torch.randint(0, 10**9, [requests, length], generator=generator).sort(1)[0].flatten()
    offsets = torch.arange(requests + 1) * length
    history = History(x, clock, offsets[:-1], offsets[1:], torch.full([requests], 10**9), codes, content)
    target = torch.randn(requests * candidates, DIM, generator=generator).requires_grad_()
    return history, Target(target, torch.arange(requests + 1) * candidates, NONE, target.long()[:, :0])


def medians_ms(ways: dict[str, Work], repeats: int) -> dict[str, float]:
    """Median CPU milliseconds of each; the first, untimed, round warms up."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way, work in ways.items():
            begin = time.process_time()
            work()
            if repeat:
                times[way].append(1e3 * (time.process_time() - begin))
    return {way: statistics.median(found) for way, found in times.items()}


def step(block: nn.Module, history: History, target: Target) -> None:
    """Forward and backward."""
    history.x.grad = target.x.grad = None
    block(history, NO_PROBES, target).sum().backward()


def encode(block: HiSAC, history: History) -> Tensor:
    """Forward, to one number."""
    memory = block.encode(history, NO_PROBES)
    return memory.k.sum() + memory.v.sum()


def peak_mib(way: str, requests: int, length: int, kind: str, candidates: int = CANDIDATES) -> float:
    """Peak memory of one step beyond the inputs, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.hisac", "--codes", kind, "--only", way]
    command += ["--requests", str(requests), "--length", str(length), "--candidates", str(candidates)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(way: str, requests: int, length: int, kind: str, candidates: int) -> None:
    """What the process started by `peak_mib` does."""
    block = block_of(way)
    step(block, *batch_of(2, 100, 2, codes_of(2, 100, kind)))  # libraries and thread pools
    history, target = batch_of(requests, length, candidates, codes_of(requests, length, kind))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident_mib("VmRSS")
    step(block, history, target)
    print(resident_mib("VmHWM") - before)


def print_steps(kind: str, candidates: int, repeats: int) -> None:
    """Training steps against target attention."""
    for length in (1_000, 10_000):
        codes = codes_of(REQUESTS, length, kind)
        history, target = batch_of(REQUESTS, length, candidates, codes)
        block = block_of("codewords 60")
        assert isinstance(block, HiSAC)
        leaves = block.encode(history, NO_PROBES).log_weight.numel() / REQUESTS
        users = torch.arange(REQUESTS).repeat_interleave(length) * (CODES + 1) ** 2
        distinct = (users + codes[:, 0] * (CODES + 1) + codes[:, 1]).unique().numel() / REQUESTS
        blocks = {way: block_of(way) for way in WAYS}
        took = medians_ms({way: lambda b=b, h=history, t=target: step(b, h, t) for way, b in blocks.items()}, repeats)
        sizes = f"{REQUESTS} × {candidates}, {distinct:.0f} leaves and {leaves:.0f} of 60 agents a request"
        print(f"step, L = {length:,}: {sizes}")
        peak = {way: peak_mib(way, REQUESTS, length, kind, candidates) for way in WAYS}
        for way in WAYS:
            ratios = f"time × {took[way] / took[REFERENCE]:.2f}, memory × {peak[way] / peak[REFERENCE]:.2f}"
            print(f"  {way:<18}{took[way]:>9.1f} ms {peak[way]:>6.0f} MiB   {ratios}", flush=True)


def print_growth(kind: str, repeats: int) -> None:
    """Encode ten times as many events."""
    print("encode, one request, L = 100,000 over 10,000")
    batches = {n: batch_of(1, n, CANDIDATES, codes_of(1, n, kind)) for n in (10_000, 100_000)}
    for way in WAYS[1:]:
        block = block_of(way)
        assert isinstance(block, HiSAC)
        forward: dict[str, Work] = {str(n): lambda h=b[0], block=block: encode(block, h) for n, b in batches.items()}
        both: dict[str, Work] = {
            str(n): lambda h=b[0], block=block: encode(block, h).backward() for n, b in batches.items()
        }
        took, took_both = medians_ms(forward, repeats), medians_ms(both, repeats)
        backward = {n: took_both[n] - took[n] for n in took}
        peak = {str(n): peak_mib(way, 1, n, kind) for n in batches}
        print(
            f"  {way:<18}"
            + ", ".join(
                f"{name} {found['10000']:.1f} → {found['100000']:.1f} {unit} (× {found['100000'] / found['10000']:.1f})"
                for name, found, unit in (
                    ("forward", took, "ms"),
                    ("backward", backward, "ms"),
                    ("step's memory", peak, "MiB"),
                )
            ),
            flush=True,
        )


def print_online(repeats: int) -> None:
    """500 candidates of one request, without gradients. Reads are timed apart from target attention, whose events would
    push the memory of whichever comes next out of the cache."""
    with torch.no_grad():
        hisac, full = block_of("content 60"), block_of(REFERENCE)
        ways: dict[str, Work] = {}
        for length in (100, 10_000):
            i = torch.arange(length)
            codes = torch.stack([i % 20 + 1, i // 20 % 3 + 1], 1)  # 60 leaves, all of them agents
            history, target = batch_of(1, length, 500, codes)
            memory = hisac.encode(history, NO_PROBES)
            ways[f"read, L = {length:,}"] = lambda m=memory, t=target: hisac.read(m, t)
        memory_200 = block_of("content 200").encode(
            batch_of(1, 10_000, 1, codes_of(1, 10_000, "uniform"))[0], NO_PROBES
        )
        kept = full.encode(history, NO_PROBES)
        ways["read, 200 agents"] = lambda: hisac.read(memory_200, target)
        references: dict[str, Work] = {
            REFERENCE: lambda: full(history, NO_PROBES, target),
            "its read alone": lambda: full.read(kept, target),
        }
        took = medians_ms(ways, 40 * repeats) | medians_ms(references, 5 * repeats)
    for way, found in took.items():
        print(f"  {way:<18}{found:>9.2f} ms   {REFERENCE} × {took[REFERENCE] / found:.1f}")
    print(f"  read at L = 10,000 over L = 100: × {took['read, L = 10,000'] / took['read, L = 100']:.2f}")


def main() -> None:
    """Print machine, sizes, medians, peaks and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--codes", choices=["zipf", "uniform"], default="zipf")
    parser.add_argument("--candidates", type=int, default=CANDIDATES, help="of each request, in the training step")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--requests", type=int, default=REQUESTS, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, default=1_000, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only:
        print_peak(options.only, options.requests, options.length, options.codes, options.candidates)
        return
    keep_freed_memory()  # as the trainer does: else pages that come anew are timed too
    print(f"machine   {machine('torch', threads=options.threads)}")
    print(f"sizes     width {DIM}, 2 heads of 16, content {DZ}, 2 × {CODES} codes, {options.codes} codes, float32")
    print_steps(options.codes, options.candidates, options.repeats)
    print_growth(options.codes, options.repeats)
    print("online, 500 candidates of one request, target attention over L = 10,000")
    print_online(options.repeats)


if __name__ == "__main__":
    main()
