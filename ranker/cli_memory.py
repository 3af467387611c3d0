"""``ranker memory``: stores of memories that were made ahead."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Memories made ahead, in LMDB or Redis: look at them, check them, switch.", no_args_is_help=True)

StoreUrl = Annotated[
    str,
    typer.Argument(metavar="STORE", help="lmdb:PATH, redis://HOST:PORT/DB?namespace=NAME, redis+cluster://HOST:PORT"),
]
GenerationName = Annotated[str, typer.Argument(metavar="GENERATION", help="as `ranker memory stats` lists them")]
ChosenGeneration = Annotated[str | None, typer.Option(help="default: the current one")]


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
    """Have all readers read another generation, at once."""
    from ranker.memory.commands import switch as run

    run(store, generation)


@app.command()
def drop(store: StoreUrl, generation: GenerationName) -> None:
    """Remove a generation that is not the current one, with its records."""
    from ranker.memory.commands import drop as run

    run(store, generation)
