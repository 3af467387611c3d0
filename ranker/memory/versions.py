"""Versions of what made a memory: a record of another model or other codes is no record to a reader."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from ranker.run import Run


class MemoryVersions(NamedTuple):
    """Unsigned 64-bit each. model: of the parameters and the blocks' config; codebook: of the semantic IDs that the run
    reads, 0 where it reads none."""

    model: int
    codebook: int

    def __str__(self) -> str:
        return f"model {self.model:016x}, codebook {self.codebook:016x}"

    @property
    def key(self) -> str:
        """Under which a store says which generation is their current one: model, "-", codebook, 16 hexadecimal digits
        each."""
        return f"{self.model:016x}-{self.codebook:016x}"

    @classmethod
    def of_key(cls, key: str) -> MemoryVersions:
        """Those with this key.

        Raises:
            ValueError: it is none.
        """
        model, _, codebook = key.partition("-")
        versions = cls(int(model, 16), int(codebook, 16))
        if versions.key != key:
            raise ValueError(f"{key}: no versions' key")
        return versions


def versions_of(run: Run, checkpoint: Path | None = None) -> MemoryVersions:
    """Versions of a run's checkpoint: the same for a copy of the run elsewhere, others after more training.

    model is made of the checkpoint's ``SHA256SUMS``, and so of all its parameters, and of the config's model, features
    and tables; codebook of the codebooks' content hashes. Each is the first 8 bytes, little-endian, of a SHA-256.

    Args:
        checkpoint: whose parameters are used; default: the best of now, which further training may replace by another.

    Raises:
        RunError: there is no checkpoint.
    """
    config = run.config.model_dump(mode="json", include={"model", "features", "tables"})
    return MemoryVersions(_first_64(_parameters(checkpoint or run.best()), config), codebook_version(run.info))


def codebook_version(info: dict[str, object]) -> int:
    """Of the codebooks that ``run.json`` names; 0 for none."""
    codebooks = cast("dict[str, dict[str, str]]", info.get("codebooks") or {})
    hashes = {name: codebook["content_hash"] for name, codebook in codebooks.items()}
    return _first_64(hashes) if hashes else 0


def _parameters(checkpoint: Path) -> str:
    """What the checkpoint says of its files' content."""
    from ranker.training.checkpoint import SUMS  # not above: a server that reads memories needs no TorchRec

    return "".join(sorted((checkpoint / SUMS).read_text().splitlines(keepends=True)))


def _first_64(*parts: object) -> int:
    """Never 0, which stands for none."""
    digest = hashlib.sha256("\n".join(json.dumps(part, sort_keys=True) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") or 1
