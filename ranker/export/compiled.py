"""The exported files once more as packages compiled ahead of time (AOTInductor), beside their TorchScript.

A package is native code for this kind of machine and this version of PyTorch, with the parameters in it; it loads where
only torch is. The modules are traced by ``torch.export``, in which their operators take the forms of
:mod:`ranker.ops.padded`: work follows R × max L, so that a package is meant for a request at a time, as a server scores
them, though the number of requests is free like those of candidates and events.

What cannot be traced or compiled here, for want of a compiler or because a block's method decides by the data, is said
and left out; TorchScript does it all.
"""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.fx.experimental._config as symbolic  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package, aoti_load_package, cpp_builder
from torch.export import Dim, ExportedProgram

from features.progress import log
from ranker.export.inputs import Inputs
from ranker.export.parity import TOLERANCE
from ranker.export.restored import ExportError
from ranker.tables.served import with_served_tables

Compiling = Literal["off", "try", "require"]
Scoring = Callable[..., Tensor]

INDUCTOR: dict[str, Any] = {"cpp.enable_loop_tail_vec": False, "cpp.threads": 1}
"""How Inductor compiles. A loop's last steps, fewer than a vector has lanes, go one by one: as a vector, in PyTorch
2.13, a load that a mask guards (of a padded tensor, or of several put one after another) reads every lane that the mask
allows, those behind the loop's end too: past the end of its tensor, or, where that is empty as the history of a user
without events is, next to address 0. And loops have one thread, as suits a server; else they would have as many as this
process has now."""


SAME_OUTPUTS = """
import sys
import torch
import torch._inductor
package = torch._inductor.aoti_load_package(sys.argv[1])
for inputs, expected in torch.load(sys.argv[2]):
    torch.testing.assert_close(package(**inputs), expected, rtol=1e-4, atol=float(sys.argv[3]))
"""


@dataclass(frozen=True)
class Package:
    """A compiled file, or why there is none.

    Args:
        name: in the folder.
        order: names of the inputs in the order in which C++ gives them, those of dictionaries after a point.
        reason: why it was left out; None where it is there.
        seconds: that tracing and compiling took.
    """

    name: str
    order: tuple[str, ...]
    reason: str | None
    seconds: float

    def as_json(self) -> dict[str, object]:
        """For the manifest."""
        if self.reason is not None:
            return {"left_out_because": self.reason}
        return {"order": list(self.order), "seconds": round(self.seconds, 1)}


def compiled(module: nn.Module, samples: Sequence[Inputs], file: Path, how: Compiling) -> Package:
    """Compile a module on served or TorchRec tables for inputs of any sizes, into `file`.

    Args:
        samples: inputs of several sizes, first those that it is traced with; all are tried before it is compiled.
        how: "require" for an error where it cannot be done.

    Raises:
        ExportError: it cannot be done, and is required.
    """
    start = time.perf_counter()
    order = names_in_order(module, samples[0])
    reason = no_compiler()
    if reason is None:
        try:
            # else the graph, and then the code, would be of sizes from 2 on alone
            oblivious = symbolic.patch(backed_size_oblivious=True)  # pyright: ignore[reportAttributeAccessIssue]
            with warnings.catch_warnings(), torch.no_grad(), oblivious:
                warnings.simplefilter("ignore")
                traced = exported(with_served_tables(module.eval(), in_bytes=False), samples)
                aoti_compile_and_package(traced, package_path=str(file), inductor_configs=INDUCTOR)
                same_outputs(file, module, samples)
        except Exception as error:  # whatever the compiler stumbled over, TorchScript is there
            file.unlink(missing_ok=True)
            reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    seconds = time.perf_counter() - start
    if reason is None:
        log(f"compiled {file.name} in {seconds:.0f} s")
    elif how == "require":
        raise ExportError(f"--compiled require: {file.name} cannot be made: {reason}; leave it out by --compiled try")
    else:
        log(f"no {file.name}: {reason}")
    return Package(file.name, order, reason, seconds)


def exported(module: nn.Module, samples: Sequence[Inputs]) -> ExportedProgram:
    """A module's graph, with every first dimension free, tried on all samples.

    Raises:
        RuntimeError: the graph holds for some sizes alone.
    """
    given = {name: samples[0][name] for name in inspect.signature(module.forward).parameters}
    free = {name: _free(x) for name, x in given.items()}
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # a graph that cannot be traced is printed
        traced = torch.export.export(module, (), given, dynamic_shapes=free, strict=False)
    graph = traced.module()
    for sample in samples[1:]:
        try:
            graph(**sample)
        except AssertionError as error:
            raise RuntimeError(f"the traced graph holds for some sizes alone: {error}") from error
    return traced


def same_outputs(file: Path, module: nn.Module, samples: Sequence[Inputs]) -> None:
    """Compare a package's outputs, scores or the numbers of records, with the module's: in another process that imports
    torch alone, for wrong native code may end the process that it runs in.

    Raises:
        RuntimeError: they differ, or it did not get so far.
    """
    aside = file.with_suffix(".samples")
    try:
        torch.save([(_owned(sample), module(**sample)) for sample in samples], aside)
        command = [sys.executable, "-I", "-c", SAME_OUTPUTS, str(file), str(aside), str(TOLERANCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        aside.unlink(missing_ok=True)
    if done.returncode < 0:
        raise RuntimeError(f"the compiled code crashed (signal {-done.returncode})")
    if done.returncode > 0:
        raise RuntimeError(f"the compiled code failed: {[*done.stderr.strip().splitlines(), 'no message'][-2:][0]}")


def _owned(inputs: Inputs) -> Inputs:
    """Copies: batches of the loader's processes are views of one piece of memory, in which a file cannot keep them."""
    return {
        name: {key: part.clone() for key, part in x.items()} if isinstance(x, dict) else x.clone()
        for name, x in inputs.items()
    }


def load(file: Path) -> Scoring:
    """A package as a function of its inputs by name."""
    return cast(Scoring, aoti_load_package(str(file)))


def no_compiler() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    try:
        compiler = cpp_builder.get_cpp_compiler()
    except Exception as error:  # of a private type
        return f"{error}; install g++, or name a compiler by the environment's CXX"
    return None if shutil.which(compiler) else f"no C++ compiler ({compiler}): install g++, or name one by CXX"


def names_in_order(module: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Inputs as a package takes them one by one: as `forward` names them, those of dictionaries in their order."""
    order: list[str] = []
    for name in inspect.signature(module.forward).parameters:
        x = inputs[name]
        order += [f"{name}.{key}" for key in x] if isinstance(x, dict) else [name]
    return tuple(order)


def _free(x: Tensor | dict[str, Tensor]) -> object:
    if isinstance(x, dict):
        return {key: _free(inner) for key, inner in x.items()}
    return {0: Dim.AUTO}
