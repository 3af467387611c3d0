"""The C++ client, built against the installed torch, and FBGEMM's libraries beside it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
WANTED = ("cmake", "g++", "make")
# the libraries with the operators that exports call; what they need besides they find beside them
OPERATORS = ("fbgemm_gpu_py.so",)


def why_not() -> str | None:
    """Why the client cannot be built here; None where it can."""
    if sys.platform != "linux":
        return f"the client's build is for Linux, not {sys.platform}"
    missing = [program for program in WANTED if shutil.which(program) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def build(folder: Path) -> Path:
    """Configure and compile into `folder`; the program."""
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_COMPILER": "g++",
        "TORCH_ROOT": str(Path(torch.__file__).parent),
    }
    configure = ["cmake", "-S", str(SOURCES), "-B", str(folder), "-G", "Unix Makefiles"]
    configure += [f"-D{name}={value}" for name, value in settings.items()]
    for command in (configure, ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}")
    return folder / "ranker_client"


def operator_options(libraries: Sequence[str] = OPERATORS) -> list[str]:
    """The client's options that load FBGEMM's operators from the installed wheel."""
    package = importlib.util.find_spec("fbgemm_gpu")
    assert package is not None
    assert package.submodule_search_locations is not None
    folder = Path(package.submodule_search_locations[0])
    return [option for name in libraries for option in ("--fbgemm", str(folder / name))]
