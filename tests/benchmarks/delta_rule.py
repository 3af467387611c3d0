"""The gated delta rule's backward pass, written out, against autograd and against exact causal attention.

    python -m tests.benchmarks.delta_rule [--threads 1] [--repeats 3] [--no-decay]

4 sequences of equal length, 2 heads of 32, chunks of 32 tokens, float32. The alternatives: autograd through our own
chunked forward; autograd through the chunked form as published, one chunk rank after another with everything in the
loop ("chunk loop"); the token loop (up to L 1,024); and PyTorch's scaled_dot_product_attention, causal. All but the
last give the same output.

The ways alternate, and medians are reported: with one thread of this process's processor time, so that others' work on
the machine counts for little, else of wall time. Peak memory is what a process of its own needed beyond its inputs;
"kept" is what the forward pass keeps for the backward one, inputs not counted, where autograd can count it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from ranker.freed_memory import keep_freed_memory
from ranker.ops.delta_rule import Writes, chunked_delta_rule, delta_rule, naive_delta_rule
from tests.benchmarks.hytrec import seconds
from tests.benchmarks.machine import machine
from tests.benchmarks.target_attention import resident_mib

SEQUENCES, HEADS, WIDTH, CHUNK = 4, 2, 32, 32
Inputs = list[Tensor | None]


def inputs_of(length: int, decay: bool) -> Inputs:
    """q, k, v `[T, h, d]`, erase, write, log decay `[T, h]`, asking for gradients."""
    generator = torch.Generator().manual_seed(0)
    tokens = SEQUENCES * length
    q, k, v = (torch.randn(tokens, HEADS, WIDTH, generator=generator) for _ in range(3))
    erase, write, log_decay = (torch.rand(tokens, HEADS, generator=generator) for _ in range(3))
    tensors = [normalize(q, dim=2), normalize(k, dim=2), v, erase, write, -0.1 * log_decay]
    return [x.requires_grad_() for x in tensors[: 6 if decay else 5]] + [None] * (not decay)


def offsets_of(inputs: Inputs) -> Tensor:
    """Of equal sequences."""
    assert inputs[0] is not None
    return torch.arange(SEQUENCES + 1) * (inputs[0].size(0) // SEQUENCES)


def chunk_loop(inputs: Inputs) -> Tensor:
    """Section 3.5 of the methods as it stands: a loop over chunks, sliced from whole sequences."""
    heads_first = [None if x is None else x.unflatten(0, (SEQUENCES, -1)).transpose(1, 2) for x in inputs]
    q, k, v, erase, write, log_decay = heads_first
    s = q.new_zeros(SEQUENCES, HEADS, WIDTH, WIDTH)
    out: list[Tensor] = []
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    for first in range(0, q.size(2), CHUNK):
        at = slice(first, first + CHUNK)
        q_, k_, v_ = q[:, :, at], k[:, :, at], v[:, :, at]
        a, b = erase[:, :, at, None], write[:, :, at, None]
        g = torch.zeros_like(a) if log_decay is None else log_decay[:, :, at, None].cumsum(2)
        gamma = (g - g.mT).masked_fill(~lower, float("-inf")).exp()
        to_solve = (a * k_) @ k_.mT * gamma
        right = torch.cat([b * v_, a * g.exp() * k_], 3)
        u, w = torch.linalg.solve_triangular(to_solve, right, upper=False, unitriangular=True).split(WIDTH, 3)
        written = u - w @ s
        out.append((g.exp() * q_) @ s + (q_ @ k_.mT * gamma) @ written)
        s = g[:, :, -1:].exp() * s + ((g[:, :, -1:] - g).exp() * k_).mT @ written
    return torch.cat(out, 2).transpose(1, 2).flatten(0, 1)


def attention(inputs: Inputs) -> Tensor:
    """Exact, causal, over the whole sequence."""
    q, k, v = (x.unflatten(0, (SEQUENCES, -1)).transpose(1, 2) for x in inputs[:3] if x is not None)
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)


WAYS: dict[str, Callable[[Inputs], Tensor]] = {
    "written out": lambda inputs: delta_rule(Writes(*inputs), offsets_of(inputs), CHUNK)[0],
    "autograd": lambda inputs: chunked_delta_rule(Writes(*inputs), offsets_of(inputs), CHUNK)[0],
    "chunk loop": chunk_loop,
    "token loop": lambda inputs: naive_delta_rule(Writes(*inputs), offsets_of(inputs))[0],
    "attention": attention,
}


def step(way: str, inputs: Inputs) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    out: list[Tensor] = []
    forward = seconds(lambda: out.append(WAYS[way](inputs)))
    loss = out[0].sum()
    return forward, seconds(loss.backward)


def kept_mib(way: str, inputs: Inputs) -> float:
    """What the forward pass keeps for the backward one, each storage once, beyond its inputs."""
    sizes: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = WAYS[way](inputs)
    del out
    ours = {x.untyped_storage().data_ptr() for x in inputs if x is not None}
    return sum(size for place, size in sizes.items() if place not in ours) / 2**20


def peak_mib(way: str, length: int, decay: bool) -> float:
    """Peak memory of a step beyond the inputs, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.delta_rule", "--peak", way, "--length", str(length)]
    done = subprocess.run(command + ["--no-decay"] * (not decay), check=True, capture_output=True, text=True)
    return float(done.stdout)


def print_peak(way: str, length: int, decay: bool) -> None:
    """What the process started by `peak_mib` does."""
    step(way, inputs_of(64, decay))
    inputs = inputs_of(length, decay)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident_mib("VmRSS")
    step(way, inputs)
    print(resident_mib("VmHWM") - before)


def main() -> None:
    """Print machine, sizes, medians, peaks and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-decay", action="store_true", help="the delta rule without log decay, as HyTRec has it")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    decay = not options.no_decay
    if options.peak:
        print_peak(options.peak, options.length, decay)
        return
    keep_freed_memory()  # as the trainer does: else pages that come anew are timed too
    print(f"machine   {machine('torch', threads=options.threads)}")
    print(f"sizes     {SEQUENCES} sequences, {HEADS} heads of {WIDTH}, chunk {CHUNK}, decay {decay}, float32")
    for length in (1024, 4096, 16384):
        inputs = inputs_of(length, decay)
        ways = [way for way in WAYS if way != "token loop" or length <= 1024]
        with torch.no_grad():
            expected = WAYS["autograd"](inputs)
            for way in ways:
                if way != "attention":
                    torch.testing.assert_close(WAYS[way](inputs), expected, rtol=1e-3, atol=1e-4)
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for repeat in range(options.repeats + 1):
            for way in ways:
                took = step(way, inputs)
                if repeat:
                    times[way].append(took)
        ours = 0.0
        for way in ways:
            forward, backward = (statistics.median(t) for t in zip(*times[way], strict=True))
            ours = ours or forward + backward
            print(
                f"L {length:>6,}  {way:<12} forward {1e3 * forward:8.1f} ms, backward {1e3 * backward:8.1f} ms, peak "
                f"{peak_mib(way, length, decay):6.0f} MiB, kept {kept_mib(way, inputs):6.0f} MiB   both / ours "
                f"{(forward + backward) / ours:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
