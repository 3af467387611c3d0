"""Native threads of libraries, such as gloo's and Arrow's, at the end of what they work for.

A thread that has brought a collective to its end wakes who waits for it, and drops the tensors a moment later. Those
that Python knows take its lock. Where the process ends, or the process group is destroyed, within that moment, which is
long on a busy machine, the thread finds an interpreter that is ending (SIGABRT, "terminate called without an active
exception"), or holds up the lock's owner, who waits for the thread.
"""

import os
import time

_POLLS = 3
"""so often in a row all must be seen idle: one may wait for Python's lock just when it is looked at"""


def wait_until_idle(timeout_s: float = 5.0) -> bool:
    """Let all other threads of the process go on, without Python's lock, until they sleep.

    A thread that sleeps for a peer's part of a collective is not waited for: what is still under way is the caller's to
    wait for. Threads that spin while they have nothing to do (`OMP_WAIT_POLICY=active`) take the whole of `timeout_s`;
    where the system does not tell threads' states (`/proc`), it takes a millisecond each of the polls.

    Returns:
        False where some still ran after `timeout_s`.
    """
    end, idle = time.monotonic() + timeout_s, 0
    while idle < _POLLS:
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
        idle = 0 if _any_runs() else idle + 1
    return True


def _any_runs() -> bool:
    """Whether a thread of this process other than this one is running, ready to, or in the midst of a disk's answer."""
    try:
        own = os.path.basename(os.readlink("/proc/thread-self"))
        tasks = os.listdir("/proc/self/task")
    except OSError:
        return False
    return any(_state(task) in (b"R", b"D") for task in tasks if task != own)


def _state(task: str) -> bytes:
    try:
        with open(f"/proc/self/task/{task}/stat", "rb") as stat:  # bytes: a name may end amid a character
            return stat.read().rpartition(b") ")[2][:1]  # and hold brackets
    except OSError:  # it has ended
        return b""
