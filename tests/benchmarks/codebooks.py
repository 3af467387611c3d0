"""Codebooks side by side: fits every quantiser with every choice of levels and content, and prints what each is worth.

    python -m tests.benchmarks.codebooks configs/ml1m/sids.yaml --dataset datasets/ml1m --out codebooks/ml1m \\
        --levels 64,64,64 256,256 --content all text behaviour

Each row stands beside residual K-means with the same levels and content: `ratio` is its error over that one's.
Codebooks that are already there are not fitted again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import yaml

from features.config_file import load_config
from features.semantic_ids.config import SidsConfig
from features.semantic_ids.report import SidsReport
from features.semantic_ids.report.judge import read_report
from tests.benchmarks.machine import machine

QUANTIZERS = ("residual_kmeans", "rqvae", "kmeans_fsq")


def fitted(config: Path, dataset: Path, out: Path, settings: dict[str, str]) -> tuple[SidsReport, float | None]:
    """The report of a codebook, and the seconds of its fit if it was made now."""
    seconds = None
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        begun = time.perf_counter()
        overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        command = ["-m", "ranker.cli", "sids", "fit", str(config), "--dataset", str(dataset), "--out", str(out)]
        with out.with_suffix(".log").open("w") as log:
            subprocess.run([sys.executable, *command, *overrides], stdout=log, stderr=log, check=True)
        seconds = time.perf_counter() - begun
    return read_report(out), seconds


def row(name: list[str], report: SidsReport, baseline: SidsReport, seconds: float | None) -> str:
    """One codebook as a line of the table."""
    last, first = report.levels[-1], baseline.levels[-1]
    ratio = last.error / first.error if last.error is not None and first.error else float("nan")
    near = report.neighbours.prefixes if report.neighbours else []
    together = report.cooccurrence.prefixes[0] if report.cooccurrence else None
    cells = [
        *name,
        "–" if seconds is None else f"{seconds:.0f}",
        " / ".join("–" if level.error is None else f"{level.error:.3f}" for level in report.levels),
        f"{ratio:.2f}",
        " / ".join(f"{level.dead:.0%}" for level in report.levels),
        " / ".join(f"{level.perplexity:.0f}" for level in report.levels),
        f"{report.leaves.unique:.1%}",
        f"{report.leaves.median:g}, {report.leaves.p99}, {report.leaves.max}",
        " / ".join("–" if p.share is None else f"{p.share:.2f}" for p in near),
        "–" if together is None or together.lift is None else f"{together.share:.3f} ({together.lift:.1f}×)",
        *(" / ".join(f"{x:.2f}" for x in column.ami) for column in report.columns),
        f"{report.items_without_content:,}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the codebooks")
    parser.add_argument("--levels", nargs="+", default=["64,64,64", "256,256"])
    parser.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=QUANTIZERS)
    parser.add_argument(
        "--content", nargs="+", default=["all"], choices=["all", "vector", "text", "behaviour"],
        help="the config's parts of one type, or all",
    )  # fmt: skip
    given = parser.parse_args()
    config = load_config(given.config, SidsConfig)
    columns = [f"AMI {name} by prefix" for name in config.report.columns]
    titles = [
        "content", "levels", "quantiser", "s", "error after each level", "ratio", "dead", "perplexity", "unique SIDs",
        "items per leaf: median, p99, max", "neighbours in the same prefix", "co-occurring in the same first code",
        *columns, "items without code",
    ]  # fmt: skip
    print(machine("faiss-cpu", "vector-quantize-pytorch"), given.dataset.name, sep="\n")
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for content in given.content:
        parts = [part.model_dump(mode="json") for part in config.content if content in ("all", part.type)]
        for levels in given.levels:
            reports: dict[str, tuple[SidsReport, float | None]] = {}
            for quantizer in given.quantizers:
                settings = {"content": yaml.safe_dump(parts, default_flow_style=True).strip(), "levels": f"[{levels}]"}
                settings["quantizer"] = f"{{type: {quantizer}}}"
                out = given.out / f"{content}-{levels.replace(',', '-')}-{quantizer}"
                reports[quantizer] = fitted(given.config, given.dataset, out, settings)
                baseline = reports[given.quantizers[0]][0]
                report, seconds = reports[quantizer]
                print(row([content, levels.replace(",", " × "), quantizer], report, baseline, seconds), flush=True)


if __name__ == "__main__":
    main()
