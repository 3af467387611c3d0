"""A folder appears whole or not at all, be it a dataset or a codebook: all is made in a sibling, synced, renamed once.

The folder ``.NAME.partial-PID`` is locked while its process lives. One that is left by a killed process has no lock:
the next process with the same output removes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from features.errors import UserError


class PublishError(UserError):
    """The output exists, is being written by another process, or cannot be written."""


@contextmanager
def staging(out: Path) -> Generator[tuple[Path, Path]]:
    """Yield (the folder to be, folder for scratch files); on success the former becomes `out`.

    Raises:
        PublishError: `out` exists, is being written by another process, or cannot be written.
    """
    out = out.absolute()
    if out.exists() or out.is_symlink():
        raise PublishError(f"{out}: exists; choose another output folder, or remove it first")
    folder = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        folder.mkdir()
        lock = _lock(folder)
        try:
            new, work = folder / "new", folder / "work"
            new.mkdir()
            work.mkdir()
            yield new, work
            _sync(new)
            if out.exists():
                raise PublishError(f"{out}: has appeared meanwhile; choose another output folder")
            new.rename(out)
            sync_path(out.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)
    except OSError as error:
        raise PublishError(
            f"{error.filename or out}: cannot write ({error.strerror or error}); "
            "free space or correct permissions, then run again"
        ) from error


def _remove_stale(out: Path) -> None:
    for folder in out.parent.glob(f".{out.name}.partial-*"):
        lock = _lock(folder)
        if lock is None:
            raise PublishError(f"{out}: another process is writing it ({folder.name}); wait for it, or stop it")
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
    """Have a file or folder on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
