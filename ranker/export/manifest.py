"""``manifest.json``: what a server must know of the files beside it.

`files` has each file's inputs, by name with type and number of dimensions, and its outputs; `memory` says which blocks
a store keeps, and what for; `compiled`, the packages: how C++ gives their inputs, or why one was left out; `keys` are
the features of keyed inputs and of columns, in their order; `parity` is how well each way through the files scores as
the trainer does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from features.batch import from_tensors, names, sequence_keys
from features.collate import assemble, nothing
from features.dataset import Manifest
from features.hashing import FUNCTION, RULE
from features.selection import FeatureSpec, Selection
from ranker.config import TrainConfig
from ranker.export.compiled import Package
from ranker.export.inputs import (
    File,
    StoredBlock,
    encoder_inputs_of,
    inputs_of,
    no_pair_because,
    probes_of,
    ranker_inputs_of,
    short_length_of,
    stored_blocks,
)
from ranker.export.parity import Parity
from ranker.memory.keys import RULE as RULE_OF_KEYS
from ranker.memory.versions import versions_of
from ranker.run import Run, codebooks_of, versions, write_json

RECORDS = {
    "values": {"dtype": "float32", "dims": 1},
    "exact": {"dtype": "float32", "dims": 1},
    "lengths": {"dtype": "int64", "dims": 2},
    "time": {"dtype": "int64", "dims": 1},
}
"""fields of a block's records, as :class:`ranker.longseq.stored.Stored` has them: by name they are NUMBER.FIELD"""


def write_manifest(
    folder: Path,
    run: Run,
    checkpoint: Path,
    selection: Selection,
    files: Sequence[File],
    parity: Parity,
    packages: Sequence[Package],
) -> None:
    """Describe the files of a folder, in the folder.

    Args:
        checkpoint: whose parameters the files have.
    """
    dataset, config, spec = run.dataset(), run.config, selection.spec
    metrics = run.root / "metrics.json"
    write_json(
        folder / "manifest.json",
        {
            "name": config.name,
            "files": {file.name: _described(file, selection, config) for file in files},
            "compiled": {package.name: package.as_json() for package in packages},
            "memory": _memory(run, checkpoint, spec),
            "keys": {
                "request": names(spec.request),
                "candidate": names(spec.candidate),
                "sequence": sequence_keys(spec),
                "request_dense": names(spec.request_dense),
                "candidate_dense": names(spec.candidate_dense),
                "event_dense": names(spec.event_dense),
                "codes": names(spec.codes),
            },
            "table_sizes": {
                f.name: f.size for f in (*spec.request, *spec.candidate, *spec.sequence, *spec.event, *spec.content)
            },
            "hashed": _hashed(spec, dataset.manifest),
            "history_length": config.history_length,
            "dataset": {"name": dataset.manifest.name, "content_hash": dataset.manifest.content_hash},
            "codebooks": codebooks_of(config, dataset),
            "vocabulary_hash": dataset.vocabulary_hash(),
            "checkpoint": checkpoint.name,
            "parity": parity.as_json(),
            "versions": versions(),
            "metrics": json.loads(metrics.read_text()) if metrics.is_file() else None,
        },
    )


def _memory(run: Run, checkpoint: Path, spec: FeatureSpec) -> dict[str, object]:
    """What a store keeps between user encoder and candidate ranker, or why there is no such pair.

    `probe_size` of a block is the size of its probe's table: a code outside it reads and asks for group 0.
    """
    config = run.config
    if reason := no_pair_because(config):
        return {"blocks": [], "no_pair_because": reason}
    blocks = [
        {
            "number": block.number,
            "type": block.type,
            "per": "probe" if block.probe else "request",
            "probe": block.probe,
            "probe_size": spec.codes[block.column].size if block.probe else None,
        }
        for block in stored_blocks(config, spec)
    ]
    versions = {name: f"{version:016x}" for name, version in versions_of(run, checkpoint)._asdict().items()}
    return {"blocks": blocks, "short_length": short_length_of(config), "versions": versions, "keys": RULE_OF_KEYS}


def _described(file: File, selection: Selection, config: TrainConfig) -> dict[str, object]:
    """A file's inputs and outputs: an empty batch has the types of any other."""
    spec = selection.spec
    batch = from_tensors(spec, assemble([nothing(selection)], selection))
    blocks = stored_blocks(config, spec)
    scores = ["p_ctr"] if config.tasks.conversion is None else ["p_ctr", "p_ctcvr", "p_cvr"]
    if file.of == "ranker":
        return {"inputs": _typed(inputs_of(batch)), "outputs": scores}
    probes, records = probes_of(batch, blocks)
    if file.of == "user_encoder":
        return {"inputs": _typed(encoder_inputs_of(batch, probes)), "outputs": _records(blocks)}
    inputs = _typed(ranker_inputs_of(batch, spec, short_length_of(config)))
    return {"inputs": inputs | {"memory": _records(blocks) | _typed(records)}, "outputs": scores}


def _typed(inputs: dict[str, Tensor | dict[str, Tensor]] | dict[str, Tensor]) -> dict[str, object]:
    """Type and number of dimensions of each tensor, by name."""
    return {
        name: _typed(x) if isinstance(x, dict) else {"dtype": str(x.dtype).removeprefix("torch."), "dims": x.dim()}
        for name, x in inputs.items()
    }


def _records(blocks: Sequence[StoredBlock]) -> dict[str, object]:
    return {f"{block.number}.{field}": typed for block in blocks for field, typed in RECORDS.items()}


def _hashed(spec: FeatureSpec, manifest: Manifest) -> dict[str, object]:
    """How a server makes rows of raw ids that have no vocabulary; empty where all have one."""
    features = (*spec.request, *spec.candidate, *spec.sequence, *spec.event, *spec.codes)
    infos = {f.name: manifest.hashed(f.name) for f in features}
    buckets = {name: info.buckets for name, info in infos.items() if info is not None}
    return {"function": FUNCTION, "rule": RULE, "buckets": buckets} if buckets else {}
