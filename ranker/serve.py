"""Online scoring: a server's requests, users' memories out of a store, scores out of an exported candidate ranker.

Needs torch, fbgemm_gpu and the store's client, neither TorchRec nor the run. Memories come from a store that `ranker
memory build` has filled; what is not there, or not in time, reads as an empty history and is counted
(:class:`ranker.memory.reader.MemoryReader`). A server in another language does the same with the same files; the
export's manifest and docs/serving.md describe them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features.errors import UserError
from ranker.freed_memory import keep_freed_memory
from ranker.memory.reader import MemoryReader, Per
from ranker.memory.versions import MemoryVersions
from ranker.ops.probing import distinct_probes, known_codes

FILE = "candidate_ranker.pt"


class Scorer:
    """The candidate ranker of an export in front of a memory store; for many threads.

    From the first one on, the process keeps freed memory (:mod:`ranker.freed_memory`): page faults can double the time
    of a request.

    Args:
        exported: folder made by `ranker export`.
        store: URL of the store (:func:`ranker.memory.store.open_store`); it need not be there yet.
        file: which of the export's candidate rankers, such as ``candidate_ranker.int8.pt``.
        deadline_ms: of a read from Redis.

    Attributes:
        reader: its `counters` tell what was found, how old it was, and what was lost.
        outputs: names of the scores' columns.

    Raises:
        UserError: no export, one without a pair, or without that file.
    """

    def __init__(self, exported: Path, store: str, file: str = FILE, deadline_ms: float = 20.0) -> None:
        manifest = _manifest(exported)
        memory: dict[str, Any] = manifest["memory"]
        if file not in manifest["files"]:
            if reason := memory.get("no_pair_because"):
                raise UserError(f"{exported}: was exported without a candidate ranker, as {reason}")
            have = ", ".join(manifest["files"])
            raise UserError(f"{exported}: no {file}; it has {have}")
        keep_freed_memory()
        import fbgemm_gpu  # noqa: F401  # pyright: ignore[reportUnusedImport]  look-ups are its operators

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch.jit still is what C++ servers load
            self._model: torch.jit.ScriptModule = torch.jit.load(str(exported / file))
        blocks: dict[int, Per] = {block["number"]: block["per"] for block in memory["blocks"]}
        self._probed: dict[int, tuple[str, int]] = {
            block["number"]: (block["probe"], block["probe_size"]) for block in memory["blocks"] if block["probe"]
        }
        versions = MemoryVersions(*(int(memory["versions"][name], 16) for name in MemoryVersions._fields))
        self.outputs: list[str] = manifest["files"][file]["outputs"]
        self.reader = MemoryReader(store, blocks, versions, deadline_ms)

    def score(
        self, users: Sequence[int | str], inputs: Mapping[str, Tensor], codes: Mapping[int, Tensor] | None = None
    ) -> Tensor:
        """Scores of all candidates of R requests: `[N, outputs]`.

        Args:
            users: raw ids, `[R]`; of an unknown user nothing is found.
            inputs: the candidate ranker's, but for its memory, by the names in the manifest.
            codes: for each block with probes, by its number, the candidates' values of the probe's feature: `[N]`.
                One that the codebook does not have is 0, none, as in the exported files.

        Raises:
            UserError: `codes` lacks a block, or has too few or too many for one.
            RuntimeError: inputs that the model does not take. What the store does never raises.
        """
        with torch.inference_mode():
            return self._model(**inputs, memory=self.memory(users, inputs["offsets"], codes or {}))

    def memory(self, users: Sequence[int | str], offsets: Tensor, codes: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """The `memory` of the candidate ranker, each (user, code) looked up once.

        Args:
            offsets: `[R + 1]`, the candidates of each request; users, codes: as of :meth:`score`.

        Raises:
            UserError: as :meth:`score`.
        """
        probes: dict[str, Tensor] = {}
        records: dict[str, Tensor] = {}
        for number, (probe, size) in self._probed.items():
            wanted = f"must be [{int(offsets[-1])}]: {probe} of each candidate"
            if (given := codes.get(number)) is None:
                raise UserError(f"codes: none for block {number}; {wanted}")
            if list(given.shape) != [int(offsets[-1])]:
                raise UserError(f"codes: those of block {number} are {list(given.shape)}; {wanted}")
            code, request, record, _ = distinct_probes(known_codes(given[:, None], [size])[:, 0], offsets)
            probes |= {f"{number}.code": code, f"{number}.request": request}
            records[f"{number}.probe"] = record
        return self.reader.read(users, probes) | records

    def close(self) -> None:
        """Give back what the store's client holds."""
        self.reader.close()


def _manifest(exported: Path) -> dict[str, Any]:
    path = exported / "manifest.json"
    if not path.is_file():
        raise UserError(f"{path}: not there; {exported} is no folder made by `ranker export`")
    return json.loads(path.read_text())
