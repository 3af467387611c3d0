"""Waiting for the threads of libraries before what they use goes."""

from __future__ import annotations

import hashlib
import threading
import time

from ranker.native_threads import wait_until_idle


def work(seconds: float, done: list[float]) -> None:
    """Compute without Python's lock, and tell when it was done."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        hashlib.pbkdf2_hmac("sha256", b"key", b"salt", 300_000)
    done.append(time.monotonic())


def test_waits_for_a_thread_that_works():
    """It comes back once the other thread is through, which by then has told so."""
    done: list[float] = []
    thread = threading.Thread(target=work, args=(0.5, done))
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
    done: list[float] = []
    thread = threading.Thread(target=work, args=(2.0, done))
    thread.start()
    assert not wait_until_idle(0.3)
    assert not done
    thread.join()
