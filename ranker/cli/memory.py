"""``ranker memory``: stores of memories that were made ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Memories made ahead, in LMDB or Redis: make them, look at them, check them, switch.", no_args_is_help=True
)

StoreUrl = Annotated[
    str,
    typer.Argument(metavar="STORE", help="lmdb:PATH, redis://HOST:PORT/DB?namespace=NAME, redis+cluster://HOST:PORT"),
]
GenerationName = Annotated[str, typer.Argument(metavar="GENERATION", help="as `ranker memory stats` lists them")]
ChosenGeneration = Annotated[str | None, typer.Option(help="default: the current one, of a store of one model")]


RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="folder made by `ranker train`")]
StoreOption = Annotated[str, typer.Option("--store", help="lmdb:PATH, redis://HOST:PORT/DB?namespace=NAME, …")]
ConfigOption = Annotated[Path | None, typer.Option(help="YAML file; `ranker schema memory` lists its keys")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change one key: codes.most=50 (repeatable)")
]
NewerDataset = Annotated[Path | None, typer.Option(help="a newer preparation; default: the run's own dataset")]


@app.command()
def build(
    run: RunPath,
    store: StoreOption,
    config: ConfigOption = None,
    set_: Overrides = None,
    name: Annotated[str, typer.Option(help="of the generation; default: by what decides its records")] = "",
    no_switch: Annotated[bool, typer.Option("--no-switch", help="leave servers with the generation they have")] = False,
    dataset: NewerDataset = None,
) -> None:
    """Make the memories of all users of a run's dataset; the same command goes on where it was cut off.

    For many processes: torchrun or torchx with `-m ranker.memory.build`.
    """
    from ranker.doctor import ensure_versions

    ensure_versions()
    from features.config_file import load_config
    from ranker.memory.build import build as run_build
    from ranker.memory.config import MemoryConfig

    run_build(run, store, load_config(config, MemoryConfig, set_ or ()), name, not no_switch, dataset)


@app.command()
def refresh(
    run: RunPath,
    store: StoreOption,
    dataset: NewerDataset = None,
    config: ConfigOption = None,
    set_: Overrides = None,
    drop_vanished: Annotated[
        bool, typer.Option("--drop-vanished", help="remove records of users whom the dataset no longer has")
    ] = False,
    generation: Annotated[str | None, typer.Option(help="default: the current one of the run's model")] = None,
    older_than: Annotated[
        float | None,
        typer.Option(min=0, metavar="DAYS", help="make anew, too, records as of longer ago than that"),
    ] = None,
) -> None:
    """Make anew, in a generation, the memories of users with new events, and of nobody else.

    Where item attributes or former events have changed, build anew: `ranker memory build RUN --dataset NEWER`.
    """
    from ranker.doctor import ensure_versions

    ensure_versions()
    from features.config_file import load_config
    from ranker.memory.config import MemoryConfig
    from ranker.memory.refresh import refresh as run_refresh

    given = load_config(config, MemoryConfig, set_ or ())
    run_refresh(run, store, dataset, given, drop_vanished, generation or "", older_than)


@app.command()
def stats(store: StoreUrl) -> None:
    """Show a store's generations: records, bytes, dtype, versions, age."""
    from ranker.memory.commands import show_stats

    show_stats(store)


@app.command()
def get(
    store: StoreUrl,
    user: Annotated[str, typer.Option(help="raw id")],
    code: Annotated[int, typer.Option(help="of the probe; 0 where the block has one record a user")] = 0,
    block: Annotated[int, typer.Option(min=0, help="its number in model.long")] = 0,
    generation: ChosenGeneration = None,
) -> None:
    """Show one record, decoded."""
    from ranker.memory.commands import show_record

    show_record(store, user, code, block, generation)


@app.command()
def verify(
    store: StoreUrl,
    generation: ChosenGeneration = None,
    sample: Annotated[int | None, typer.Option(min=1, help="so many records; default: all")] = None,
) -> None:
    """Read records and judge them: checksums, versions, sizes; exit code 1 if one is bad."""
    from ranker.memory.commands import show_verified

    if not show_verified(store, generation, sample):
        raise typer.Exit(1)


@app.command()
def switch(store: StoreUrl, generation: GenerationName) -> None:
    """Have all servers of a generation's model read it, at once."""
    from ranker.memory.commands import switch as run

    run(store, generation)


@app.command()
def drop(
    store: StoreUrl,
    generation: GenerationName,
    current: Annotated[
        bool, typer.Option("--current", help="even if it is its model's current one, whose servers then find nothing")
    ] = False,
) -> None:
    """Remove a generation, with its records; one that servers read only with --current."""
    from ranker.memory.commands import drop as run

    run(store, generation, current)
