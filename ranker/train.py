"""Train a ranker on the ranks that torchrun or TorchX started:
`torchx run -s local_cwd dist.ddp -j 1x2 -m ranker.train -- CONFIG --out RUN`.

Imports the libraries only once their versions are known to fit: before, a mismatch can still be named.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from features.errors import UserError
from ranker.doctor import ensure_versions


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ranker.train``."""
    parser = argparse.ArgumentParser(prog="ranker.train", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    # TorchX takes no option twice: several settings follow one --set
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--resume", action="store_true", help="go on where --out has a run, else start it")
    parser.add_argument("--from", dest="start", type=Path, metavar="RUN", help="start from another run: warm_start.run")
    given = parser.parse_args(arguments)
    try:
        ensure_versions()
        from features.config_file import load_config
        from ranker.config import TrainConfig, with_start
        from ranker.training.trainer import train

        # Slurm starts a job of TorchX again when a machine is lost, whether or not retries were asked for
        resume = given.resume or int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
        train(load_config(given.config, TrainConfig, with_start(given.set, given.start)), given.out, resume)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
