"""One request scored in C++ against the same in Python: what serving without Python brings.

    python -m tests.benchmarks.client [--candidates 500] [--length 1000] [--rounds 7] [--repeat 100]

Both load the same exported files (DIN on the latest 50 events beside a long-sequence block, 16-wide tables, random
parameters) and score one random request, with one thread: `tests/client` by libtorch, and Python, the named
alternative, by `torch.jit.load` in a loop that does nothing else. A block that compresses histories is served whole,
and as a pair with a memory store between: what the store spares a request is the user encoder's time. Rounds alternate;
each begins with calls that are not timed. Shown are p50 and p99 of a round's calls, medians over rounds, and the ratio
of a round's p50. The scores of the two are compared first, bit for bit.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from features.batch import from_tensors
from ranker.config import ModelConfig
from ranker.export import CandidateRanker, ServedRanker, UserEncoder, no_pair_because
from ranker.model import Ranker
from ranker.ranks import join_ranks
from ranker.requests_file import Example, models_of, save_requests
from tests.benchmarks.machine import machine
from tests.benchmarks.request_step import ATTENTION, SPEC, config_of, request_level
from tests.client.building import build, operator_options, why_not

MODELS = {
    "DIN-50 + attention": ModelConfig.model_validate({"long": [ATTENTION]}),
    "DIN-50 + HyTRec": ModelConfig.model_validate({"long": [{"type": "hytrec"}]}),
}
WARM_UP = 5
WAYS = {"whole": ("ranker",), "pair": ("user_encoder", "candidate_ranker")}


class Latency(NamedTuple):
    """Of one file's calls in a round, in milliseconds."""

    p50: float
    p99: float


def export(ranker: Ranker, config: ModelConfig, folder: Path) -> set[str]:
    """Write the files; their names."""
    tables = config_of(config).tables
    modules: dict[str, nn.Module] = {"ranker": ServedRanker(ranker, SPEC)}
    if no_pair_because(config_of(config)) is None:
        modules["user_encoder"] = UserEncoder(ranker, SPEC, tables)
        modules["candidate_ranker"] = CandidateRanker(ranker, SPEC, tables)
    for name, module in modules.items():
        torch.jit.script(module.eval()).save(str(folder / f"{name}.pt"))
    return set(modules)


def scored(files: dict[str, torch.jit.ScriptModule], given: dict[str, Any], timed: dict[str, list[float]]) -> Tensor:
    """The scores, and each call's time added to its file's."""

    def call(name: str, **inputs: Any) -> Any:
        begin = time.perf_counter()
        found = files[name](**inputs)
        timed.setdefault(name, []).append(1e3 * (time.perf_counter() - begin))
        return found

    if "ranker" in files:
        return call("ranker", **given["ranker"])
    own = given["candidate_ranker"]
    memory = call("user_encoder", **given["user_encoder"])
    return call("candidate_ranker", **own | {"memory": memory | own["memory"]})


def in_python(files: dict[str, torch.jit.ScriptModule], given: dict[str, Any], repeat: int) -> dict[str, Latency]:
    """Calls in this process."""
    timed: dict[str, list[float]] = {}
    with torch.inference_mode():
        for _ in range(WARM_UP):
            scored(files, given, {})
        for _ in range(repeat):
            scored(files, given, timed)
    # percentiles that are a call's time, as the client's are
    of = {name: np.percentile(took, [50, 99], method="inverted_cdf").tolist() for name, took in timed.items()}
    return {name: Latency(*percentiles) for name, percentiles in of.items()}


def in_cpp(command: list[str], repeat: int) -> tuple[dict[str, Latency], np.ndarray]:
    """Calls in a process of their own, and the scores `[N, tasks]`."""
    done = subprocess.run([*command, "--repeat", str(repeat)], capture_output=True, text=True, check=True)
    lines = re.findall(r"^latency (\w+) calls \d+ p50_ms ([\d.]+) p99_ms ([\d.]+)$", done.stderr, re.MULTILINE)
    scores = [line.split("\t")[2:] for line in done.stdout.splitlines()]
    return {name: Latency(float(p50), float(p99)) for name, p50, p99 in lines}, np.array(scores, np.float32)


def compare(
    program: Path, folder: Path, way: tuple[str, ...], given: dict[str, Any], options: argparse.Namespace
) -> None:
    """Rounds of both, alternating; a line for each file."""
    files = {name: torch.jit.load(str(folder / f"{name}.pt")) for name in way}
    with torch.inference_mode():
        expected = scored(files, given, {}).numpy()
    paths = [str(folder / f"{name}.pt") for name in way]
    chosen = ["--pair", *paths] if len(way) > 1 else paths
    command = [str(program), *chosen, str(folder / "request"), "--threads", "1", *operator_options()]
    rounds: list[tuple[dict[str, Latency], dict[str, Latency]]] = []
    for _ in range(options.rounds):
        cpp, scores = in_cpp(command, options.repeat)
        if not np.array_equal(scores, expected):
            raise AssertionError(f"scores differ by up to {np.abs(scores - expected).max()}")
        rounds.append((cpp, in_python(files, given, options.repeat)))
    for name in way:
        shown: list[str] = []
        for i, where in enumerate(("C++", "Python")):
            p50, p99 = (statistics.median(getattr(of[i][name], p) for of in rounds) for p in Latency._fields)
            shown.append(f"{where} p50 {p50:.2f} ms, p99 {p99:.2f} ms")
        ratios = [python[name].p50 / cpp[name].p50 for cpp, python in rounds]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        print(f"  {name}: {'; '.join(shown)}; p50 of Python / C++ {spread}", flush=True)


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
    print(f"machine   {machine('torch', 'fbgemm-gpu-cpu', threads=1)}")
    sizes = f"1 request × {options.candidates} candidates, a history of {options.length:,}"
    print(f"sizes     {sizes}, 2 features of width 16")
    batch = from_tensors(SPEC, request_level(1, options.candidates, options.length))
    with join_ranks("cpu", 1), tempfile.TemporaryDirectory() as root:  # one thread, and memory kept as the client does
        program = build(Path(root) / "build")
        for number, (name, config) in enumerate(MODELS.items()):
            print(f"{name}, scores equal bit for bit")
            folder = Path(root) / str(number)
            folder.mkdir()
            torch.manual_seed(0)
            files = export(Ranker(SPEC, config_of(config), {}, device=torch.device("cpu")), config, folder)
            given = models_of(batch, SPEC, config_of(config))
            save_requests([Example(given, torch.zeros(options.candidates, 1))], folder / "request")
            for way in WAYS.values():
                if files.issuperset(way):
                    compare(program, folder, way, given, options)


if __name__ == "__main__":
    main()
