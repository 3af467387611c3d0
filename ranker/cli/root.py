"""The `ranker` command: its subcommands, and what becomes of their errors."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from features.errors import UserError
from features.schema import Split
from ranker.cli import compare, memory, plan, requests, sids
from ranker.doctor import ensure_healthy, ensure_versions
from ranker.doctor_probe import probe_apart

if TYPE_CHECKING:
    from pydantic import BaseModel

app = typer.Typer(
    name="ranker",
    help="Logs to a trained, measured, exported ranker with ultra-long user histories.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(sids.app, name="sids")
app.add_typer(memory.app, name="memory")
app.command("compare")(compare.compare)
app.command("tune")(compare.tune)
app.command("plan")(plan.plan)
app.command("requests")(requests.requests)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; `ranker schema` lists its keys")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="folder made by `ranker train`")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="change one key: model.short.length=50 (repeatable)"),
]


@app.command()
def doctor() -> None:
    """Check that torch, TorchRec and FBGEMM fit, load and train; show the devices; name the remedy if not."""
    from ranker.doctor import diagnose

    checks = diagnose()
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table("check", "", "found")
    for check in checks:
        table.add_row(check.name, f"[{colours[check.status]}]{check.status}[/]", escape(check.found))
    console = Console()
    console.print(table)
    for check in checks:
        if check.remedy:
            console.print(f"[bold]{check.name}[/]: run")
            console.print(f"  {check.remedy}", markup=False, highlight=False, soft_wrap=True)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


@app.command()
def prepare(
    config: ConfigPath,
    out: Annotated[Path, typer.Option(help="dataset folder to make")],
    set_: Overrides = None,
) -> None:
    """Turn logs into a dataset folder: time-sorted histories, requests, items, vocabularies, manifest."""
    from features.config_file import load_config
    from features.prepare import prepare as run
    from features.schema import PrepareConfig
    from ranker.cli.manifest import print_manifest

    manifest = run(load_config(config, PrepareConfig, set_ or ()), out)
    print_manifest(manifest, out)


@app.command()
def train(
    config: ConfigPath,
    out: Annotated[Path, typer.Option(help="run folder to make")],
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on where --out has a run, else start it")] = False,
    from_: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN", help="start from another run of the same model (warm_start.run)"),
    ] = None,
) -> None:
    """Train a ranker on a prepared dataset, in one process. For many: torchrun or torchx with `-m ranker.train`."""
    ensure_versions()
    from features.config_file import load_config
    from ranker.config import TrainConfig, with_start
    from ranker.training.trainer import train as run

    run(load_config(config, TrainConfig, with_start(set_ or (), from_)), out, resume=resume)


@app.command()
def evaluate(
    run: RunPath,
    split: Annotated[Split, typer.Option(help="split of the dataset")] = "test",
    frozen: Annotated[
        bool,
        typer.Option(
            "--frozen",
            help="histories end at each user's first request of the split, as memories computed before it would; "
            "writes RUN/metrics-frozen.json",
        ),
    ] = False,
    predictions: Annotated[bool, typer.Option("--predictions", help="keep the scored impressions in RUN too")] = False,
) -> None:
    """Measure a run: CTR, CTCVR and CVR, overall and by history length; writes RUN/metrics.json."""
    ensure_versions()
    from ranker.evaluate import evaluate as measure

    measure(run, split, frozen, predictions)


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="folder to make")],
    requests: Annotated[
        int,
        typer.Option(
            min=1, help="compare scores on so many requests, of other splits too where the held-out has fewer"
        ),
    ] = 10_000,
    compiled: Annotated[
        Literal["off", "try", "require"],
        typer.Option(
            help="packages of native code (AOTInductor) too, which takes minutes and g++: none, those that can be made "
            "here, or all, else nothing is exported"
        ),
    ] = "off",
) -> None:
    """Write the ranker as TorchScript with its manifest, whole and as a user encoder and a candidate ranker; refused
    unless their scores equal the trainer's."""
    ensure_versions()
    from ranker.export import export as write

    write(run, out, requests, compiled)


@app.command()
def picture(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="folder for the pictures")],
    split: Annotated[Split, typer.Option(help="split of the dataset")] = "test",
    request: Annotated[
        int | None,
        typer.Option(help="its place in the split; default: one with a long history and several semantic IDs"),
    ] = None,
) -> None:
    """Draw what each UxSID, HiSAC and HyTRec block sees in the history of one request."""
    ensure_versions()
    from ranker.pictures import picture as draw

    draw(run, out, split, request)


@app.command()
def runs(runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="evaluated runs")]) -> None:
    """Show the metrics of several runs side by side."""
    from ranker.evaluation.runs_table import show_runs

    show_runs(runs)


@app.command()
def schema(
    name: Annotated[Literal["prepare", "sids", "train", "compare", "memory"], typer.Argument(help="which config")],
    json: Annotated[bool, typer.Option("--json", help="as JSON schema, for editors")] = False,
) -> None:
    """Print every key of a config: its type, default, and what it means."""
    model = _config_model(name)
    if json:
        from json import dumps

        typer.echo(dumps(model.model_json_schema(), indent=2))
    else:
        from features.config_doc import describe

        typer.echo(describe(model))


def _config_model(name: Literal["prepare", "sids", "train", "compare", "memory"]) -> type[BaseModel]:
    if name == "prepare":
        from features.schema import PrepareConfig

        return PrepareConfig
    if name == "sids":
        from features.semantic_ids.config import SidsConfig

        return SidsConfig
    if name == "compare":
        from ranker.compare.config import CompareConfig

        return CompareConfig
    if name == "memory":
        from ranker.memory.config import MemoryConfig

        return MemoryConfig
    from ranker.config import TrainConfig

    return TrainConfig


def main() -> None:
    """Entry point of the `ranker` command."""
    try:
        _run()
    except UserError as error:
        if os.environ.get("RANKER_TRACEBACK") == "1":
            raise
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _run() -> None:
    try:
        app()
    except (ImportError, OSError) as error:
        # A library that does not load looks like a defect of ours; say so if it is one of the toolchain.
        if isinstance(error, ImportError) or "cannot open shared object" in str(error):
            ensure_healthy(probe=probe_apart)
        raise
