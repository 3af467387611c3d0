r"""TorchX components: the commands of `ranker` on many processes and machines, on any of TorchX's schedulers.

    torchx run -s local_cwd launch/components.py:train --config CONFIG --out RUN --nproc 2
    torchx run -s slurm -cfg partition=gpu launch/components.py:train --config CONFIG --out RUN \
        --nnodes 2 --nproc 8 --gpu 8

What follows ``--`` goes to the command itself: ``-- --set training.epochs=3 --resume``. (A list option would not do:
TorchX splits lists at commas, which values may hold.) `config`, `out` and the dataset must be seen by every machine:
on Slurm by a shared disk, on Kubernetes by `mounts`.

What belongs to a cluster and not to a job (partition, time limit, queue, image) is a setting of TorchX's scheduler:
`-cfg`, ``.torchxconfig`` in the folder `torchx` is called from, or a file of ``launch/profiles/`` named by the
environment variable TORCHXCONFIG.
"""

# ruff: noqa: UP006, UP035, UP045 - TorchX reads the source of the annotations, in the older form only
from typing import Dict, List, NamedTuple, Optional

import torchx.components.dist as dist
import torchx.components.utils as utils
import torchx.specs as specs

# For torchrun, which dist.ddp says nothing to. By default its processes meet in a store that outlives them: one that is
# started again can read an address that a dead one left there, and wait for it in vain.
RESTARTED = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class Size(NamedTuple):
    """Machines, processes on each, and what each machine has."""

    nnodes: int
    nproc: int
    cpu: int
    gpu: int
    memory_mb: int


class Place(NamedTuple):
    """What a job finds around it, and how often it may come back."""

    image: str
    env: Optional[Dict[str, str]]
    mounts: Optional[List[str]]
    max_retries: int


def train(
    *args: str,
    config: str,
    out: str,
    nnodes: int = 1,
    nproc: int = 1,
    cpu: int = 2,
    gpu: int = 0,
    memory_mb: int = 8_192,
    image: str = "",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    rdzv_port: int = 29_500,
    max_retries: int = 0,
    max_restarts: int = 0,
) -> specs.AppDef:
    """Train a ranker; with restarts or retries it goes on from its last checkpoint.

    Args:
        args: arguments of `ranker.train`, as --set KEY=VALUE or --resume
        config: YAML file of the run
        out: run folder to make
        nnodes: machines
        nproc: processes on each machine; one for each of its GPUs
        cpu: cores of each machine
        gpu: GPUs of each machine
        memory_mb: memory of each machine, MB
        image: container image, where the scheduler takes one
        env: environment variables, as A=1,B=2
        mounts: folders for a container, as type=volume,src=CLAIM,dst=/shared (or type=bind,src=/host/folder,dst=…)
        rdzv_port: on the first machine, where the machines find one another; where there is one, any free port is taken
        max_retries: how often the scheduler may start the job again when it has failed or a machine is lost
        max_restarts: how often the processes are started again on the same machines when one of them dies
    """
    again = ["--resume"] if max_retries or max_restarts else []
    arguments = [config, "--out", out, *again, *args]
    if max_restarts:
        env = {**RESTARTED, "PET_MAX_RESTARTS": str(max_restarts), **(env or {})}
    size = Size(nnodes, nproc, cpu, gpu, memory_mb)
    return _ddp("train", arguments, size, Place(image, env, mounts, max_retries), rdzv_port)


def evaluate(
    *args: str,
    run: str,
    split: str = "test",
    nnodes: int = 1,
    nproc: int = 1,
    cpu: int = 2,
    gpu: int = 0,
    memory_mb: int = 8_192,
    image: str = "",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    rdzv_port: int = 29_500,
    max_retries: int = 0,
) -> specs.AppDef:
    """Measure a run; metrics are merged over the processes exactly.

    Args:
        args: further arguments of `ranker.evaluate`
        run: run folder
        split: split of the dataset
        nnodes: machines
        nproc: processes on each machine; one for each of its GPUs
        cpu: cores of each machine
        gpu: GPUs of each machine
        memory_mb: memory of each machine, MB
        image: container image, where the scheduler takes one
        env: environment variables, as A=1,B=2
        mounts: folders for a container, as type=volume,src=CLAIM,dst=/shared (or type=bind,src=/host/folder,dst=…)
        rdzv_port: on the first machine, where the machines find one another; where there is one, any free port is taken
        max_retries: how often the scheduler may start a failed job again
    """
    size = Size(nnodes, nproc, cpu, gpu, memory_mb)
    return _ddp("evaluate", [run, "--split", split, *args], size, Place(image, env, mounts, max_retries), rdzv_port)


