"""The doctor names every mismatch of torch, TorchRec and FBGEMM, and the command that puts it right."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from ranker import doctor_probe
from ranker.doctor import (
    FBGEMM,
    FBGEMM_FOR_TORCH,
    TORCH,
    TORCHREC,
    Check,
    ToolchainError,
    diagnose,
    ensure_healthy,
    ensure_versions,
)
from ranker.doctor_probe import Probe, probe_apart, probe_here

GOOD = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}
ON_CPU = Probe(
    {
        "torch": {"cuda": None, "devices": [], "gloo": True, "nccl": False},
        "fbgemm": {"device": "cpu", "variant": "cpu"},
        "torchrec": {},
    }
)


def on_gpu(variant: str, nccl: bool = True) -> Probe:
    torch = {"cuda": "13.0", "devices": [["H100", 80 * 2**30]], "gloo": True, "nccl": nccl}
    return Probe({"torch": torch, "fbgemm": {"device": "cuda", "variant": variant}, "torchrec": {}})


def faults(versions: dict[str, str], probe: Probe = ON_CPU, device: str = "auto") -> dict[str, Check]:
    checks = diagnose(device, versions.get, lambda: probe)  # type: ignore[arg-type]
    return {check.name: check for check in checks if check.status == "fail"}


def test_a_sound_machine_has_no_fault():
    assert faults(GOOD) == {}
    ensure_healthy("auto", GOOD.get, lambda: ON_CPU)


def test_pins_are_those_of_the_project():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert f"torch=={TORCH}" in project["dependencies"]
    assert f"fbgemm-gpu-cpu=={FBGEMM}" in extras["cpu"]
    assert {f"fbgemm-gpu=={FBGEMM}", f"torchrec=={TORCHREC}"} <= set(extras["cuda"])
    assert FBGEMM_FOR_TORCH[TORCH.rpartition(".")[0]] == FBGEMM.rpartition(".")[0]


@pytest.mark.parametrize(
    ("change", "check", "found", "remedy"),
    [
        ({"torch": None}, "torch", "not installed", "pip install torch==2.13.0"),
        ({"torch": "2.9.1"}, "torch", "2.9.1; this project knows", "pip install torch==2.13.0"),
        ({"torchrec": None}, "torchrec", "not installed", "--no-deps torchrec==1.8.0"),
        ({"fbgemm-gpu-cpu": None}, "fbgemm", "not installed", "--no-deps fbgemm-gpu-cpu==1.8.0"),
        (
            {"fbgemm-gpu": "1.8.0"},
            "fbgemm",
            "both fbgemm-gpu-cpu 1.8.0 and fbgemm-gpu 1.8.0",
            "pip uninstall -y fbgemm-gpu-cpu fbgemm-gpu &&",
        ),
        (
            {"fbgemm-gpu-cpu": None, "fbgemm-gpu": "1.8.0"},
            "fbgemm",
            "fbgemm-gpu 1.8.0 needs CUDA libraries, but torch is a CPU build",
            "--no-deps fbgemm-gpu-cpu==1.8.0",
        ),
        (
            {"fbgemm-gpu-cpu": "1.7.0"},
            "pairing",
            "torch 2.13.0+cpu needs FBGEMM and TorchRec 1.8.*, but found FBGEMM 1.7.0",
            "--no-deps fbgemm-gpu-cpu==1.8.0 torchrec==1.8.0",
        ),
        ({"torchrec": "1.6.0"}, "pairing", "found TorchRec 1.6.0", "torchrec==1.8.0"),
        ({"torch": "2.12.0+cpu"}, "pairing", "FBGEMM and TorchRec 1.7.*", "pip install torch==2.13.0 && "),
    ],
)
def test_wrong_versions(change: dict[str, str | None], check: str, found: str, remedy: str):
    versions = {name: version for name, version in {**GOOD, **change}.items() if version is not None}
    fault = faults(versions)[check]
    assert found in fault.found
    assert fault.remedy is not None
    assert remedy in fault.remedy
    assert sys.executable in fault.remedy
    with pytest.raises(ToolchainError) as caught:
        ensure_versions(versions.get)
    assert found in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("torch", FBGEMM_FOR_TORCH)
def test_each_torch_has_its_fbgemm(torch: str):
    fitting = f"{FBGEMM_FOR_TORCH[torch]}.0"
    assert faults({"torch": f"{torch}.1", "torchrec": fitting, "fbgemm-gpu-cpu": fitting}) == {}


def test_known_mismatch_is_not_loaded():
    """Loading libraries that do not fit may end the process, so versions come first."""

    def probe() -> Probe:
        raise AssertionError("loaded")

    with pytest.raises(ToolchainError, match="pairing"):
        ensure_healthy("auto", {**GOOD, "fbgemm-gpu-cpu": "1.7.0"}.get, probe)


@pytest.mark.parametrize(
    ("step", "remedy"),
    [("torch", "torch==2.13.0"), ("fbgemm", "fbgemm-gpu-cpu==1.8.0"), ("torchrec", "torchrec==1.8.0")],
)
def test_library_that_does_not_load(step: str, remedy: str):
    steps = list(ON_CPU.passed.items())
    passed = dict(steps[: [name for name, _ in steps].index(step)])
    fault = faults(GOOD, Probe(passed, step, "OSError: undefined symbol"))["operators"]
    assert fault.found == f"{step} does not run: OSError: undefined symbol"
    assert remedy in (fault.remedy or "")


def test_cpu_fbgemm_beside_a_gpu():
    fault = faults({**GOOD, "torch": "2.13.0"}, on_gpu("cpu"))["gpus"]
    assert "FBGEMM is the CPU build" in fault.found
    assert "fbgemm-gpu==1.8.0" in (fault.remedy or "")
    assert faults({**GOOD, "torch": "2.13.0"}, on_gpu("cpu"), device="cpu") == {}
    cuda = {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"}
    assert faults(cuda, on_gpu("cuda")) == {}
    assert "nccl" in faults(cuda, on_gpu("cuda", nccl=False))["collectives"].found


def test_gpu_asked_for_where_there_is_none():
    assert faults(GOOD, device="cuda")["gpus"].remedy == "--set training.device=cpu"


def test_this_environment_trains(monkeypatch: pytest.MonkeyPatch):
    import torch

    state = torch.random.get_rng_state()
    probe = probe_here()
    assert probe.failed is None, probe.error
    assert list(probe.passed) == list(doctor_probe.STEPS)
    assert torch.equal(state, torch.random.get_rng_state()), "the probe must not move the seed of a run"


@pytest.mark.parametrize(
    ("body", "failed", "error"),
    [
        ("raise OSError('undefined symbol')", "fbgemm", "OSError: undefined symbol"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "fbgemm", "signal 11"),
    ],
)
def test_a_crash_is_survived_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, failed: str, error: str
):
    """A stand-in for a broken FBGEMM, first on the path."""
    (tmp_path / "fbgemm_gpu").mkdir()
    (tmp_path / "fbgemm_gpu" / "__init__.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probe = probe_apart()
    assert probe.failed == failed
    assert error in probe.error
