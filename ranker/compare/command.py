"""`ranker compare`: plan the cells, finish them, time the methods, write the tables and the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from features.errors import UserError
from features.progress import log
from ranker.compare import markers
from ranker.compare.config import CompareConfig
from ranker.compare.cost import Job, Sizes, recorded_sizes, timed_part
from ranker.compare.folder import CompareFolder
from ranker.compare.launching import ChildProcesses, Launcher, launcher_of
from ranker.compare.page import page
from ranker.compare.plan import Cell, plan
from ranker.compare.protocol import Protocol, cost_machines, protocol_of
from ranker.compare.results import Results, cost_name, gather, json_of
from ranker.compare.running import Failure, ended_by_sigterm, run_cells, tail
from ranker.compare.tables import markdown_brief, markdown_long, markdown_short, rich_table, terminal_tables
from ranker.run import write_json, write_text


def compare(
    config: CompareConfig,
    folder_of_config: Path,
    out: Path,
    recompute: Sequence[str] = (),
    readmes: Sequence[Path] = (),
    train: bool = True,
    launcher: Launcher | None = None,
    console: Console | None = None,
) -> list[Failure]:
    """Compare, or go on with it, in the folder `out`; what failed.

    Args:
        recompute: names of cells to make anew, ``*`` for any text.
        readmes: Markdown files with a block for the table (:mod:`ranker.compare.markers`).
        train: False makes tables of what is finished.
        launcher: what runs the cells; default: as the config says.

    Raises:
        UserError: a config that cannot be used, cells that were made otherwise, or nothing to show.
    """
    if recompute and not train:
        raise UserError("--recompute makes cells anew, which --no-train forbids; leave one of them out")
    cells, folder = plan(config, folder_of_config), CompareFolder(out)
    failures: list[Failure] = []
    with folder.alone():
        folder.settle(cells, recompute)
        if train:
            launcher = launcher or launcher_of(config.scheduler, config.threads)
            failures += run_cells(cells, folder, config.split, launcher, config.parallel)
            if any(folder.state(cell, config.split) == "finished" for cell in cells):
                failures += _measure_costs(cells, folder, config)
        results = gather(cells, folder, config)
        if not results.rows:
            raise UserError(f"{out}: no cell is finished; " + (failures[0].log if failures else "leave out --no-train"))
        protocol = protocol_of(config, cells, folder)
        _write(config, cells, folder, results, protocol, failures)
        for readme in readmes:
            markers.fill(readme, config.name, markdown_brief(results, protocol), markdown_long(results, protocol))
    for table in terminal_tables(results):
        (console or Console()).print(rich_table(table))
    log(f"written to {out}: table.json, table.md, report.html")
    for failure in failures:
        log(f"failed: {failure.cell}: {failure.step}")
    return failures


def _measure_costs(cells: Sequence[Cell], folder: CompareFolder, config: CompareConfig) -> list[Failure]:
    """Time each method, one after the other, where that has not been done with the same sizes; what failed."""
    size = config.speed
    sizes = Sizes(size.candidates, size.groups, size.repeats)
    todo: dict[str, Job] = {}
    for name in dict.fromkeys(cost_name(cell.row) for cell in cells):
        mine = [cell for cell in cells if cost_name(cell.row) == name and folder.config(cell).is_file()]
        lengths = sorted({*size.lengths, *(cell.row.length for cell in mine if cell.row.length)})
        if mine and not _timed(folder.cost(name), mine[0], sizes, lengths):
            todo[name] = Job(config=folder.config(mine[0]), lengths=lengths, sizes=sizes, out=folder.cost(name))
    if not todo:
        return []
    log(f"timing {', '.join(todo)}")
    job_file, output = folder.root / "speed" / ".job", folder.root / "speed" / "log"
    job_file.parent.mkdir(exist_ok=True)
    child, failures = ChildProcesses(1), list[Failure]()
    with ended_by_sigterm():
        try:
            for name, job in todo.items():  # a process each: one that is killed takes no other with it
                write_text(job_file, job.model_dump_json())
                if child.module("ranker.compare.cost", [str(job_file)], output):
                    folder.cost(name).unlink(missing_ok=True)  # of another config
                    failures.append(Failure(name, "timing", tail(output)))
                    log(f"timing of {name} failed ({output}):\n{tail(output)}")
        except BaseException:
            child.stop()
            raise
        finally:
            job_file.unlink(missing_ok=True)
    return failures


def _timed(path: Path, cell: Cell, sizes: Sizes, lengths: list[int]) -> bool:
    """Whether a file holds the cost of the cell's method, of these sizes, and of at least these lengths."""
    found = json.loads(path.read_text()) if path.is_file() else {"sizes": {"lengths": []}}
    known = {*found["sizes"]["lengths"], *lengths}
    return found["sizes"] == recorded_sizes(sizes, sorted(known)) and found.get("of") == timed_part(cell.config)


def _write(
    config: CompareConfig, cells: Sequence[Cell], folder: CompareFolder, results: Results, protocol: Protocol,
    failures: list[Failure],
) -> None:  # fmt: skip
    """Each file in one step."""
    finished = {result.row: set(result.runs) for result in results.rows}
    content = {
        "name": config.name,
        "protocol": protocol,
        "timed_on": cost_machines(folder),
        "config": config.model_dump(mode="json"),
        **json_of(results),
        "unfinished": [cell.name for cell in cells if cell.seed not in finished.get(cell.row, ())],
        "failed": [failure._asdict() for failure in failures],
    }
    write_json(folder.root / "table.json", content)
    write_text(folder.root / "table.md", markdown_short(results, protocol))
    write_text(folder.root / "report.html", page(config.name, results, protocol, failures))
