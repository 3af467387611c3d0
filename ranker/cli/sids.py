"""``ranker sids``: semantic IDs of a dataset's items."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from features.dataset import CodebookInfo

app = typer.Typer(help="Semantic IDs: a codebook of the items' content, and codes from it.", no_args_is_help=True)

CodebookPath = Annotated[Path, typer.Argument(metavar="CODEBOOK", help="folder made by `ranker sids fit`")]
DatasetPath = Annotated[Path, typer.Option("--dataset", help="folder made by `ranker prepare`")]
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; `ranker schema sids` lists its keys")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change one key: levels=[64,64] (repeatable)")
]


@app.command()
def fit(
    config: ConfigPath,
    dataset: DatasetPath,
    out: Annotated[Path, typer.Option(help="codebook folder to make")],
    set_: Overrides = None,
) -> None:
    """Fit a codebook to a dataset's items and judge it: errors, code usage, agreement with neighbours and behaviour."""
    from features.config_file import load_config
    from features.dataset import Dataset
    from features.progress import log
    from features.semantic_ids.config import SidsConfig
    from features.semantic_ids.fit import fit as run
    from features.semantic_ids.report import render

    codebook, report = run(load_config(config, SidsConfig, set_ or ()), Dataset(dataset), out, log)
    console = Console()
    for part in render(report):
        console.print(part)
    console.print(f"{codebook.config.name} version {codebook.version}, content hash {codebook.content_hash[:12]}")
    console.print(f"written to {escape(str(out))}", soft_wrap=True)


@app.command()
def apply(codebook: CodebookPath, dataset: DatasetPath) -> None:
    """Write a codebook's codes into a dataset's item table, in place of older ones of the same name."""
    from features.dataset import Dataset
    from features.semantic_ids.apply import apply as run
    from features.semantic_ids.codebook import Codebook

    opened = Codebook.open(codebook)
    _print_coded(opened.config.name, run(opened, Dataset(dataset)), Dataset(dataset).manifest.items - 1)


@app.command()
def show(codebook: CodebookPath) -> None:
    """Print a codebook's report again."""
    from features.semantic_ids.codebook import read_manifest
    from features.semantic_ids.report import render
    from features.semantic_ids.report.judge import read_report

    manifest = read_manifest(codebook)
    console = Console()
    for part in render(read_report(codebook)):
        console.print(part)
    console.print(f"{manifest.name} version {manifest.version}, content hash {manifest.content_hash[:12]}")


def _print_coded(name: str, info: CodebookInfo, items: int) -> None:
    """What was coded, and what was not."""
    console = Console()
    table = Table("without a code", "items", "impressions", "of all", title=f"{name} version {info.version}")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("all items", f"{info.without_code['items']:,}")
    for split, (without, impressions) in info.impressions_without_code.items():
        share = f"{without / max(impressions, 1):.1%}"
        table.add_row(f"candidates of {split}", f"{info.without_code[split]:,}", f"{without:,}", share)
    console.print(table)
    coded = items - info.without_code["items"]
    columns = ", ".join(f"item.{name}_{part}" for part in (*range(1, len(info.levels) + 1), "path", "vector"))
    console.print(f"{coded:,} of {items:,} items coded: {columns}", soft_wrap=True)
