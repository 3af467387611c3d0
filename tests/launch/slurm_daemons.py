"""A Slurm cluster of two nodes on this machine: ``python -m tests.launch.slurm_daemons FOLDER``.

It says ``ready`` when both nodes are idle, then obeys lines of its input, each answered by ``done``: ``lose NODE``
kills a node's daemon with all that runs there, as when its power fails; ``return NODE`` starts the daemon again. When
the input ends, however the process at its other end ended, everything is killed: daemons and jobs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.free_ports import free_port

NODES = ("127.0.0.1", "127.0.0.2")
"""names that are addresses of the loopback: they need no entry in a hosts file"""
START_S = 60

CONFIG = """
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
# a requeued job waits until its first start's credentials have expired: 120 s by default
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=bf_interval=1,sched_interval=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# nodes have what is written here, whatever the machine has
SlurmdParameters=config_overrides
# a silent node is lost after 10 s, and back as soon as it speaks again
SlurmdTimeout=10
ReturnToService=2
KillWait=5
"""


class Daemons:
    """munged, slurmctld and the nodes' slurmd, with all their files in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, folder / "slurm.conf"
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start_all(self) -> None:
        """Write keys and config, and start everything."""
        key, socket = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        lines = [CONFIG.format(port=free_port(), folder=self.folder)]
        lines += [
            f"NodeName={node} NodeHostname={os.uname().nodename} NodeAddr=127.0.0.1 Port={free_port()} CPUs=1 "
            "RealMemory=16000\n"
            for node in NODES
        ]
        self.config.write_text("".join([*lines, "PartitionName=cpu Nodes=ALL Default=YES\n"]))
        (self.folder / "state").mkdir()
        self._start(
            *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket}"),
            *(f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed")),
        )
        _until(socket.exists, "munged's socket")
        self._start("slurmctld", "-D", "-f", str(self.config))
        for node in NODES:
            self.start_node(node)
        for node in NODES:
            self.wait_for(node)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        (self.folder / node).mkdir(exist_ok=True)
        self._start("slurmd", "-D", "-f", str(self.config), "-N", node, name=node)

    def wait_for(self, node: str) -> None:
        """Wait until a node takes jobs."""
        command = ["sinfo", "--noheader", "--nodes", node, "--format", "%T"]
        environment = os.environ | {"SLURM_CONF": str(self.config)}

        def idle() -> bool:
            asked = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            return asked.stdout.strip() in ("idle", "allocated", "mixed")

        _until(idle, f"node {node}")

    def lose(self, node: str) -> None:
        """Kill a node's daemon and what runs there."""
        self.running[node].kill()
        self.running[node].wait()
        _kill({"SLURM_CONF": str(self.config), "SLURMD_NODENAME": node})

    def kill_all(self) -> None:
        """Kill every daemon and every job."""
        for daemon in self.running.values():
            daemon.kill()
            daemon.wait()
        _kill({"SLURM_CONF": str(self.config)})

    def _start(self, *command: str, name: str | None = None) -> None:
        name = name or command[0]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )


def _kill(environment: Mapping[str, str]) -> None:
    """SIGKILL all processes that have these variables, their slurmstepd first: it would report their end."""
    wanted = {f"{name}={value}" for name, value in environment.items()}
    while found := {pid for pid in _processes() if wanted <= set(_read(pid, "environ").split("\0"))}:
        parents = {int(_read(pid, "stat").rpartition(")")[2].split()[1]) for pid in found if _read(pid, "stat")}
        for pid in [*(p for p in parents if _read(p, "comm").startswith("slurmstepd")), *found]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _read(pid: int, file: str) -> str:
    """A file of a process in /proc; nothing of one that is gone."""
    try:
        return Path(f"/proc/{pid}/{file}").read_text(errors="replace")
    except OSError:
        return ""


def _until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_S
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {START_S} s")
        time.sleep(0.1)


def main() -> None:
    """Start the cluster, obey, and end it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    daemons = Daemons(Path(sys.argv[1]))
    try:
        daemons.start_all()
        print("ready", flush=True)
        for line in sys.stdin:
            order, node = line.split()
            if order == "lose":
                daemons.lose(node)
            else:
                daemons.start_node(node)
                daemons.wait_for(node)
            print("done", flush=True)
    finally:
        daemons.kill_all()


if __name__ == "__main__":
    main()
