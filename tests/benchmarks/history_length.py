"""AUC against the length of history that a block reads, on logs whose true probabilities are known.

    ranker prepare configs/synthetic/deep.yaml --out datasets/deep
    ranker sids fit configs/synthetic/sids.yaml --dataset datasets/deep --out codebooks/deep
    ranker sids apply codebooks/deep --dataset datasets/deep
    python -m tests.benchmarks.history_length configs/synthetic --dataset datasets/deep --out runs/deep \\
        --models target_attention_sids uxsid hisac hytrec --lengths 50 1000 3000 10000

Batch, width, features and seed are the same in all runs; only `model.long[0].length` differs. Beside each AUC stands
the share of the way from `--base` to the oracle; `--base-set` lets the base have a learning rate of its own, so that it
is as good as it can be. Runs that are already measured are not trained again.
"""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.benchmarks.quality import measure, parser_of


def main() -> None:
    """Entry point."""
    parser = parser_of(__doc__)
    parser.add_argument("--base", default="din_sids", help="config of a model without long history")
    parser.add_argument("--models", nargs="+", required=True, help="configs, each with one block")
    parser.add_argument("--lengths", nargs="+", type=int, default=[50, 1000, 3000, 10000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--base-set", nargs="+", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    common = [f"dataset={given.dataset}", f"seed={given.seed}", "training.threads=1", *given.set]

    def one(job: tuple[str, int]) -> dict[str, Any]:
        model, length = job
        settings = [*common, f"model.long[0].length={length}"] if length else [*common, *given.base_set]
        run = given.out / (f"{model}-{length}" if length else model)
        return measure(given.configs / f"{model}.yaml", run, settings)

    jobs = [(given.base, 0)] + [(model, length) for length in given.lengths for model in given.models]
    with ThreadPoolExecutor(given.parallel) as pool:
        measured = dict(zip(jobs, pool.map(one, jobs), strict=True))
    base = measured[given.base, 0]
    low, high = base["ctr"]["auc"], base["oracle"]["ctr"]["auc"]
    print(f"{platform.machine()}, {os.cpu_count()} cores; {given.dataset.name}, seed {given.seed}; test CTR AUC")
    print(f"{given.base} {low:.4f}, oracle {high:.4f}; in brackets: share of the way between them")
    print("| events | " + " | ".join(given.models) + " |\n|" + "---|" * (len(given.models) + 1))
    for length in given.lengths:
        found = [measured[model, length]["ctr"]["auc"] for model in given.models]
        print(f"| {length:,} | " + " | ".join(f"{a:.4f} ({(a - low) / (high - low):.0%})" for a in found) + " |")


if __name__ == "__main__":
    main()
