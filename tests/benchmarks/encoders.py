"""The encoders: how LONGER and ELASTIC grow with the history, and what SASRec and HSTU cost beside padded attention.

    python -m tests.benchmarks.encoders [--threads 1] [--repeats 5]

Width 32, 2 heads, 2 layers, the blocks' defaults otherwise.
1. `encode` of LONGER and ELASTIC for one history of 10,000 and of 100,000 events: forward, backward, peak memory in a
   process of its own, and the bytes that are kept.
2. `encode` of SASRec and HSTU, forward and backward, for 4 histories of 1,000 or of 4,000 events, or one so long and
   three of a quarter. The named alternative has SASRec's weights and PyTorch's scaled_dot_product_attention, over
   histories padded to the longest; its outputs are checked to be SASRec's.
3. Online, without gradients: 500 candidates read what is kept of 100 and of 10,000 events (SASRec and HSTU: of their
   latest 1,000), and beside it full-length target attention to the 10,000.

The ways alternate and medians are reported, of this process's processor time: others' work on the machine counts for
less.
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
from torch.nn.functional import scaled_dot_product_attention

from ranker.freed_memory import keep_freed_memory
from ranker.longseq import History, Probes, Target, TargetAttention
from ranker.longseq.encoders import ELASTIC, HSTU, LONGER, SASRec
from ranker.ops.jagged import offsets_of
from tests.benchmarks.machine import machine
from tests.benchmarks.target_attention import resident_mib
from tests.benchmarks.uxsid import medians_ms, seconds

DIM, WIDTH, HEADS = 32, 32, 2
NONE = torch.zeros(0, dtype=torch.int64)
NO_PROBES = Probes(torch.zeros(0, 0), NONE, NONE)
MADE: dict[str, Callable[..., Any]] = {"LONGER": LONGER, "ELASTIC": ELASTIC, "SASRec": SASRec, "HSTU": HSTU}


def block_of(name: str, **options: Any) -> Any:
    """The same weights every time, and none of them zero."""
    torch.manual_seed(0)
    block = MADE[name](DIM, width=WIDTH, heads=HEADS, **options)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return block


def batch_of(lengths: list[int], candidates: int = 1) -> tuple[History, Target]:
    """Random events a minute apart, and candidates."""
    generator = torch.Generator().manual_seed(1)
    offsets = offsets_of(torch.tensor(lengths))
    events = int(offsets[-1])
    x = torch.randn(events, DIM, generator=generator).requires_grad_()
    now = torch.full([len(lengths)], 60_000 * events)
    none = torch.zeros(events, 0, dtype=torch.int64)
    history = History(x, 60_000 * torch.arange(events), offsets[:-1], offsets[1:], now, none, x.detach()[:, :0])
    target = torch.randn(len(lengths) * candidates, DIM, generator=generator)
    return history, Target(target, torch.arange(len(lengths) + 1) * candidates, NONE, target.long()[:, :0])


def padded(block: SASRec, history: History) -> Tensor:
    """The alternative: SASRec's outputs `[T, width]` over histories padded to the longest."""
    length = history.end - history.start
    place = torch.arange(int(length.max()))
    real = place < length.unsqueeze(1)
    row = torch.minimum(history.start.unsqueeze(1) + place, history.end.unsqueeze(1) - 1)
    back = (length.unsqueeze(1) - 1 - place).clamp(min=0)
    assert block.position is not None
    x = block.tokens(history.x)[row] + block.position[back]
    for layer in block.layers:
        heads: Any = layer.heads
        y = layer.norm(x)  # type: ignore[operator]
        k, v = (z.unflatten(0, row.shape).transpose(1, 2) for z in heads.keys_values(y.flatten(0, 1)))
        q = heads.queries(y.flatten(0, 1)).unflatten(0, row.shape).transpose(1, 2)
        o = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = layer.feed_forward(x + layer.out(o))  # type: ignore[operator]
    return x[real]


def step(run: Callable[[], Tensor], x: Tensor) -> list[float]:
    """Seconds of the forward and the backward pass."""
    x.grad = None
    begin = time.process_time()
    out = run()
    forward = time.process_time()
    out.sum().backward()
    return [forward - begin, time.process_time() - forward]


def kept(block: Any, history: History) -> Tensor:
    """Keys and values in one sum."""
    memory = block.encode(history, NO_PROBES)
    return memory.k.square().sum() + memory.v.square().sum()


def run_of(way: str, lengths: list[int]) -> Callable[[], list[float]]:
    """A step of `encode`, or of the alternative."""
    history, _ = batch_of(lengths)
    if way == "padded":
        block = block_of("SASRec", length=max(lengths))
        return lambda: step(lambda: padded(block, history).square().sum(), history.x)
    block = block_of(way, **({"length": max(lengths)} if way in ("SASRec", "HSTU") else {}))
    return lambda: step(lambda: kept(block, history), history.x)