def memory(
    *args: str,
    run: str,
    store: str,
    nnodes: int = 1,
    nproc: int = 1,
    cpu: int = 2,
    gpu: int = 0,
    memory_mb: int = 8_192,
    image: str = "",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    rdzv_port: int = 29_500,
    max_retries: int = 0,
    max_restarts: int = 0,
) -> specs.AppDef:
    """Make the memories of all users of a run's dataset; with restarts or retries, of those not yet made.

    Args:
        args: further arguments of `ranker.memory.build`, as --set codes.most=50 or --refresh --dataset NEWER
        run: run folder
        store: where they go, as redis://HOST:PORT/DB?namespace=NAME, or lmdb:PATH with one machine
        nnodes: machines
        nproc: processes on each machine; one for each of its GPUs
        cpu: cores of each machine
        gpu: GPUs of each machine
        memory_mb: memory of each machine, MB
        image: container image, where the scheduler takes one
        env: environment variables, as A=1,B=2
        mounts: folders for a container, as type=volume,src=CLAIM,dst=/shared (or type=bind,src=/host/folder,dst=…)
        rdzv_port: on the first machine, where the machines find one another; where there is one, any free port is taken
        max_retries: how often the scheduler may start the job again when it has failed or a machine is lost
        max_restarts: how often the processes are started again on the same machines when one of them dies
    """
    if nnodes > 1 and (store.startswith("lmdb:") or ":" not in store):
        raise ValueError(
            f"--store {store}: LMDB is of one machine, and --nnodes is {nnodes}; use Redis, or one machine"
        )
    if max_restarts:
        env = {**RESTARTED, "PET_MAX_RESTARTS": str(max_restarts), **(env or {})}
    size, place = Size(nnodes, nproc, cpu, gpu, memory_mb), Place(image, env, mounts, max_retries)
    return _ddp("memory.build", [run, "--store", store, *args], size, place, rdzv_port)


def compare(
    *args: str,
    config: str,
    out: str,
    parallel: int = 1,
    cpu: int = 2,
    memory_mb: int = 16_384,
    image: str = "",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Compare methods on one machine, or from it: with ``-- --scheduler slurm`` every run is a job of its own.

    A job that is started again goes on where it was.

    Args:
        args: further arguments of `ranker compare`, as --methods din,uxsid --lengths 50,1000
        config: YAML file of the comparison
        out: folder of the comparison
        parallel: runs at a time
        cpu: cores of the machine
        memory_mb: its memory, MB
        image: container image, where the scheduler takes one
        env: environment variables, as A=1,B=2
        mounts: folders for a container, as type=volume,src=CLAIM,dst=/shared (or type=bind,src=/host/folder,dst=…)
        max_retries: how often the scheduler may start a failed job again
    """
    arguments = [config, "--out", out, "--parallel", str(parallel), *args]
    return _one_process("compare", arguments, cpu, memory_mb, Place(image, env, mounts, max_retries))


def export(
    *args: str,
    run: str,
    out: str,
    cpu: int = 2,
    memory_mb: int = 8_192,
    image: str = "",
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Write a run's ranker as TorchScript, where its tables fit into one machine's memory.

    Args:
        args: further arguments of `ranker export`
        run: run folder
        out: folder to make
        cpu: cores of the machine
        memory_mb: its memory, MB
        image: container image, where the scheduler takes one
        env: environment variables, as A=1,B=2
        mounts: folders for a container, as type=volume,src=CLAIM,dst=/shared (or type=bind,src=/host/folder,dst=…)
        max_retries: how often the scheduler may start a failed job again
    """
    arguments = [run, "--out", out, *args]
    return _one_process("export", arguments, cpu, memory_mb, Place(image, env, mounts, max_retries))


def _ddp(command: str, arguments: list[str], size: Size, place: Place, rdzv_port: int) -> specs.AppDef:
    """`ranker.COMMAND` in nnodes · nproc processes that find one another."""
    return dist.ddp(
        *arguments,
        m=f"ranker.{command}",
        name=f"ranker-{command.split('.')[0]}",
        j=f"{size.nnodes}x{size.nproc}",
        cpu=size.cpu,
        gpu=size.gpu,
        memMB=size.memory_mb,
        image=place.image,
        env=place.env,
        mounts=place.mounts,
        max_retries=place.max_retries,
        rdzv_port=rdzv_port,
    )


def _one_process(command: str, arguments: list[str], cpu: int, memory_mb: int, place: Place) -> specs.AppDef:
    """`ranker COMMAND …` on one machine."""
    name = f"ranker-{command}"
    app = utils.python(command, *arguments, m="ranker.cli", image=place.image, name=name, cpu=cpu, memMB=memory_mb)
    for role in app.roles:
        role.env.update(place.env or {})
        role.mounts = specs.parse_mounts(place.mounts) if place.mounts else []
        role.max_retries = place.max_retries
    return app
