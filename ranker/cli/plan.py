"""``ranker plan``: the placement of a run's tables on a cluster that one need not have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ranker.doctor import ensure_versions


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of a run")],
    hosts: Annotated[int, typer.Option(min=1, help="machines")] = 1,
    gpus: Annotated[int | None, typer.Option(min=1, help="of each machine, a rank on each")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="ranks of each machine, without GPUs")] = None,
    hbm: Annotated[str, typer.Option(help="memory of a GPU; 1 GB is 2^30 bytes")] = "32GB",
    ddr: Annotated[str, typer.Option(help="a rank's share of its machine's memory")] = "128GB",
    batch: Annotated[int | None, typer.Option(min=1, help="loader.requests")] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(metavar="FEATURE=ROWS", help="item=1e9: another vocabulary than the dataset's (repeatable)"),
    ] = None,
    hbm_bandwidth: Annotated[float | None, typer.Option(min=0.001, help="GB/s of a GPU's memory")] = None,
    ddr_bandwidth: Annotated[float | None, typer.Option(min=0.001, help="GB/s of a machine's memory")] = None,
    pcie_bandwidth: Annotated[
        float | None, typer.Option(min=0.001, help="GB/s between a GPU and its machine's memory")
    ] = None,
    intra_host: Annotated[float | None, typer.Option(min=0.001, help="GB/s between ranks of a machine")] = None,
    inter_host: Annotated[float | None, typer.Option(min=0.001, help="GB/s between machines")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change one key of the config (repeatable)")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="everything, every rank, as JSON")] = False,
) -> None:
    """Show where TorchRec would put a run's tables on a cluster, without allocating them; exit code 2 if they do not
    fit, with what would make them. Defaults of memory and bandwidths are TorchRec's."""
    ensure_versions()
    from features.config_file import load_config
    from features.errors import UserError
    from ranker.config import TrainConfig
    from ranker.planning.cluster import Cluster
    from ranker.planning.command import plan as show
    from ranker.planning.question import read_bytes

    if (gpus is None) == (cpus is None):
        raise UserError("ranker plan: give --gpus G or --cpus C, the ranks of each machine")
    per_host = gpus or cpus or 1
    bandwidths = {
        "hbm_bandwidth": hbm_bandwidth,
        "ddr_bandwidth": ddr_bandwidth,
        "hbm_to_ddr_bandwidth": pcie_bandwidth,
        "intra_host_bandwidth": intra_host,
        "inter_host_bandwidth": inter_host,
    }
    cluster = Cluster(
        "cuda" if gpus else "cpu",
        hosts * per_host,
        per_host,
        read_bytes("--hbm", hbm),
        read_bytes("--ddr", ddr),
        **{name: value * 2**30 / 1000 for name, value in bandwidths.items() if value is not None},
    )
    overrides = [*(set_ or ()), *([] if batch is None else [f"loader.requests={batch}"])]
    show(load_config(config, TrainConfig, overrides), cluster, rows or (), json)
