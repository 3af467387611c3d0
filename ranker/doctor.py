"""Do torch, TorchRec and FBGEMM belong together, do they run, and on what? And if not: the command that puts it right.

The three are built for one another; a mismatch fails late and unclearly. Two distributions, `fbgemm-gpu` (CUDA) and
`fbgemm-gpu-cpu`, own the one import name `fbgemm_gpu`, so that whichever was installed last wins.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from features.errors import UserError
from ranker.doctor_probe import Probe, probe_apart, probe_here

TORCH, TORCHREC, FBGEMM = "2.13.0", "1.8.0", "1.8.0"
"""The versions this project is made for, as pyproject.toml pins them."""
FBGEMM_FOR_TORCH = {"2.11": "1.6", "2.12": "1.7", "2.13": "1.8", "2.14": "1.9"}
"""The FBGEMM (and TorchRec) built for each torch."""
CPU_BUILD, CUDA_BUILD = "fbgemm-gpu-cpu", "fbgemm-gpu"

Lookup = Callable[[str], str | None]
Device = Literal["auto", "cpu", "cuda"]


class ToolchainError(UserError):
    """The installed libraries cannot run this program; the message names each fault and its remedy."""


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was found and, if it is wrong, the command that puts it right."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    remedy: str | None = None


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution; None if there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def diagnose(
    device: Device = "auto", lookup: Lookup = installed_version, probe: Callable[[], Probe] = probe_apart
) -> list[Check]:
    """Every check, versions first. `device` is what training is to run on; auto takes a GPU if there is one."""
    checks = [_python(), *_versions(lookup)]
    found = probe()
    return [*checks, *_operators(found, lookup, device), _machine()]


def ensure_healthy(
    device: Device = "auto", lookup: Lookup = installed_version, probe: Callable[[], Probe] = probe_here
) -> None:
    """Refuse to go on with libraries that do not fit, or do not run on `device`.

    Raises:
        ToolchainError: something is wrong.
    """
    ensure_versions(lookup)  # first: loading what is known to mismatch may end the process
    _refuse(_operators(probe(), lookup, device))


def ensure_versions(lookup: Lookup = installed_version) -> None:
    """The part of :func:`ensure_healthy` that imports none of the libraries, and so comes before their import.

    Raises:
        ToolchainError: a library is missing, or not the one for the others.
    """
    _refuse(_versions(lookup))


def _refuse(checks: Sequence[Check]) -> None:
    if failed := [check for check in checks if check.status == "fail"]:
        told = [f"{c.name}: {c.found}" + (f"\n    {c.remedy}" if c.remedy else "") for c in failed]
        raise ToolchainError("the installed libraries cannot run this program:\n  " + "\n  ".join(told))


def _pip(*arguments: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", *arguments])


def _reinstall(*pins: str) -> str:
    """--no-deps: TorchRec requires the CUDA build of FBGEMM by name and would bring it in beside the CPU one."""
    return _pip("install", "--force-reinstall", "--no-deps", *pins)


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} ({sys.executable})")


def _versions(lookup: Lookup) -> list[Check]:
    """Versions alone: needs no import, so that it works whatever is broken."""
    torch, torchrec, cpu, cuda = (lookup(name) for name in ("torch", "torchrec", CPU_BUILD, CUDA_BUILD))
    if torch is None:
        return [Check("torch", "fail", "not installed", _pip("install", f"torch=={TORCH}"))]
    build = _fitting_build(torch, cpu, cuda)
    return [_torch(torch), _torchrec(torchrec), _fbgemm(cpu, cuda, build), _pair(torch, torchrec, cpu or cuda, build)]


def _fitting_build(torch: str, cpu: str | None, cuda: str | None) -> str:
    """The FBGEMM distribution to install: the CPU one for a CPU torch or where it alone was chosen."""
    if "+cpu" in torch or (cpu is not None and cuda is None):
        return CPU_BUILD
    return CUDA_BUILD if cuda is not None or "+cu" in torch else CPU_BUILD


def _torch(torch: str) -> Check:
    if _minor(torch) not in FBGEMM_FOR_TORCH:
        known = ", ".join(f"{t} (FBGEMM {f})" for t, f in FBGEMM_FOR_TORCH.items())
        found = f"{torch}; this project knows FBGEMM for torch {known}"
        return Check("torch", "fail", found, _pip("install", f"torch=={TORCH}"))
    return Check("torch", "ok", torch)


def _torchrec(torchrec: str | None) -> Check:
    if torchrec is None:
        return Check("torchrec", "fail", "not installed", _reinstall(f"torchrec=={TORCHREC}"))
    return Check("torchrec", "ok", torchrec)


def _fbgemm(cpu: str | None, cuda: str | None, build: str) -> Check:
    wanted = _reinstall(f"{build}=={FBGEMM}")
    if cpu is not None and cuda is not None:
        found = f"both {CPU_BUILD} {cpu} and {CUDA_BUILD} {cuda} are installed; they overwrite each other's files"
        return Check("fbgemm", "fail", found, f"{_pip('uninstall', '-y', CPU_BUILD, CUDA_BUILD)} && {wanted}")
    if cpu is None and cuda is None:
        return Check("fbgemm", "fail", "not installed", wanted)
    if cuda is not None and build == CPU_BUILD:
        found = f"{CUDA_BUILD} {cuda} needs CUDA libraries, but torch is a CPU build"
        return Check("fbgemm", "fail", found, f"{_pip('uninstall', '-y', CUDA_BUILD)} && {wanted}")
    return Check("fbgemm", "ok", f"{CPU_BUILD} {cpu}" if cpu is not None else f"{CUDA_BUILD} {cuda}")


def _pair(torch: str, torchrec: str | None, fbgemm: str | None, build: str) -> Check:
    """Whether TorchRec and FBGEMM are those of this torch; the remedy leads back to the pinned versions."""
    wanted = FBGEMM_FOR_TORCH.get(_minor(torch))
    wrong = [
        f"{name} {version}"
        for name, version in (("FBGEMM", fbgemm), ("TorchRec", torchrec))
        if version is not None and wanted is not None and _minor(version) != wanted
    ]
    if wanted is None or not wrong:
        fits = f"torch {_minor(torch)} goes with FBGEMM and TorchRec {wanted}" if wanted else "unknown for this torch"
        return Check("pairing", "ok" if wanted else "warn", fits)
    remedy = _reinstall(f"{build}=={FBGEMM}", f"torchrec=={TORCHREC}")
    if _minor(torch) != _minor(TORCH):
        remedy = f"{_pip('install', f'torch=={TORCH}')} && {remedy}"
    needs = " and ".join(wrong)
    return Check("pairing", "fail", f"torch {torch} needs FBGEMM and TorchRec {wanted}.*, but found {needs}", remedy)


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _operators(probe: Probe, lookup: Lookup, device: Device) -> list[Check]:
    """What the probe told: that the libraries load and train, the devices, and the means to talk between ranks."""
    checks: list[Check] = []
    build = _fitting_build(lookup("torch") or "", lookup(CPU_BUILD), lookup(CUDA_BUILD))
    if probe.failed is None:
        step = probe.passed["fbgemm"]
        checks.append(Check("operators", "ok", f"a fused embedding trains on {step['device']}"))
    else:
        pins = {"torch": [], "fbgemm": [f"{build}=={FBGEMM}"]}.get(probe.failed, [f"torchrec=={TORCHREC}"])
        remedy = _reinstall(*pins) if pins else _pip("install", "--force-reinstall", f"torch=={TORCH}")
        checks.append(Check("operators", "fail", f"{probe.failed} does not run: {probe.error}", remedy))
    if (torch := probe.passed.get("torch")) is None:
        return checks
    gpus = [f"{name} ({memory / 2**30:.0f} GiB)" for name, memory in torch["devices"]]
    variant = probe.passed.get("fbgemm", {}).get("variant")
    to_cuda = f"{_pip('uninstall', '-y', CPU_BUILD)} && {_reinstall(f'{CUDA_BUILD}=={FBGEMM}')}"
    if not gpus:
        cuda = f"torch is built for CUDA {torch['cuda']}" if torch["cuda"] else "torch is a CPU build"
        status, remedy = ("fail", "--set training.device=cpu") if device == "cuda" else ("ok", None)
        checks.append(Check("gpus", status, f"none ({cuda})", remedy))
    elif variant == "cpu" and device != "cpu":
        found = f"{len(gpus)}: {', '.join(gpus)}; but FBGEMM is the CPU build, whose tables cannot live on them"
        checks.append(Check("gpus", "fail", found, f"{to_cuda}   (or train with --set training.device=cpu)"))
    else:
        checks.append(Check("gpus", "ok", f"{len(gpus)}: {', '.join(gpus)}"))
    on_gpu = bool(gpus) and device != "cpu"
    needed = "nccl" if on_gpu else "gloo"
    available = [name for name in ("gloo", "nccl") if torch[name]]
    found = ", ".join(available) or "none"
    if needed in available:
        return [*checks, Check("collectives", "ok", found)]
    return [*checks, Check("collectives", "fail", f"{found}; training in many processes needs {needed}", None)]


def _machine() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    return Check("machine", "ok", f"{cores} cores, {memory / 2**30:.0f} GiB of memory, {platform.platform()}")
