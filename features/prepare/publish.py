"""A dataset appears whole or not at all: everything is made in a sibling folder, synced, and renamed once.

The folder ``.NAME.partial-PID`` is locked while its process lives. One that is left by a killed process has no lock:
the next preparation of the same output removes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from features.prepare.errors import PrepareError


@contextmanager
def staging(out: Path) -> Generator[tuple[Path, Path]]:
    """Yield (folder of the dataset to be, folder for scratch files); on success the former becomes `out`.

    Raises:
        PrepareError: `out` exists, is being prepared by another process, or cannot be written.
    """
    out = out.absolute()
    if out.exists() or out.is_symlink():
        raise PrepareError(f"{out}: exists; choose another output folder, or remove it first")
    folder = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        folder.mkdir()
        lock = _lock(folder)
        try:
            dataset, work = folder / "dataset", folder / "work"
            dataset.mkdir()
            work.mkdir()
            yield dataset, work
            _sync(dataset)
            if out.exists():
                raise PrepareError(f"{out}: has appeared meanwhile; choose another output folder")
            dataset.rename(out)
            sync_path(out.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)
    except OSError as error:
        raise PrepareError(
            f"{error.filename or out}: cannot write ({error.strerror or error}); "
            "free space or correct permissions, then run again"
        ) from error


def _remove_stale(out: Path) -> None:
    for folder in out.parent.glob(f".{out.name}.partial-*"):
        lock = _lock(folder)
        if lock is None:
            raise PrepareError(f"{out}: another process is preparing it ({folder.name}); wait for it, or stop it")
        shutil.rmtree(folder)
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock, None when a living process has it."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)


def sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
