"""Logs of one day, and of it and the next: users with new events and without, new users, and one who is gone.

The logs of the training period are the same, and so are the rows of items that training knows, though users are
numbered anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from features.config_file import load_config
from features.dataset import Dataset
from features.prepare import prepare
from features.schema import PrepareConfig
from ranker.config import TrainConfig
from ranker.memory.build import build
from ranker.memory.config import MemoryConfig
from ranker.training.trainer import train
from tests.ranker.conftest import write

DAY_S, FIRST_S = 86_400, 1_600_000_000
ACTIVE, QUIET, GONE, NEW = range(10, 30, 2), range(31, 60, 2), 60, (5, 70)
"""users of both days; of the first day alone, still in the next one's logs or not; of the next day alone"""
ITEMS, NEW_ITEM = 12, 55
SMALL = MemoryConfig.model_validate({"users": 8, "events": 60, "dtype": "float32", "codes": {"most": 2}})

MODEL = """
name: days
dataset: {dataset}
features:
  candidate: [item]
  sequence: [item, item.category]
  codes: [item.category]
tables: {{dim: 8, init_scale: 0.5}}
model:
  short: null
  long:
  - {{type: uxsid, probe: item.category, width: 8, anchors: 4, anchor_hidden: 8, gate_hidden: 8}}
  - {{type: longer, width: 8, recent: 5, global_tokens: 2, layers: 1}}
  tower: {{hidden: [8]}}
loader: {{requests: 16, workers: 0}}
training: {{max_steps: 2, threads: 1, device: cpu, validation_split: null}}
"""


def day(root: Path, days: int, extra_categories: bool = False) -> Dataset:
    """The dataset of the first `days` days.

    Args:
        extra_categories: there are more categories, and ids of those training knows are others.
    """
    logs = root.with_name(f"{root.name}.logs")
    logs.mkdir(parents=True)
    users = [*ACTIVE, *QUIET]
    events = [(u, (u * 7 + i * i) % ITEMS, FIRST_S + 60 * i + u) for u in users for i in range(u % 9)]
    shown = [(u, (u + k) % ITEMS, FIRST_S + 7_200 + u, u, k) for u in users for k in range(3)]
    if days == 1:  # seen after the training period alone, or items' counts would change with her
        events += [(GONE, i, FIRST_S + 10_000 + i) for i in range(5)]
        shown += [(GONE, k, FIRST_S + 20_000, GONE, k) for k in range(2)]
    else:
        events += [(u, (u + 5 * i) % ITEMS, FIRST_S + DAY_S + i) for u in (*ACTIVE, *NEW) for i in range(4)]
        events += [(u, NEW_ITEM, FIRST_S + DAY_S + 9) for u in ACTIVE]
        shown += [
            (u, (u + k) % ITEMS, FIRST_S + DAY_S + 7_200, 1_000 + u, k) for u in (*ACTIVE, *NEW) for k in range(3)
        ]
    shown += [(u, k, FIRST_S + 20_000, 500 + u, k) for u in users[:4] for k in range(2)]
    category = [(i, 9 - i % 4 if extra_categories else i % 4) for i in range(ITEMS)] + [(NEW_ITEM, 0)]
    write(logs / "events.parquet", ("user", "item", "time"), events)
    rows = [(*row, int(row[0] % 3 == row[4])) for row in shown]
    write(logs / "impressions.parquet", ("user", "item", "time", "request", "k", "click"), rows)
    write(logs / "items.parquet", ("item", "category"), category)
    (root.with_name(f"{root.name}.yaml")).write_text(f"""
name: days
source:
  type: logs
  events: {{path: {logs}/events.parquet, time_unit: s}}
  impressions: {{path: {logs}/impressions.parquet, time_unit: s}}
  items: {{path: {logs}/items.parquet}}
columns: {{item: {{category: {{}}}}}}
split: {{by: time, test_from: "2020-09-13T16:00:00"}}
partitions: {2 + days}
threads: 1
""")
    prepare(load_config(root.with_name(f"{root.name}.yaml"), PrepareConfig), root)
    return Dataset(root)


def trained(root: Path, dataset: Path, *overrides: str) -> Path:
    """A run on the first day."""
    config = root.with_name(f"{root.name}.yaml")
    config.write_text(MODEL.format(dataset=dataset))
    train(load_config(config, TrainConfig, overrides), root)
    return root


def built_days(once: Callable[..., Path]) -> Path:
    """Folders `one` and `two`, `run` on the first and `built`, a store of its memories; and `rebuilt`, those of the
    second, by a run that is the same but for its dataset."""

    def make(root: Path) -> None:
        one, two = day(root / "one", 1), day(root / "two", 2)
        trained(root / "run", one.root)
        build(root / "run", str(root / "built"), SMALL)
        other = shutil.copytree(root / "run", root / "rebuilt_run")
        replacements = {
            "config.yaml": (str(one.root), str(two.root)),
            "run.json": (one.manifest.content_hash, two.manifest.content_hash),
        }
        for name, (old, new) in replacements.items():
            text = (other / name).read_text()
            assert old in text
            (other / name).write_text(text.replace(old, new))
        build(other, str(root / "rebuilt"), SMALL)

    return once("memory_days", make)
