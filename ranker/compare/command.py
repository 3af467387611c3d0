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
from ranker.compare.cost import JOBS, Job, Sizes, recorded_sizes, timed_part
from ranker.compare.folder import CompareFolder
from ranker.compare.launching import ChildProcesses, Launcher, launcher_of
from ranker.compare.page import page
from ranker.compare.plan import Cell, plan
from ranker.compare.protocol import Protocol, cost_machines, protocol_of
from ranker.compare.results import Results, cost_name, gather, json_of
from ranker.compare.running import Failure, run_cells, tail
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
            folder.cost(name).unlink(missing_ok=True)
            todo[name] = Job(config=folder.config(mine[0]), lengths=lengths, sizes=sizes, out=folder.cost(name))
    if not todo:
        return []
    log(f"timing {', '.join(todo)}")
    jobs, output = folder.root / "speed" / "jobs.json", folder.root / "speed" / "log"
    jobs.parent.mkdir(exist_ok=True)
    write_text(jobs, JOBS.dump_json(list(todo.values())).decode())
    ChildProcesses(1).module("ranker.compare.cost", [str(jobs)], output)
    jobs.unlink()
    failed = [name for name in todo if not folder.cost(name).is_file()]
    if failed:
        log(f"timing of {', '.join(failed)} failed ({output}):\n{tail(output)}")
    return [Failure(name, "timing", tail(output)) for name in failed]


def _timed(path: Path, cell: Cell, sizes: Sizes, lengths: list[int]) -> bool:
    """Whether a file holds the cost of the cell's method, of these sizes."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    return found.get("sizes") == recorded_sizes(sizes, lengths) and found.get("of") == timed_part(cell.config)


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