def peak_mib(way: str, lengths: list[int]) -> float:
    """Peak memory of a step beyond the inputs, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.encoders", "--peak", way, *map(str, lengths)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(way: str, lengths: list[int]) -> None:
    """What the process started by `peak_mib` does."""
    run_of(way, [50, 20])()  # libraries and thread pools
    run = run_of(way, lengths)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident_mib("VmRSS")
    run()
    print(resident_mib("VmHWM") - before)


def growth(repeats: int) -> None:
    """`encode` of ten times as many events."""
    for name in ("LONGER", "ELASTIC"):
        parts: dict[int, list[float]] = {}
        for length in (10_000, 100_000):
            (took,) = medians_ms({"": run_of(name, [length])}, repeats).values()
            parts[length] = [*took, peak_mib(name, [length])]
            memory = block_of(name).encode(batch_of([length])[0], NO_PROBES)
            print(
                f"{name:<8} encode, L {length:>7,}: forward {took[0]:.1f} ms, backward {took[1]:.1f} ms, "
                f"{1e6 * sum(took) / length:.0f} ns/event, peak {parts[length][2]:.0f} MiB; keeps "
                f"{4 * (memory.k.numel() + memory.v.numel()):,} bytes",
                flush=True,
            )
        ratios = [long / short for short, long in zip(*parts.values(), strict=True)]
        print("{:<8} L 100,000 over 10,000: forward × {:.1f}, backward × {:.1f}, peak × {:.1f}".format(name, *ratios))


def beside_padded(repeats: int) -> None:
    """SASRec and HSTU against the padded alternative."""
    ways = ("padded", "SASRec", "HSTU")
    print(f"{'forward and backward':<30}" + "".join(f"{way + ', ms':>13}{'MiB':>6}" for way in ways) + "   over padded")
    for length in (1_000, 4_000):
        for case, lengths in (("4 of", [length] * 4), ("1 of, 3 of a quarter of", [length] + [length // 4] * 3)):
            history, block = batch_of(lengths)[0], block_of("SASRec", length=length)
            torch.testing.assert_close(padded(block, history), block.encoded(history)[0], rtol=1e-3, atol=1e-4)
            runs = {way: run_of(way, lengths) for way in ways}
            took = {way: sum(parts) for way, parts in medians_ms(runs, repeats).items()}
            peak = {way: peak_mib(way, lengths) for way in ways}
            ratios = ", ".join(
                f"{way} time × {took[way] / took['padded']:.2f}, memory × {peak[way] / peak['padded']:.2f}"
                for way in ways[1:]
            )
            figures = "".join(f"{took[way]:>13.0f}{peak[way]:>6.0f}" for way in ways)
            print(f"{f'{case} {length:,}':<30}{figures}   {ratios}", flush=True)


def online(repeats: int) -> None:
    """500 candidates of one request."""
    ways: dict[str, Callable[[], list[float]]] = {}
    with torch.no_grad():
        for name in (*MADE, "SASRec, last"):
            options = {"read": "last"} if "last" in name else {}
            block = block_of(name.split(",")[0], **options).eval()
            for length in (100, 10_000):
                history, target = batch_of([length], 500)
                memory = block.encode(history, NO_PROBES)
                ways[f"{name} {length}"] = partial(seconds, partial(block.read, memory, target), 20)
        attention = TargetAttention(DIM, heads=HEADS, head_dim=WIDTH // HEADS).eval()
        history, target = batch_of([10_000], 500)
        whole = attention.encode(history, NO_PROBES)
        ways["attention"] = partial(seconds, partial(attention.read, whole, target), 2)
    took = {way: parts[0] for way, parts in medians_ms(ways, 3 * repeats).items()}
    for name in (*MADE, "SASRec, last"):
        short, long = took[f"{name} 100"], took[f"{name} 10000"]
        print(
            f"{name:<12} read, 500 candidates: L 100 {short:.2f} ms, L 10,000 {long:.2f} ms, × {long / short:.2f}; "
            f"attention to 10,000 events ({took['attention']:.0f} ms) over it × {took['attention'] / long:.0f}"
        )


def main() -> None:
    """Print machine, medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print_peak(options.peak[0], [int(length) for length in options.peak[1:]])
        return
    keep_freed_memory()  # as the trainer does: else pages that come anew are timed too
    print(f"machine   {machine('torch', threads=options.threads)}")
    print(f"sizes     events {DIM}, width {WIDTH}, {HEADS} heads, 2 layers, float32; processor time")
    growth(options.repeats)
    beside_padded(options.repeats)
    online(options.repeats)


if __name__ == "__main__":
    main()
