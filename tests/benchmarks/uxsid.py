"""UxSID against full-length target attention of the same width: in training, as histories grow, and online.

    python -m tests.benchmarks.uxsid [--threads 1] [--repeats 9]

Width 16: one head for UxSID (16 anchors), two of 8 for the named alternative, TargetAttention; both with an age bias.
Training: forward, the block's own loss and backward for 32 requests × 16 candidates, whose semantic IDs are all
distinct (the worst case) or 4 a request. Growth: `encode` of 100,000 events over 10,000, forward, backward and peak
memory in a process of its own, and over ten histories of 10,000, which fit no cache either; the memory's bytes.
Online, without gradients: 500 candidates of 100 semantic IDs read a memory made of 10,000 events, against one made of
100, and against target attention to the 10,000 events. The ways alternate and medians are reported, of this process's
processor time: others' work on the machine counts for less.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ranker.freed_memory import keep_freed_memory
from ranker.longseq import History, Probes, Target, TargetAttention
from ranker.longseq.uxsid import UxSID
from ranker.ops.probing import distinct_probes
from tests.benchmarks.machine import machine
from tests.benchmarks.target_attention import resident_mib

DIM, PROBE_DIM, WIDTH = 32, 16, 32
GROWTH = ((1, 10_000), (1, 100_000), (10, 10_000))  # requests, events of each
Block = UxSID | TargetAttention


def block_of(name: str) -> Block:
    """The same weights every time."""
    torch.manual_seed(0)
    if name == "UxSID":
        return UxSID(DIM, PROBE_DIM, width=WIDTH)
    return TargetAttention(DIM, heads=2, head_dim=WIDTH // 2)


def batch_of(requests: int, length: int, candidates: int, codes: int) -> tuple[History, Probes, Target]:
    """Histories of equal length; the candidates of a request have `codes` distinct semantic IDs."""
    generator = torch.Generator().manual_seed(1)
    start, events = torch.arange(requests) * length, requests * length
    x = torch.randn(events, DIM, generator=generator).requires_grad_()
    event_time = torch.randint(0, 10**9, [events], generator=generator)
    now = torch.full([requests], 10**9)
    history = History(
        x, event_time, start, start + length, now, torch.zeros(events, 0, dtype=torch.int64), x.detach()[:, :0]
    )
    offsets = torch.arange(requests + 1) * candidates
    code, request, probe, _ = distinct_probes(torch.arange(candidates).repeat(requests) % codes, offsets)
    probes = Probes(torch.randn(code.numel(), PROBE_DIM, generator=generator).requires_grad_(), code, request)
    target = torch.randn(requests * candidates, DIM, generator=generator).requires_grad_()
    return history, probes, Target(target, offsets, probe, target.long()[:, :0])


def train_step(block: Block, history: History, probes: Probes, target: Target) -> list[float]:
    """Seconds of the forward and the backward pass."""
    history.x.grad = None
    begin = time.process_time()
    memory = block.encode(history, probes)
    loss = block.read(memory, target).sum() + block.auxiliary(history, memory)
    forward = time.process_time()
    loss.backward()
    return [forward - begin, time.process_time() - forward]


def encode_step(history: History, probes: Probes) -> list[float]:
    """Seconds of `encode`, forward and backward."""
    block = block_of("UxSID")
    history.x.grad = None
    begin = time.process_time()
    memory = block.encode(history, probes)
    forward = time.process_time()
    memory.rows.sum().backward()
    return [forward - begin, time.process_time() - forward]


def seconds(run: Callable[[], Tensor], calls: int = 1) -> list[float]:
    """Seconds of one call without gradients."""
    begin = time.process_time()
    with torch.no_grad():
        for _ in range(calls):
            run()
    return [(time.process_time() - begin) / calls]


def medians_ms(ways: dict[str, Callable[[], list[float]]], repeats: int) -> dict[str, list[float]]:
    """Median milliseconds of each way's parts; the first, untimed, round warms up."""
    times: dict[str, list[list[float]]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way, run in ways.items():
            took = run()
            if repeat:
                times[way].append(took)
    return {way: [1e3 * statistics.median(part) for part in zip(*runs, strict=True)] for way, runs in times.items()}


def training(repeats: int) -> None:
    """A step against target attention's."""
    print(f"{'training step, 32 × 16':<38}{'UxSID, ms':>12}{'attention, ms':>15}   UxSID / attention")
    for length in (1_000, 10_000):
        for codes in (16, 4):
            batch = batch_of(32, length, 16, codes)
            ways = {name: partial(train_step, block_of(name), *batch) for name in ("UxSID", "attention")}
            ours, theirs = (sum(parts) for parts in medians_ms(ways, max(2, repeats * 1_000 // length)).values())
            case = f"L {length:,}, {codes} semantic IDs a request"
            print(f"{case:<38}{ours:>12.1f}{theirs:>15.1f}   {ours / theirs:.2f}", flush=True)


def where(length: int) -> None:
    """The operators that a training step spends most on."""
    block, batch = block_of("UxSID"), batch_of(32, length, 16, 16)
    train_step(block, *batch)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        train_step(block, *batch)
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    parts = ", ".join(f"{event.key} {event.self_cpu_time_total / whole:.0%}" for event in events[:8])
    print(f"of a step at L {length:,}: {parts}")


def peak_mib(length: int) -> float:
    """Peak memory of one `encode` and its backward beyond the inputs, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.uxsid", "--only-peak", str(length)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(length: int) -> None:
    """What the process started by `peak_mib` does."""
    history, probes, _ = batch_of(1, length, 16, 16)
    encode_step(*batch_of(1, 100, 16, 16)[:2])  # libraries and thread pools
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident_mib("VmRSS")
    encode_step(history, probes)
    print(resident_mib("VmHWM") - before)


def growth(repeats: int) -> None:
    """`encode` of ten times as many events."""
    cases = {f"{n} × {length:>7,}": batch_of(n, length, 16, 16) for n, length in GROWTH}
    took = medians_ms({name: partial(encode_step, *batch[:2]) for name, batch in cases.items()}, repeats)
    for (name, (history, probes, _)), parts in zip(cases.items(), took.values(), strict=True):
        rows = block_of("UxSID").eval().encode(history, probes).rows
        print(
            f"encode, requests of 16 probes × events: {name}: forward {parts[0]:.1f} ms, backward {parts[1]:.1f} ms, "
            f"{1e6 * sum(parts) / history.x.size(0):.0f} ns/event; "
            f"memory {rows.numel() * rows.element_size() // probes.code.numel()} bytes a probe",
            flush=True,
        )
    short, long, as_many = took.values()
    for name, other in (("1", short), ("10", as_many)):
        ratios = [x / y for x, y in zip(long, other, strict=True)]
        print("L 100,000 over {} × 10,000: forward × {:.2f}, backward × {:.2f}".format(name, *ratios))
    peaks = [peak_mib(length) for length in (10_000, 100_000)]
    print(f"peak memory {peaks[0]:.0f} and {peaks[1]:.0f} MiB: × {peaks[1] / peaks[0]:.1f}")


def online(repeats: int) -> None:
    """500 candidates of one request."""
    ours, theirs = block_of("UxSID").eval(), block_of("attention").eval()
    history, probes, target = batch_of(1, 10_000, 500, 100)
    with torch.no_grad():
        long, short = ours.encode(history, probes), ours.encode(batch_of(1, 100, 500, 100)[0], probes)
        projected = theirs.encode(history, probes)
    reads = {
        "read, memory of 10,000 events": lambda: seconds(lambda: ours.read(long, target), 50),
        "read, memory of 100 events": lambda: seconds(lambda: ours.read(short, target), 50),
    }
    others = {
        "encode and read": lambda: seconds(lambda: ours(history, probes, target), 2),
        "attention, keys and values at hand": lambda: seconds(lambda: theirs.read(projected, target), 2),
        "attention": lambda: seconds(lambda: theirs(history, probes, target), 2),
    }
    # the two reads apart from the rest, which would leave the first of them a cold cache
    medians = medians_ms(reads, 10 * repeats) | medians_ms(others, 3 * repeats)
    took = {way: parts[0] for way, parts in medians.items()}
    print("online, 500 candidates: " + ", ".join(f"{way} {ms:.2f} ms" for way, ms in took.items()))
    read, short_read, missed, cached, whole = took.values()
    print(f"read, L 10,000 over 100: × {read / short_read:.2f}")
    print(f"attention over read: × {whole / read:.0f}, with keys and values at hand × {cached / read:.0f}")
    print(f"attention over encode and read, where no memory is at hand: × {whole / missed:.1f}")


def main() -> None:
    """Print machine, medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only-peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only_peak:
        print_peak(options.only_peak)
        return
    keep_freed_memory()  # as the trainer does: else pages that come anew are timed too
    print(f"machine   {machine('torch', threads=options.threads)}")
    print(f"sizes     events {DIM}, probes {PROBE_DIM}, width {WIDTH}, 16 anchors, float32; processor time")
    training(options.repeats)
    where(10_000)
    growth(options.repeats)
    online(options.repeats)


if __name__ == "__main__":
    main()
