"""``ranker compare`` and ``ranker tune``: many runs from one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ranker.doctor import ensure_versions


def compare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; `ranker schema compare` lists its keys")],
    out: Annotated[Path, typer.Option(help="folder of the comparison; one that exists is gone on with")],
    methods: Annotated[str | None, typer.Option(help="din,uxsid,…: the config's, or NAME.yaml in its folder")] = None,
    lengths: Annotated[str | None, typer.Option(help="50,200,…: events that methods read; 0: all")] = None,
    seeds: Annotated[str | None, typer.Option(help="0,1,…")] = None,
    baseline: Annotated[str | None, typer.Option(help="METHOD, or METHOD@LENGTH")] = None,
    dataset: Annotated[Path | None, typer.Option(help="folder made by `ranker prepare`")] = None,
    epochs: Annotated[int | None, typer.Option(help="of every run")] = None,
    steps: Annotated[int | None, typer.Option(help="of every run, instead of epochs")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V,V,…", help="model.long[0].anchors=4,8,16 (repeatable)")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change one key of every run (repeatable)")
    ] = None,
    parallel: Annotated[int | None, typer.Option(help="runs at a time")] = None,
    scheduler: Annotated[str | None, typer.Option(help="of TorchX: slurm, …; default: child processes")] = None,
    cfg: Annotated[str | None, typer.Option(metavar="KEY=VALUE,…", help="options of the scheduler")] = None,
    recompute: Annotated[
        list[str] | None, typer.Option(metavar="CELL", help="make this run anew; * for any text (repeatable)")
    ] = None,
    readme: Annotated[
        list[Path] | None, typer.Option(help="Markdown file with <!-- compare:begin --> for the table (repeatable)")
    ] = None,
    train: Annotated[bool, typer.Option("--train/--no-train", help="or only show what is finished")] = True,
) -> None:
    """Train methods at several history lengths and seeds, and show what each is worth and costs on your logs."""
    ensure_versions()
    from ranker.compare.command import compare as run
    from ranker.compare.options import Options, load_compare

    options = Options(
        methods, lengths, seeds, baseline, dataset, epochs, steps, sweep or (), set_ or (), parallel, scheduler, cfg
    )
    try:
        failures = run(load_compare(config, options), config.parent, out, recompute or (), readme or (), train)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; the same command goes on where {out} stands", err=True)
        raise typer.Exit(130) from None
    if failures:
        raise typer.Exit(1)


def tune(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of a run")],
    out: Annotated[Path, typer.Option(help="folder of the search; one that exists is gone on with")],
    space: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=RANGE", help="optimizer.lr='1e-4..1e-1 log', model.long[0].anchors=4,8,16 (repeatable)"
        ),
    ],
    trials: Annotated[int, typer.Option(min=1, help="runs in all, those of the folder included")] = 20,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change one key of every run (repeatable)")
    ] = None,
) -> None:
    """Search for settings by the validation split: Optuna's TPE (pip install 'ranker[search]')."""
    ensure_versions()
    from ranker.tune import tune as run

    try:
        run(config, out, space, trials, set_ or ())
    except KeyboardInterrupt:
        typer.echo(f"interrupted; the same command goes on where {out} stands", err=True)
        raise typer.Exit(130) from None
