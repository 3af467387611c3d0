"""TorchX's Slurm scheduler on clusters without accounting too.

TorchX asks `sacct` how a job stands, which then fails. `scontrol` knows it as long as Slurm remembers the job, which is
MinJobAge after its end, five minutes by default.
"""

from __future__ import annotations

import re
import subprocess
import time
from functools import cached_property

from torchx.schedulers.api import DescribeAppResponse
from torchx.schedulers.slurm_scheduler import SLURM_STATES, SlurmScheduler
from torchx.specs import AppState, ReplicaStatus, Role, RoleStatus

from features.errors import UserError

PATIENCE_S = 600
"""how long Slurm's controller may be away"""

_PART = re.compile(r"^JobId=.* JobName=(\S+)-(\d+) .*?\bJobState=(\w+)", re.MULTILINE)


class SlurmWithoutAccounting(SlurmScheduler):
    """Describes a job by `sacct` where that answers, else by `scontrol`."""

    @cached_property
    def accounting(self) -> bool:
        """Whether `sacct` answers."""
        asked = subprocess.run(["sacct", "--noheader", "--jobs", "1"], capture_output=True, check=False)
        return asked.returncode == 0

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """A job's state and its machines'; None for one that Slurm does not know (any longer)."""
        if self.accounting:
            return super().describe(app_id)
        command = ["scontrol", "show", "job", "--oneliner", app_id]
        deadline = time.monotonic() + PATIENCE_S
        while True:
            shown = subprocess.run(command, capture_output=True, text=True, check=False)
            if shown.returncode == 0 and _PART.search(shown.stdout):
                return described(app_id, shown.stdout)
            if shown.returncode == 0 or "Invalid job id" in shown.stderr:
                return None
            if time.monotonic() > deadline:
                raise UserError(f"Slurm does not say how job {app_id} stands: {shown.stderr.strip()}")
            time.sleep(5)  # its controller may be starting again; the job goes on meanwhile


def create_scheduler(session_name: str, **_: object) -> SlurmWithoutAccounting:
    """As TorchX makes its schedulers, with parameters for any of them."""
    return SlurmWithoutAccounting(session_name)


def described(app_id: str, shown: str) -> DescribeAppResponse:
    """What `scontrol show job --oneliner` says of a job: a line for each machine.

    The job's state is its first machine's, where its script runs.

    >>> said = "JobId=7 JobName=train-0 JobState=COMPLETING Reason=None\\nJobId=8 JobName=train-1 JobState=RUNNING\\n"
    >>> found = described("7", said)
    >>> found.state.name, [replica.id for replica in found.roles_statuses[0].replicas]
    ('RUNNING', [0, 1])
    """
    roles: dict[str, RoleStatus] = {}
    states: list[AppState] = []
    for name, replica, state in _PART.findall(shown):
        # a state of the way there or back, as CONFIGURING or COMPLETING, is neither waiting nor an end
        states.append(SLURM_STATES.get(state, AppState.RUNNING))
        role = roles.setdefault(name, RoleStatus(name, []))
        role.replicas.append(ReplicaStatus(id=int(replica), state=states[-1], role=name, hostname=""))
    return DescribeAppResponse(
        app_id=app_id,
        roles=[Role(name=name, image="", num_replicas=len(status.replicas)) for name, status in roles.items()],
        roles_statuses=list(roles.values()),
        state=states[0],
        msg=states[0].name,
    )
