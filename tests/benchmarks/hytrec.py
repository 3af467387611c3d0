"""HyTRec against a softmax encoder of the same depth, and how its cost and memory grow with the history's length.

    python -m tests.benchmarks.hytrec [--threads 1] [--repeats 3]

1. A training step (forward and backward, 16 candidates a request; width 32, 2 heads, 4 layers, 3 linear to 1 softmax)
   beside a causal softmax encoder of 4 layers of the same widths (PyTorch's scaled_dot_product_attention). Histories of
   a batch are of equal length, so that the alternative pads nothing; it reads only its outputs' mean, which favours it.
   Times are per request: long histories are timed on fewer requests, as the table says.
   Then a step of 512 requests in rows of 8, one event apart, at the length of MovieLens-1M's histories: with
   decay="state", which lets a row share its pass, and with a copy of the row for each request.
2. `encode` of one history of 10,000 and of 100,000 events: time and peak memory, forward, and forward and backward;
   and of ten histories of 10,000, which are as many events as the one of 100,000, and fit no cache either.
3. `read` for 500 candidates from the memory of 100 and of 10,000 events, and beside full-length target attention, which
   is timed apart: its events would push the memory of whichever comes next out of the cache.

The ways alternate, and medians are reported: with one thread of this process's processor time, so that others' work on
the machine counts for little, else of wall time. Peak memory is what a process of its own needed beyond its inputs.
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
from torch.nn.functional import scaled_dot_product_attention

from ranker.freed_memory import keep_freed_memory
from ranker.longseq import History, Probes, Target, TargetAttention
from ranker.longseq.hytrec import HyTRec
from ranker.longseq.hytrec_layers import FeedForward
from ranker.longseq.protocol import compact
from tests.benchmarks.machine import machine
from tests.benchmarks.target_attention import resident_mib

WIDTH, HEADS, LAYERS, CANDIDATES = 32, 2, 4, 16
NONE = torch.zeros(0, dtype=torch.int64)
NO_PROBES = Probes(torch.zeros(0, 0), NONE, NONE)
SIZES = {1_000: (32, 32), 2_048: (32, 8), 10_000: (8, 2)}  # requests of a HyTRec step, and of the softmax encoder's


class SoftmaxEncoder(nn.Module):
    """The alternative: causal softmax attention in every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.event = nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.projections = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(LAYERS))
        self.outs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.feeds = nn.ModuleList(FeedForward(WIDTH, 2) for _ in range(LAYERS))
        self.out = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, history: History, probes: Probes, target: Target) -> Tensor:
        """`[N, width]`."""
        requests = history.start.numel()
        x = self.event(history.x).view(requests, -1, WIDTH)
        for norm, projection, out, feed in zip(self.norms, self.projections, self.outs, self.feeds, strict=True):
            q, k, v = (y.transpose(1, 2) for y in projection(norm(x)).unflatten(2, [3, HEADS, -1]).unbind(2))
            o = scaled_dot_product_attention(q, k, v, is_causal=True)
            x = feed(x + out(o.transpose(1, 2).flatten(2)))
        pooled = x.mean(1).repeat_interleave(target.x.size(0) // requests, 0)
        return self.out(torch.cat([pooled, target.x], 1))


def batch_of(requests: int, length: int, candidates: int = CANDIDATES) -> tuple[History, Target]:
    """Random events a minute apart, and candidates."""
    generator = torch.Generator().manual_seed(1)
    events = requests * length
    x = torch.randn(events, WIDTH, generator=generator).requires_grad_()
    time_ms = 60_000 * (torch.arange(events) % length)
    start = torch.arange(requests) * length
    now = torch.full([requests], 60_000 * length)
    history = History(x, time_ms, start, start + length, now, torch.zeros(events, 0, dtype=torch.int64), x[:, :0])
    y = torch.randn(requests * candidates, WIDTH, generator=generator)
    return history, Target(y, torch.arange(requests + 1) * candidates, NONE, y.long()[:, :0])


def block_of(way: str) -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(0)
    if way == "softmax":
        return SoftmaxEncoder()
    return HyTRec(WIDTH, WIDTH, HEADS, LAYERS, 3)


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    run()
    return clock() - begin


def medians(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, alternating, after one round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            took = seconds(run)
            if repeat:
                times[name].append(took)
    return {name: statistics.median(found) for name, found in times.items()}


def training_step(way: str, requests: int, length: int) -> Callable[[], object]:
    """Forward and backward."""
    block, (history, target) = block_of(way), batch_of(requests, length)
    return lambda: block(history, NO_PROBES, target).sum().backward()


def step_of_rows(shared: bool, rows: int = 64, requests: int = 8, length: int = 165) -> Callable[[], object]:
    """Forward and backward, every row of that many requests that begin at its first event, and end one event apart."""
    torch.manual_seed(0)
    block, (history, _) = HyTRec(WIDTH, WIDTH, HEADS, LAYERS, 3, decay="state"), batch_of(rows, length, 0)
    start, end, now = (x.repeat_interleave(requests) for x in (history.start, history.end, history.now))
    history = history._replace(start=start, end=end - torch.arange(requests).repeat(rows), now=now)
    none = torch.zeros([rows * requests, 0], dtype=torch.int64)
    target = Target(torch.randn(rows * requests, WIDTH), torch.arange(rows * requests + 1), NONE, none)
    return lambda: block(history if shared else compact(history), NO_PROBES, target).sum().backward()


def encode(length: int, backward: bool, requests: int = 1) -> Callable[[], object]:
    """To the whole memory."""
    block, (history, _) = HyTRec(WIDTH, WIDTH, HEADS, LAYERS, 3), batch_of(requests, length)

    def forward() -> Tensor:
        memory = block.encode(history, NO_PROBES)
        return memory.state.sum() + memory.pooled.sum() + memory.k.sum() + memory.v.sum()

    def without_gradient() -> None:
        with torch.no_grad():
            forward()

    return (lambda: forward().backward()) if backward else without_gradient


def peak_mib(length: int, backward: bool) -> float:
    """Peak memory of `encode` beyond the inputs, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.hytrec", "--peak", str(length)]
    done = subprocess.run(command + ["--backward"] * backward, check=True, capture_output=True, text=True)
    return float(done.stdout)


def print_peak(length: int, backward: bool) -> None:
    """What the process started by `peak_mib` does."""
    encode(1000, backward)()
    run = encode(length, backward)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident_mib("VmRSS")
    run()
    print(resident_mib("VmHWM") - before)


def compare_steps(repeats: int) -> None:
    """Part 1."""
    for length, (ours, theirs) in SIZES.items():
        runs = {"hytrec": training_step("hytrec", ours, length), "softmax": training_step("softmax", theirs, length)}
        took = medians(runs, repeats)
        each, other = 1e3 * took["hytrec"] / ours, 1e3 * took["softmax"] / theirs
        print(
            f"training step, L {length:>6,}: HyTRec {each:8.1f} ms a request ({ours} requests), softmax encoder "
            f"{other:8.1f} ms ({theirs} requests)   softmax / HyTRec {other / each:.2f}",
            flush=True,
        )


def compare_rows(repeats: int) -> None:
    """Part 1, of rows."""
    took = medians({"shared": step_of_rows(True), "own": step_of_rows(False)}, repeats)
    print(
        f"training step, 512 requests in rows of 8, L 165: one pass a row {1e3 * took['shared']:.0f} ms, one a request "
        f"{1e3 * took['own']:.0f} ms   a request / a row {took['own'] / took['shared']:.2f}",
        flush=True,
    )


def grow(repeats: int) -> None:
    """Part 2."""
    for backward in (False, True):
        runs = {
            f"{n} × {length:,}": encode(length, backward, n) for n, length in ((1, 10_000), (1, 100_000), (10, 10_000))
        }
        small, large, as_many = medians(runs, repeats).values()
        peaks = [peak_mib(length, backward) for length in (10_000, 100_000)]
        print(
            f"encode{', backward' if backward else ', forward'}: L 10,000 {small:.3f} s, {peaks[0]:.0f} MiB; L 100,000 "
            f"{large:.3f} s, {peaks[1]:.0f} MiB   time × {large / small:.2f}, memory × {peaks[1] / peaks[0]:.2f}; "
            f"of ten histories of 10,000 {as_many:.3f} s   one of 100,000 over them × {large / as_many:.2f}",
            flush=True,
        )


@torch.no_grad()
def online(repeats: int) -> None:
    """Part 3."""
    block, exact = HyTRec(WIDTH, WIDTH, HEADS, LAYERS, 3).eval(), TargetAttention(WIDTH, HEADS, WIDTH // HEADS)
    runs: dict[str, Callable[[], object]] = {}
    for length in (100, 10_000):
        history, target = batch_of(1, length, 500)
        memory = block.encode(history, NO_PROBES)
        runs[f"HyTRec read, L {length:,}"] = lambda memory=memory, target=target: block.read(memory, target)
    known = exact.encode(history, NO_PROBES)
    references: dict[str, Callable[[], object]] = {
        "target attention, keys and values at hand": lambda: exact.read(known, target),
        "target attention": lambda: exact(history, NO_PROBES, target),
    }
    took = medians(runs, 50 * repeats) | medians(references, 5 * repeats)
    for name, found in took.items():
        print(f"500 candidates, {name}: {1e3 * found:.2f} ms")
    small, ours, known_s, whole_s = took.values()
    print(
        f"read, L 10,000 / L 100: {ours / small:.3f}; target attention / read: {whole_s / ours:.1f}, with keys and "
        f"values at hand {known_s / ours:.1f}; memory {block.memory_bytes():,} bytes a user"
    )


def main() -> None:
    """Print machine, sizes, medians, peaks and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print_peak(options.peak, options.backward)
        return
    keep_freed_memory()  # as the trainer does: else pages that come anew are timed too
    print(f"machine   {machine('torch', threads=options.threads)}")
    print(f"sizes     width {WIDTH}, {HEADS} heads, {LAYERS} layers, 3 linear to 1 softmax, float32")
    compare_steps(options.repeats)
    compare_rows(options.repeats)
    grow(options.repeats)
    online(options.repeats)


if __name__ == "__main__":
    main()
