"""A codebook on disk: all that is needed to give any item of any dataset its semantic ID, and its version.

Layout::

    manifest.json           config, version, content hash, what it was fitted on; written last
    codewords.safetensors   level_1 … level_M, `[K_l, dz]` float32
    state.npz               what the content encoders and the quantiser have learned
    report.json, report/    how good it is: figures, plots
    projector/              TensorBoard's embedding projector: tensorboard --logdir CODEBOOK/projector
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.numpy import save

from features.dataset import MANIFEST, Dataset
from features.semantic_ids import quantizers
from features.semantic_ids.config import SidsConfig
from features.semantic_ids.content import Content
from features.semantic_ids.errors import SidsError
from features.semantic_ids.quantizers.protocol import Floats, Quantizer, State

FORMAT_VERSION = 1
CODEWORDS, STATE = "codewords.safetensors", "state.npz"
_NOT_HASHED = {"version", "chunk", "threads", "report"}
"""keys of the config that change no code"""


class CodebookManifest(BaseModel):
    """What a codebook is. `content_hash` covers all that decides a code, not the version's label or the time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    name: str
    version: str
    content_hash: str
    levels: list[int]
    dim: int
    """width of content vectors"""
    codeword_dim: int
    fitted_on: dict[str, str]
    """dataset's name and content hash"""
    fitted_items: int
    versions: dict[str, str]
    git_commit: str | None
    config: dict[str, Any]


@dataclass(frozen=True)
class Codebook:
    """Content encoders and quantiser, fitted. `version` is a label; the content hash tells codebooks apart."""

    config: SidsConfig
    version: str
    content: Content
    quantizer: Quantizer
    content_hash: str

    @classmethod
    def of(cls, config: SidsConfig, content: Content, quantizer: Quantizer) -> Codebook:
        """Of what has just been fitted; the version is the config's, or the time."""
        version = config.version or datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        return cls(config, version, content, quantizer, _hash(config, _state(content, quantizer)))

    def codewords(self) -> list[Floats]:
        """`[K_l, dz]` of each level."""
        return [words.astype(np.float32, copy=False) for words in self.quantizer.codewords()]

    def write_codewords(self, path: Path) -> None:
        """A safetensors file of `level_1` … `level_M`."""
        # not save_file(), whose errors are no OSError
        path.write_bytes(save({f"level_{i}": words for i, words in enumerate(self.codewords(), 1)}))

    def write(
        self, folder: Path, fitted_on: Dataset, fitted_items: int, versions: dict[str, str], git_commit: str | None
    ) -> None:
        """Write all but the report into an existing folder; the manifest last."""
        self.write_codewords(folder / CODEWORDS)
        np.savez(folder / STATE, allow_pickle=False, **_state(self.content, self.quantizer))
        manifest = CodebookManifest(
            format_version=FORMAT_VERSION,
            name=self.config.name,
            version=self.version,
            content_hash=self.content_hash,
            levels=self.config.levels,
            dim=self.content.dim,
            codeword_dim=self.codewords()[0].shape[1],
            fitted_on={"name": fitted_on.manifest.name, "content_hash": fitted_on.manifest.content_hash},
            fitted_items=fitted_items,
            versions=versions,
            git_commit=git_commit,
            config=self.config.model_dump(mode="json"),
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")

    @classmethod
    def open(cls, folder: Path) -> Codebook:
        """Read a codebook's folder.

        Raises:
            SidsError: not a codebook, one of another format, or one whose files are not what its manifest says.
        """
        manifest = read_manifest(folder)
        try:
            config = SidsConfig.model_validate(manifest.config)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise SidsError(
                f"{folder / MANIFEST}: config: this version cannot read {wrong}; fit the codebook again"
            ) from error
        try:
            with np.load(folder / STATE, allow_pickle=False) as file:
                state = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise SidsError(f"{folder / STATE}: unreadable ({error}); fit the codebook again") from error
        if (found := _hash(config, state)) != manifest.content_hash:
            raise SidsError(
                f"{folder / STATE}: content hash {found[:12]}…, the manifest says {manifest.content_hash[:12]}…; the "
                "codebook was changed or damaged: fit it again"
            )
        content = Content.load(config.content, _below("content.", state))
        quantizer = quantizers.load(config.quantizer, config.levels, content.dim, _below("quantizer.", state))
        return cls(config, manifest.version, content, quantizer, manifest.content_hash)


def read_manifest(folder: Path) -> CodebookManifest:
    """A codebook's manifest.

    Raises:
        SidsError: there is none, or it is of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise SidsError(f"{folder}: no {MANIFEST}; not a codebook (`ranker sids fit CONFIG` makes one)")
    try:
        raw = json.loads(path.read_text())
        if isinstance(raw, dict) and "codeword_dim" not in raw:
            raise SidsError(f"{path}: not the manifest of a codebook; `ranker sids fit CONFIG` makes one")
        if raw["format_version"] != FORMAT_VERSION:
            raise SidsError(
                f"{path}: format_version {raw['format_version']}, this version reads {FORMAT_VERSION}: fit it again"
            )
        return CodebookManifest.model_validate(raw)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise SidsError(f"{path}: not the manifest of a codebook ({error}); fit the codebook again") from error


def _state(content: Content, quantizer: Quantizer) -> State:
    parts = {f"content.{name}": value for name, value in content.state().items()}
    return parts | {f"quantizer.{name}": value for name, value in quantizer.state().items()}


def _below(prefix: str, state: State) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _hash(config: SidsConfig, state: State) -> str:
    """SHA-256 over the config's deciding keys and every array."""
    decides = config.model_dump(mode="json", exclude=_NOT_HASHED)
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
    for name in sorted(state):
        array = np.ascontiguousarray(state[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
