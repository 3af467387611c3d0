"""Waiting for the threads of libraries before what they use goes."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ranker.native_threads import wait_until_idle


def work(go_on: Callable[[], bool], done: list[bool]) -> None:
    """Compute without Python's lock, and tell when it was done."""
    while go_on():
        hashlib.pbkdf2_hmac("sha256", b"key", b"salt", 100_000)
    done.append(True)


def test_waits_for_a_thread_that_works():
    """It comes back once the other thread is through, which by then has told so."""
    done: list[bool] = []
    end = time.monotonic() + 0.5
    thread = threading.Thread(target=work, args=(lambda: time.monotonic() < end, done))
    thread.start()
    assert wait_until_idle(60.0)
    assert done
    thread.join()


def test_sleeping_threads_do_not_hold_it_up():
    """A thread that waits for something else is none to wait for."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    assert wait_until_idle(60.0)
    assert thread.is_alive()
    stop.set()
    thread.join()


def test_gives_up():
    """A thread that goes on working is left alone after the timeout."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(lambda: not stop.is_set(), []))
    thread.start()
    assert not wait_until_idle(0.3)
    stop.set()
    thread.join()


def test_names_of_threads_are_any_bytes():
    """One that is cut within a character, or has brackets, is read past."""
    named, stop = threading.Event(), threading.Event()

    def run() -> None:
        Path("/proc/thread-self/comm").write_bytes(b"a) R b\xc3")
        named.set()
        stop.wait()

    thread = threading.Thread(target=run)
    thread.start()
    assert named.wait(60.0)
    assert wait_until_idle(60.0)
    stop.set()
    thread.join()
