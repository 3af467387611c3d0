"""What only running can tell: do torch, FBGEMM and TorchRec load, and does a fused embedding train one step?

A mismatched library may fail to load, raise late, or bring the process down. So `ranker doctor` runs this module in a
process of its own, which prints one JSON line a step; the step after the last line is the one that failed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

STEPS = ("torch", "fbgemm", "torchrec")
TIMEOUT_S = 180


@dataclass(frozen=True)
class Probe:
    """`passed`: what each step that worked told; `failed`: the first step that did not, with its `error`."""

    passed: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    failed: str | None = None
    error: str = ""


def probe_here() -> Probe:
    """Run the steps in this process: at the start of training, which needs the libraries anyway."""
    passed: dict[str, dict[str, Any]] = {}
    try:
        for step, found in _steps():
            passed[step] = found
    except Exception as error:  # whatever a broken library raises
        return Probe(passed, STEPS[len(passed)], f"{type(error).__name__}: {error}")
    return Probe(passed)


def probe_apart() -> Probe:
    """Run the steps in a process of their own and survive what becomes of it."""
    command = [sys.executable, "-m", "ranker.doctor_probe"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        output, code, stderr = result.stdout, result.returncode, result.stderr
    except subprocess.TimeoutExpired as error:
        output, code, stderr = str(error.stdout or ""), 1, f"no answer within {TIMEOUT_S} s"
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"step"')]
    passed: dict[str, dict[str, Any]] = {line["step"]: line["found"] for line in lines}
    if code == 0 and len(passed) == len(STEPS):
        return Probe(passed)
    last = stderr.strip().splitlines()[-1:] or [f"the process ended with {code}"]
    crash = f"the process was ended by signal {-code}; " if code < 0 else ""
    return Probe(passed, next((step for step in STEPS if step not in passed), "exit"), crash + last[0])


def _steps() -> Iterator[tuple[str, dict[str, Any]]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield "torch", _torch()
        yield "fbgemm", _fbgemm()
        yield "torchrec", _torchrec()


def _torch() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    torch.ones(2).sum()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.cuda.get_device_properties(i) for i in range(count)]
    available = dist.is_available()
    return {
        "cuda": torch.version.cuda,
        "devices": [[device.name, device.total_memory] for device in devices],
        "gloo": available and dist.is_gloo_available(),
        "nccl": available and dist.is_nccl_available(),
    }


def _fbgemm() -> dict[str, Any]:
    """One row-wise Adagrad step through the fused kernel that training uses, on the device it will use."""
    import fbgemm_gpu
    import torch
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    lengths = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2]))
    assert lengths.tolist() == [0, 1, 3]
    variant = str(getattr(fbgemm_gpu, "__variant__", "unknown"))
    cuda = torch.cuda.is_available() and variant != "cpu"
    location = EmbeddingLocation.DEVICE if cuda else EmbeddingLocation.HOST
    compute = ComputeDevice.CUDA if cuda else ComputeDevice.CPU
    with torch.random.fork_rng():
        table = SplitTableBatchedEmbeddingBagsCodegen(
            [(4, 4, location, compute)], optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=0.1
        )
    device = "cuda" if cuda else "cpu"
    before = table.split_embedding_weights()[0].detach().clone()
    table(torch.tensor([1, 2, 3], device=device), torch.tensor([0, 1, 3], device=device)).sum().backward()
    moved = bool((table.split_embedding_weights()[0] != before).any(dim=1)[1:].all())
    if not moved:
        raise RuntimeError("the fused embedding did not train: its backward changed no row")
    return {"device": device, "variant": variant}


def _torchrec() -> dict[str, Any]:
    import torch
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    config = EmbeddingBagConfig(name="t", num_embeddings=4, embedding_dim=4, feature_names=["f"])
    features = KeyedJaggedTensor.from_lengths_sync(["f"], torch.tensor([1, 2, 3]), torch.tensor([1, 2]))
    with torch.random.fork_rng():  # the caller's seed shall not notice
        pooled = EmbeddingBagCollection([config])(features).values()
    if tuple(pooled.shape) != (2, 4):
        raise RuntimeError(f"EmbeddingBagCollection gave the shape {tuple(pooled.shape)}, expected (2, 4)")
    return {}


if __name__ == "__main__":
    for name, result in _steps():
        print(json.dumps({"step": name, "found": result}), flush=True)
