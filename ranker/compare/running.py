"""Train and evaluate the cells that are not finished, several at a time; a bad one is told and the others go on."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from features.progress import Progress, console, log
from features.schema import Split
from ranker.compare.folder import CompareFolder
from ranker.compare.launching import Launcher
from ranker.compare.plan import Cell

_TAIL = 12
"""lines of its log that are shown of a bad cell"""


class Failure(NamedTuple):
    """A cell that did not finish; log: the last lines of its log."""

    cell: str
    step: str
    log: str


def run_cells(
    cells: Sequence[Cell], folder: CompareFolder, split: Split, launcher: Launcher, parallel: int
) -> list[Failure]:
    """Finish every cell; what could not be. Interrupted, it ends the runs; they go on from checkpoints the next time.

    Raises:
        KeyboardInterrupt: interrupted, or asked to end (SIGTERM).
    """
    todo = [cell for cell in cells if folder.state(cell, split) != "finished"]
    done = len(cells) - len(todo)
    if done:
        log(f"{done} of {len(cells)} cells are finished")
    failures: list[Failure] = []
    pool = ThreadPoolExecutor(parallel)
    with Progress("compare", len(cells), console.is_terminal, done) as progress, ended_by_sigterm():
        started = {pool.submit(_run, cell, folder, split, launcher): cell for cell in todo}
        try:
            for future in as_completed(started):
                cell, (failure, seconds) = started[future], future.result()
                done += 1
                if failure is None:
                    log(f"[{done}/{len(cells)}] {cell.name} ({seconds:.0f} s)")
                else:
                    failures.append(failure)
                    lines = "\n".join(f"    {line}" for line in failure.log.splitlines())
                    log(f"[{done}/{len(cells)}] {cell.name}: {failure.step} failed ({folder.log(cell)}):\n{lines}")
                progress.advance()
        except BaseException:
            for future in started:
                future.cancel()
            launcher.stop()
            raise
        finally:
            pool.shutdown()
    return failures


def _run(cell: Cell, folder: CompareFolder, split: Split, launcher: Launcher) -> tuple[Failure | None, float]:
    """One cell, what of it has not been done; and the seconds it took."""
    began = time.monotonic()
    run, output = folder.run(cell), folder.log(cell)
    steps: list[tuple[str, Callable[[], int]]] = [("evaluation", lambda: launcher.evaluate(run, split, output))]
    if (state := folder.state(cell, split)) != "trained":
        train = lambda: launcher.train(folder.config(cell), run, state == "begun", output)  # noqa: E731
        steps.insert(0, ("training", train))
    failure, name = None, "start"
    try:
        folder.record(cell)
        for name, step in steps:
            if code := step():
                failure = Failure(cell.name, name, f"{tail(output)}\n{_ended_by(code)}".strip())
                break
    except Exception as error:  # as a scheduler's refusal of the job: it is this cell's
        failure = Failure(cell.name, name, f"{type(error).__name__}: {error}")
    return failure, time.monotonic() - began


def _ended_by(code: int) -> str:
    """In words; a kernel that is out of memory kills by SIGKILL."""
    return f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"


def tail(path: Path) -> str:
    """The last lines of a log."""
    if not path.is_file():
        return ""
    lines = path.read_text(errors="replace").splitlines()
    return "\n".join(line for line in lines[-_TAIL:] if line.strip())


@contextmanager
def ended_by_sigterm() -> Generator[None]:
    """A scheduler's SIGTERM ends the runs as Ctrl-C does. Only the main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
