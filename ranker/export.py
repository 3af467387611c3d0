"""`ranker export RUN --out DIR`: the whole ranker as one TorchScript file that loads with torch and fbgemm_gpu alone.

Inputs are plain tensors by name (:class:`features.batch.RequestBatch` says what each holds); the numbers of requests,
candidates and events are free. The export is refused unless its scores equal the trainer's on held-out requests.
"""

import json
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.batch import RequestBatch, names, sequence_keys
from features.dataset import Manifest
from features.errors import UserError
from features.hashing import FUNCTION, RULE
from features.progress import log
from features.schema import Split
from features.selection import Feature, FeatureSpec, resolve
from ranker.evaluate import restore
from ranker.evaluation.predict import scoring_loader, selection_of
from ranker.model import Plain, Ranker
from ranker.ranks import join_ranks
from ranker.run import Run, codebooks_of, codewords_of, refuse_existing, versions, write_json
from ranker.towers import esmm_probabilities

TOLERANCE = 1e-5
"""greatest difference of a score from the trainer's"""
HELD_OUT_REQUESTS = 1_000
MODEL_FILE = "ranker.pt"


class ExportError(UserError):
    """The exported model does not do what the trainer's does."""


def sizes(features: tuple[Feature, ...]) -> list[int]:
    """Ids of each feature's table, the reserved 0 included."""
    return [f.size for f in features]


def known_ids(values: Tensor, lengths: Tensor, sizes: list[int]) -> Tensor:
    """Ids outside their feature's table read the reserved row 0.

    Args:
        values: `[V]` ids, feature by feature; lengths: `[features · stride]`.
    """
    if len(sizes) == 0:
        return values
    size = torch.repeat_interleave(torch.tensor(sizes, device=values.device), lengths.view(len(sizes), -1).sum(1))
    return torch.where((values >= 0) & (values < size), values, torch.zeros_like(values))


class ServedRanker(nn.Module):
    """The ranker on plain tensors, unsharded: what is scripted.

    Ids at or above a table's size are unknown and read the reserved row 0, so that a server may send any dense index.
    """

    # lists may be empty, and then do not tell their type
    request_keys: list[str]
    candidate_keys: list[str]
    request_sizes: list[int]
    candidate_sizes: list[int]

    def __init__(self, ranker: Ranker, spec: FeatureSpec) -> None:
        super().__init__()
        self.tables, self.dense = ranker.tables, ranker.dense
        self.request_keys, self.candidate_keys = names(spec.request), names(spec.candidate)
        self.sequence_keys = sequence_keys(spec)
        self.request_sizes = sizes(spec.request)
        self.candidate_sizes = sizes(spec.candidate)
        self.sequence_sizes = sizes((*spec.sequence, *spec.event, *spec.content, *spec.sequence))

    def forward(
        self,
        request_values: Tensor,
        request_lengths: Tensor,
        candidate_values: Tensor,
        candidate_lengths: Tensor,
        sequence_values: Tensor,
        sequence_lengths: Tensor,
        request_dense: Tensor,
        candidate_dense: Tensor,
        event_dense: Tensor,
        event_codes: Tensor,
        candidate_codes: Tensor,
        event_time: Tensor,
        now: Tensor,
        start: Tensor,
        end: Tensor,
        offsets: Tensor,
    ) -> Tensor:
        """Probabilities `[N, 1]` (click) or `[N, 3]` (click; click and conversion; conversion given a click)."""
        request_values = known_ids(request_values, request_lengths, self.request_sizes)
        candidate_values = known_ids(candidate_values, candidate_lengths, self.candidate_sizes)
        sequence_values = known_ids(sequence_values, sequence_lengths, self.sequence_sizes)
        request = KeyedJaggedTensor(self.request_keys, request_values, lengths=request_lengths)
        candidate = KeyedJaggedTensor(self.candidate_keys, candidate_values, lengths=candidate_lengths)
        sequence = KeyedJaggedTensor(self.sequence_keys, sequence_values, lengths=sequence_lengths)
        plain = Plain(
            request_dense, candidate_dense, event_dense, event_codes, candidate_codes,
            event_time, now, start, end, offsets,
        )  # fmt: skip
        return esmm_probabilities(self.dense(self.tables(request, candidate, sequence), plain).logits)


def inputs_of(batch: RequestBatch) -> dict[str, Tensor]:
    """A batch as the exported model's inputs, by name."""
    keyed = {
        f"{name}_{part}": tensor
        for name, kjt in (("request", batch.request), ("candidate", batch.candidate), ("sequence", batch.sequence))
        for part, tensor in (("values", kjt.values()), ("lengths", kjt.lengths()))
    }
    return keyed | {name: getattr(batch, name) for name in Plain._fields}


