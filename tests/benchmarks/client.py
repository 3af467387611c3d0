"""One request scored in C++ against the same in Python: what serving without Python brings.

    python -m tests.benchmarks.client [--candidates 500] [--length 1000] [--rounds 7] [--repeat 100]

Both load one exported ranker (DIN on the latest 50 events, attention to the history or its mean, 16-wide tables, random
parameters) and score one random request, with one thread: `tests/client` by libtorch, and Python, the named
alternative, by `torch.jit.load` in a loop that does nothing else. Rounds alternate; each begins with calls that are
not timed. Shown are p50 and p99 of a round's calls, medians over rounds, and the ratio of a round's p50. The scores of
the two are compared first, bit for bit.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from features.batch import from_tensors
from ranker.config import ModelConfig
from ranker.export import ServedRanker, inputs_of
from ranker.model import Ranker
from ranker.requests_file import Example, save_requests
from tests.benchmarks.machine import machine
from tests.benchmarks.request_step import ATTENTION, SPEC, config_of, request_level
from tests.client.building import FLOAT, build, operator_options, why_not

MODELS = {
    "DIN-50 + attention": ModelConfig.model_validate({"long": [ATTENTION]}),
    "DIN-50 + mean": ModelConfig.model_validate({"long": [{"type": "mean"}]}),
}
WARM_UP = 5


class Latency(NamedTuple):
    """Of the calls of a round, in milliseconds."""

    p50: float
    p99: float


def in_python(model: torch.jit.ScriptModule, inputs: dict[str, Tensor], repeat: int) -> Latency:
    """Calls in this process."""
    took: list[float] = []
    with torch.inference_mode():
        for call in range(WARM_UP + repeat):
            begin = time.perf_counter()
            model(**inputs)
            if call >= WARM_UP:
                took.append(1e3 * (time.perf_counter() - begin))
    p50, p99 = np.percentile(took, [50, 99], method="inverted_cdf")  # a time that was measured, as the client's is
    return Latency(float(p50), float(p99))


def in_cpp(command: list[str], repeat: int) -> tuple[Latency, np.ndarray]:
    """Calls in a process of their own, and the scores `[N, tasks]`."""
    done = subprocess.run([*command, "--repeat", str(repeat)], capture_output=True, text=True, check=True)
    found = re.search(r"^latency ranker calls \d+ p50_ms ([\d.]+) p99_ms ([\d.]+)$", done.stderr, re.MULTILINE)
    assert found is not None, done.stderr
    scores = [line.split("\t")[2:] for line in done.stdout.splitlines()]
    return Latency(float(found[1]), float(found[2])), np.array(scores, np.float32)


def compare(program: Path, config: ModelConfig, options: argparse.Namespace, folder: Path) -> str:
    """Rounds of both, alternating."""
    torch.manual_seed(0)
    ranker = Ranker(SPEC, config_of(config), {}, device=torch.device("cpu")).eval()
    batch = from_tensors(SPEC, request_level(1, options.candidates, options.length))
    model_file, request_file = folder / "ranker.pt", folder / "request"
    torch.jit.script(ServedRanker(ranker, SPEC).eval()).save(str(model_file))
    model, inputs = torch.jit.load(str(model_file)), inputs_of(batch)
    with torch.inference_mode():
        expected = model(**inputs)
    save_requests([Example({"ranker": inputs}, expected)], request_file)
    command = [str(program), str(model_file), str(request_file), "--threads", "1", *operator_options(FLOAT)]
    cpp: list[Latency] = []
    python: list[Latency] = []
    for _ in range(options.rounds):
        latency, scores = in_cpp(command, options.repeat)
        if not np.array_equal(scores, expected.numpy()):
            raise AssertionError(f"scores differ by up to {np.abs(scores - expected.numpy()).max()}")
        cpp.append(latency)
        python.append(in_python(model, inputs, options.repeat))
    ratios = [b.p50 / a.p50 for a, b in zip(cpp, python, strict=True)]
    shown = [
        f"{name} p50 {statistics.median(x.p50 for x in of):.2f} ms, p99 {statistics.median(x.p99 for x in of):.2f} ms"
        for name, of in (("C++", cpp), ("Python", python))
    ]
    ratio = f"Python / C++ {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
    return f"{'; '.join(shown)}; p50 of {ratio}; scores equal bit for bit"


def main() -> None:
    """Print machine, sizes, latencies and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=500)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeat", type=int, default=100, help="timed calls of a round")
    options = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    torch.set_num_threads(1)
    print(machine("torch", "fbgemm-gpu-cpu", threads=1))
    print(f"1 request, {options.candidates} candidates, history of {options.length}, tables 16 wide")
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder) / "build")
        for name, config in MODELS.items():
            print(f"{name}: {compare(program, config, options, Path(folder))}")


if __name__ == "__main__":
    main()
