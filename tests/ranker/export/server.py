"""Exported files in a process that imports torch and fbgemm_gpu alone, as a C++ server would load them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ranker.export.compiled import load

SERVER = """
import sys
import torch
import torch._inductor
import fbgemm_gpu
calls, expected = torch.load(sys.argv[1])
for (file, inputs), outputs in zip(calls, expected, strict=True):
    load = torch._inductor.aoti_load_package if file.endswith(".pt2") else torch.jit.load
    found = load(file)(**inputs)
    found, outputs = (x if isinstance(x, dict) else {"scores": x} for x in (found, outputs))
    assert found.keys() == outputs.keys(), found.keys()
    for name, x in outputs.items():
        assert torch.equal(found[name], x), (file, name)
ours = [name for name in sys.modules if name.split(".")[0] in ("torchrec", "ranker", "features", "pyarrow")]
assert not ours, ours
print("scored", len(found))
"""


def loaded(file: Path) -> Any:
    """A file as a server loads it."""
    return load(file) if file.suffix == ".pt2" else torch.jit.load(str(file))


def answered_elsewhere(aside: Path, *calls: tuple[Path, dict[str, Any]]) -> None:
    """The same answers to the same inputs as here, file by file."""
    expected = [loaded(file)(**inputs) for file, inputs in calls]
    torch.save(([(str(file), inputs) for file, inputs in calls], expected), aside)
    command = [sys.executable, "-I", "-c", SERVER, str(aside)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("scored ")