def unsharded(model: nn.Module, spec: FeatureSpec, run: Run) -> Ranker:
    """The same ranker with whole tables on this CPU.

    Raises:
        ExportError: a parameter has no counterpart.
    """
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, ShardedTensor):
            whole = torch.empty(value.size(), dtype=value.dtype) if dist.get_rank() == 0 else None
            value.gather(0, whole)
            assert whole is not None
            state[name] = whole
        else:
            state[name] = value.detach().cpu()
    codewords = codewords_of(run.config, run.dataset())
    ranker = Ranker(spec, run.config, run.moments(), codewords, device=torch.device("cpu"))
    missing, unexpected = ranker.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ExportError(f"parameters do not match: missing {missing}, unexpected {unexpected}")
    return ranker.eval()


def export(run_root: Path, out: Path) -> float:
    """Export a run's best checkpoint; the greatest score difference found.

    Raises:
        ExportError: scores differ by more than TOLERANCE; nothing is left at `out`.
    """
    run = Run(run_root)
    refuse_existing(out)
    aside = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        difference = _export(run, aside)
        if out.exists():
            out.rmdir()
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    log(f"exported to {out / MODEL_FILE}")
    return difference


def _export(run: Run, folder: Path) -> float:
    dataset, config = run.dataset(), run.config
    spec = resolve(config.features, dataset.manifest)
    held_out: Split = dataset.manifest.filled_splits()[-1]
    with join_ranks("cpu", config.training.threads, config.loader.workers) as ranks, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch.jit still is what C++ servers load
        trained = restore(run, ranks)
        served = torch.jit.script(ServedRanker(unsharded(trained, spec, run), spec).eval())
        served.save(str(folder / MODEL_FILE))
        loaded = torch.jit.load(str(folder / MODEL_FILE))
        loader = scoring_loader(config, dataset, held_out, selection_of(config, dataset, spec), ranks)
        difference, requests, inputs = torch.zeros(1), 0, dict[str, Tensor]()
        trained.eval()
        with torch.no_grad():
            for batch in loader.batches():
                expected = esmm_probabilities(trained(batch).logits)
                inputs = inputs_of(batch)
                found = loaded(**inputs)
                # torch's maximum keeps a NaN, where Python's may lose it
                difference = torch.cat([difference, (expected - found).abs().flatten()]).max().view(1)
                requests += batch.requests
                if requests >= HELD_OUT_REQUESTS:
                    break
    greatest = float(difference)
    log(f"greatest score difference on {requests:,} {held_out} requests: {greatest:.2e} (allowed {TOLERANCE:.0e})")
    if not greatest <= TOLERANCE:
        raise ExportError(f"scores differ from the trainer's by {greatest:.2e} (allowed {TOLERANCE:.0e}): not exported")
    _write_manifest(folder, run, spec, inputs, greatest, requests)
    return greatest


def _hashed(spec: FeatureSpec, manifest: Manifest) -> dict[str, object]:
    """How a server makes rows of raw ids that have no vocabulary; empty where all have one."""
    features = (*spec.request, *spec.candidate, *spec.sequence, *spec.event, *spec.codes)
    infos = {f.name: manifest.hashed(f.name) for f in features}
    buckets = {name: info.buckets for name, info in infos.items() if info is not None}
    return {"function": FUNCTION, "rule": RULE, "buckets": buckets} if buckets else {}


def _write_manifest(
    folder: Path, run: Run, spec: FeatureSpec, inputs: dict[str, Tensor], difference: float, requests: int
) -> None:
    dataset = run.dataset()
    metrics = run.root / "metrics.json"
    write_json(
        folder / "manifest.json",
        {
            "model": MODEL_FILE,
            "name": run.config.name,
            "inputs": {
                name: {"dtype": str(x.dtype).removeprefix("torch."), "dims": x.dim()} for name, x in inputs.items()
            },
            "keys": {
                "request": names(spec.request),
                "candidate": names(spec.candidate),
                "sequence": sequence_keys(spec),
                "request_dense": names(spec.request_dense),
                "candidate_dense": names(spec.candidate_dense),
                "event_dense": names(spec.event_dense),
                "codes": names(spec.codes),
            },
            "outputs": ["p_ctr"] if run.config.tasks.conversion is None else ["p_ctr", "p_ctcvr", "p_cvr"],
            "table_sizes": {
                f.name: f.size for f in (*spec.request, *spec.candidate, *spec.sequence, *spec.event, *spec.content)
            },
            "hashed": _hashed(spec, dataset.manifest),
            "history_length": run.config.history_length,
            "dataset": {"name": dataset.manifest.name, "content_hash": dataset.manifest.content_hash},
            "codebooks": codebooks_of(run.config, dataset),
            "vocabulary_hash": dataset.vocabulary_hash(),
            "checkpoint": run.best().name,
            "parity": {"requests": requests, "greatest_difference": difference},
            "versions": versions(),
            "metrics": json.loads(metrics.read_text()) if metrics.is_file() else None,
        },
    )
