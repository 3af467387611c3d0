"""What Slurm says of a job, as TorchX has it. (Jobs on a real cluster: `tests/launch/test_slurm.py`.)"""

from __future__ import annotations

import doctest

import pytest
from torchx.specs import AppState

from ranker.compare import slurm


def test_examples():
    assert doctest.testmod(slurm).failed == 0


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("PENDING", AppState.PENDING),
        ("CONFIGURING", AppState.RUNNING),
        ("COMPLETING", AppState.RUNNING),
        ("COMPLETED", AppState.SUCCEEDED),
        ("NODE_FAIL", AppState.FAILED),
        ("TIMEOUT", AppState.FAILED),
        ("CANCELLED", AppState.CANCELLED),
    ],
)
def test_a_jobs_state_is_its_first_machines(state: str, expected: AppState):
    shown = (
        f"JobId=3 HetJobId=3 HetJobOffset=0 JobName=train-0 Reason=a b JobState={state} Comment=JobState=X\n"
        "JobId=4 HetJobId=3 HetJobOffset=1 JobName=train-1 UserId=u(1) JobState=RUNNING Reason=None\n"
    )
    found = slurm.described("3", shown)
    assert found.state == expected
    assert [(role.name, role.num_replicas) for role in found.roles] == [("train", 2)]
    assert [replica.state for replica in found.roles_statuses[0].replicas] == [expected, AppState.RUNNING]
