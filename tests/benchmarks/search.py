"""Time of the search methods beside exact target attention, and of Hamming distances as products beside counted bits.

    python -m tests.benchmarks.search [--threads 1] [--events 10000] [--candidates 100] [--repeats 5]

First, serving: one request with all its candidates; `encode` and `read` of each method, K 50, width 32, 2 heads of 16,
without gradients. The named alternative is :class:`ranker.longseq.TargetAttention`. Then training: 64 requests of 8
histories, 4 candidates each, forward and backward. Last, 32-bit SimHash codes of 500 candidates and 8,192 events: a
product of ±1 against XOR of packed int32 and counting its bits by shifts and masks, 8 candidates at a time so that it
stays in cache. The ways alternate and medians are reported.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ranker.freed_memory import keep_freed_memory
from ranker.longseq import History, Probes, Target, TargetAttention
from ranker.longseq.search import ETA, MIRRN, TWIN, SimHard, SimSoft
from ranker.ops.probing import distinct_probes
from tests.benchmarks.machine import machine

DIM, CATEGORIES = 32, 50
BLOCKS: dict[str, Callable[..., Any]] = {
    "target attention": TargetAttention,
    "sim_hard": SimHard,
    "sim_soft": SimSoft,
    "eta": ETA,
    "twin": TWIN,
    "mirrn": MIRRN,
}


def batch_of(rows: int, events: int, requests: int, candidates: int) -> tuple[History, Probes, Target]:
    """`requests` of `rows` histories of `events` each, that share them in turn."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows * events, DIM, generator=generator)
    start = torch.arange(requests) * rows // requests * events
    event_time = torch.arange(events).repeat(rows) * 1000
    code = torch.randint(1, CATEGORIES, [rows * events, 1], generator=generator)
    now = torch.full([requests], 1000 * events + 1)
    target = torch.randn(requests * candidates, DIM, generator=generator)
    offsets = torch.arange(requests + 1) * candidates
    asked = torch.randint(1, CATEGORIES, [requests * candidates], generator=generator)
    group, request, probe, first = distinct_probes(asked, offsets)
    history = History(x, event_time, start, start + events, now, code, x[:, :0])
    return history, Probes(target[first], group, request), Target(target, offsets, probe, target.long()[:, :0])


def medians_ms(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Of each way; the first, untimed, round warms up."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way, run in ways.items():
            begin = time.perf_counter()
            run()
            if repeat:
                times[way].append(time.perf_counter() - begin)
    return {way: 1e3 * statistics.median(found) for way, found in times.items()}


def serving(events: int, candidates: int, repeats: int) -> None:
    history, probes, target = batch_of(1, events, 1, candidates)
    encodes: dict[str, Callable[[], object]] = {}
    reads: dict[str, Callable[[], object]] = {}
    for name, kind in BLOCKS.items():
        block = kind(DIM).eval()
        memory = block.encode(history, probes)
        encodes[name] = lambda block=block: block.encode(history, probes)
        reads[name] = lambda block=block, memory=memory: block.read(memory, target)
    with torch.no_grad():
        encode, read = medians_ms(encodes, repeats), medians_ms(reads, repeats)
    print(f"serving: {events:,} events, {candidates:,} candidates; encode ms, read ms, read / target attention's")
    for name in BLOCKS:
        print(f"  {name:17} {encode[name]:9.2f} {read[name]:9.2f} {read[name] / read['target attention']:6.2f}")


def training(events: int, repeats: int) -> None:
    history, probes, target = batch_of(8, events, 64, 4)
    history, target = history._replace(x=history.x.requires_grad_()), target._replace(x=target.x.requires_grad_())
    ways: dict[str, Callable[[], object]] = {}
    for name, kind in BLOCKS.items():
        block = kind(DIM)
        ways[name] = lambda block=block: block(history, probes, target).sum().backward()
    found = medians_ms(ways, repeats)
    print(f"training: 8 histories of {events:,} events, 64 requests of 4 candidates; step ms, / target attention's")
    for name in BLOCKS:
        print(f"  {name:17} {found[name]:9.2f} {found[name] / found['target attention']:6.2f}")


def counted_bits(a: Tensor, b: Tensor) -> list[Tensor]:
    """Hamming distances of packed codes `[n]` and `[m]`, 8 rows at a time."""
    found: list[Tensor] = []
    for i in range(0, a.numel(), 8):
        x = a[i : i + 8].unsqueeze(1) ^ b
        x -= (x >> 1).bitwise_and_(0x55555555)
        x = (x & 0x33333333).add_((x >> 2).bitwise_and_(0x33333333))
        x = x.add_(x >> 4).bitwise_and_(0x0F0F0F0F)
        found.append(x.mul_(0x01010101).bitwise_right_shift_(24))
    return found


def hamming(repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = [torch.randint(0, 2, [n, 32], generator=generator) for n in (500, 8192)]
    signs = [(2 * b - 1).float() for b in bits]
    packed = [(b << torch.arange(32)).sum(1).to(torch.int32) for b in bits]
    assert torch.equal(torch.cat(counted_bits(packed[0], packed[1])), (32 - (signs[0] @ signs[1].T).int()) // 2)
    found = medians_ms(
        {"product of ±1": lambda: signs[0] @ signs[1].T, "XOR, counted bits": lambda: counted_bits(*packed)}, repeats
    )
    print("Hamming distances of 32 bits; ns a pair")
    for name, took in found.items():
        print(f"  {name:17} {1e6 * took / 500 / 8192:6.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keep_freed_memory()  # as the trainer does: else pages that come anew are timed too
    print(machine("torch", threads=given.threads))
    serving(given.events, given.candidates, given.repeats)
    training(min(given.events, 1_000), given.repeats)
    hamming(given.repeats)
