"""Every ablation switch of the three compressors, one at a time, beside the block as configured.

    python -m tests.benchmarks.ablations configs/ml1m --dataset datasets/ml1m --out runs/ml1m --seeds 0 1 2

The folder needs uxsid.yaml, hisac.yaml and hytrec.yaml with the block as the first of `model.long`. Runs that are
already measured, also those of tests.benchmarks.quality in the same folder, are not trained again.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.benchmarks.quality import cell, measure, parser_of

BLOCK = "model.long[0]"
ABLATIONS: dict[str, dict[str, list[str]]] = {
    "uxsid": {
        "as configured": [],
        "category as probe": [f"{BLOCK}.probe=CATEGORY", "features.codes=[CATEGORY]"],
        "no e_global": [f"{BLOCK}.global_probe=false"],
        "no e_local": [f"{BLOCK}.local_probe=false"],
        "no orthogonality loss": [f"{BLOCK}.ortho_weight=0"],
        "orthogonality by row": [f"{BLOCK}.ortho=row"],
        "no gate": [f"{BLOCK}.gate=false"],
    },
    "hisac": {
        "as configured": [],
        "z: content vectors": [f"{BLOCK}.z=content", "features.content=[item.sid_vector]"],
        "z: ranking embeddings": [f"{BLOCK}.z=embedding"],
        "softmax over agents": [f"{BLOCK}.routing=agents"],
        "hard routing": [f"{BLOCK}.routing=hard"],
        "no voting": [f"{BLOCK}.voting=false"],
        "votes do not weigh": [f"{BLOCK}.gamma=0"],
    },
    "hytrec": {
        "as configured": [],
        "7 linear layers to each softmax layer": [f"{BLOCK}.layers=8", f"{BLOCK}.ratio=7"],
        "1 linear layer to each softmax layer": [f"{BLOCK}.ratio=1"],
        "deviation from the event before": [f"{BLOCK}.deviation=previous"],
        "gates by age at the request": [f"{BLOCK}.decay=now"],
        "gates half open at first": [f"{BLOCK}.gate_bias=0"],
        "reads without their products": [f"{BLOCK}.agreement=false"],
        "linear keys": [f"{BLOCK}.sharpness=0", f"{BLOCK}.key_dim=0"],
        "keys of all features": [f"{BLOCK}.key=null"],
        "slots of one head by semantic ID": [f"{BLOCK}.slots=[item.sid_1]", "features.codes=[item.sid_1]"],
        "all slots learned": [f"{BLOCK}.slots=[]"],
        "with the next-item loss": [f"{BLOCK}.next_item_weight=0.1"],
        "without it": [f"{BLOCK}.next_item_weight=0"],
    },
}
COLUMNS = [("ctr", "auc"), ("ctr", "uauc"), ("ctr", "wuauc"), ("ctr", "logloss"), ("ctcvr", "auc"), ("ctcvr", "uauc")]
TITLES = ["AUC", "UAUC", "WUAUC", "log loss", "CTCVR AUC", "CTCVR UAUC"]


def main() -> None:
    """Entry point."""
    parser = parser_of(__doc__)
    parser.add_argument("--category", default="item.first_genre", help="the probe instead of a semantic ID")
    parser.add_argument("--blocks", nargs="+", choices=list(ABLATIONS), default=list(ABLATIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()

    def one(job: tuple[str, str, int]) -> dict[str, Any]:
        block, variant, seed = job
        switches = [switch.replace("CATEGORY", given.category) for switch in ABLATIONS[block][variant]]
        settings = [f"dataset={given.dataset}", f"seed={seed}", "training.threads=1", *switches]
        name = f"{block}-{seed}" if not switches else f"{block} {variant}-{seed}".replace(" ", "_").replace(":", "")
        return measure(given.configs / f"{block}.yaml", given.out / name, settings)

    rows = [(b, v) for b in given.blocks for v in ABLATIONS[b]]
    jobs = [(*row, seed) for seed in given.seeds for row in rows]
    with ThreadPoolExecutor(given.parallel) as pool:
        measured = dict(zip(jobs, pool.map(one, jobs), strict=True))
    print(f"{given.dataset.name}: {len(given.seeds)} seeds, mean ± standard deviation")
    print("| block | variant | " + " | ".join(TITLES) + " |\n|" + "---|" * (len(TITLES) + 2))
    for block, variant in rows:
        found = [measured[block, variant, seed] for seed in given.seeds]
        cells = [cell([m[task][metric] for m in found]) for task, metric in COLUMNS]
        print(f"| {block} | {variant} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
