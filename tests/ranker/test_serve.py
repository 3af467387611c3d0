"""Online scores are those of the whole ranker, as precisely as memories are kept, and there is always a score."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from features.batch import RequestBatch
from features.errors import UserError
from features.selection import resolve
from ranker.config import TrainConfig
from ranker.evaluation.predict import scoring_loader, selection_of
from ranker.export import export
from ranker.export.inputs import (
    StoredBlock,
    encoder_inputs_of,
    inputs_of,
    probes_of,
    ranker_inputs_of,
    short_length_of,
    stored_blocks,
)
from ranker.longseq.stored import Stored
from ranker.memory.encode import encode
from ranker.memory.keys import hashes_of, keys_of
from ranker.memory.record import Dtype
from ranker.memory.store import Generation, open_store
from ranker.memory.versions import versions_of
from ranker.ranks import Ranks
from ranker.run import Run
from ranker.serve import Scorer
from ranker.training.trainer import train
from tests.ranker.export.test_odd_requests import with_candidates_code

ConfigOf = Callable[..., TrainConfig]
ALONE = Ranks(0, 1, 1, torch.device("cpu"))
CODED = (
    "features.candidate=[item, item.category, item.sid_path]", "features.sequence=[item, item.sid_1]",
    "features.codes=[item.sid_1, item.sid_2]", "training.epochs=1", "training.validation_split=null",
)  # fmt: skip
LONG = "model.long=[{type: uxsid}, {type: hisac, keep: [2, 2], z: codewords}, {type: hytrec}]"


class Exported(NamedTuple):
    """An export, and the run it is of."""

    root: Path
    run: Run

    def model(self, name: str) -> torch.jit.ScriptModule:
        return torch.jit.load(str(self.root / name))

    @property
    def blocks(self) -> list[StoredBlock]:
        return stored_blocks(self.run.config, resolve(self.run.config.features, self.run.dataset().manifest))


@pytest.fixture(scope="module")
def exported(once: Callable[..., Path], config_of: ConfigOf, coded: Path) -> Exported:
    """A ranker of all three kinds of memories: one a group, ragged ones, and one of a fixed size."""

    def make(out: Path) -> None:
        train(config_of(f"dataset={coded}", *CODED, LONG), out / "run")
        export(out / "run", out / "export", 100)

    root = once("served", make)
    return Exported(root / "export", Run(root / "run"))


@pytest.fixture(scope="module")
def batch(exported: Exported) -> RequestBatch:
    """Test requests."""
    run = exported.run
    config = run.config.model_copy(update={"loader": run.config.loader.model_copy(update={"requests": 1_000})})
    data = run.dataset()
    selection = selection_of(config, data, resolve(config.features, data.manifest))
    return next(scoring_loader(config, data, "test", selection, ALONE).batches())


def users_of(batch: RequestBatch) -> list[str]:
    """As if every request were a user's of her own."""
    return [f"u-{row}" for row in range(batch.requests)]


@pytest.fixture(params=["float32", "float16", "int8"])
def dtype(request: pytest.FixtureRequest) -> Dtype:
    return request.param


def fill(url: str, exported: Exported, batch: RequestBatch, dtype: Dtype, only: int | None = None) -> None:
    """Keep the memories of a batch's requests; those of the first `only` requests."""
    probes, _ = probes_of(batch, exported.blocks)
    encoded = exported.model("user_encoder.pt")(**encoder_inputs_of(batch, probes))
    versions = versions_of(exported.run)
    per = {block.number: "probe" if block.probe else "request" for block in exported.blocks}
    generation = Generation.model_validate(
        {
            "name": "g", "model": versions.model, "codebook": versions.codebook, "dtype": dtype, "blocks": per,
            "as_of_ms": 0, "begun_ms": 0,
        }
    )  # fmt: skip
    store = open_store(url)
    writer = store.begin(generation)
    hashes = hashes_of(users_of(batch))
    for number, of in per.items():
        records = encoded[f"{number}.lengths"].size(0)
        request = probes[f"{number}.request"].numpy() if of == "probe" else np.arange(records)
        code = probes[f"{number}.code"].numpy() if of == "probe" else np.zeros(records, np.int64)
        keys = keys_of(hashes, number, request, code)
        stored = Stored(*(encoded[f"{number}.{field}"] for field in Stored._fields))
        values = encode(stored, keys.fingerprint, versions, 0, dtype).values
        kept = np.flatnonzero(request < (batch.requests if only is None else only))
        writer.put_many(keys.key[kept], [values[i] for i in kept.tolist()])
    writer.close()
    store.finish(generation.model_copy(update={"finished_ms": 1}))
    store.switch("g")
    store.close()


@pytest.fixture
def scorer_of(exported: Exported) -> Iterator[Callable[[str], Scorer]]:
    scorers: list[Scorer] = []

    def scorer_of(url: str) -> Scorer:
        scorers.append(Scorer(exported.root, url))
        return scorers[-1]

    yield scorer_of
    for scorer in scorers:
        scorer.close()


def inputs_without_memory(exported: Exported, batch: RequestBatch) -> dict[str, Tensor]:
    run = exported.run
    spec = resolve(run.config.features, run.dataset().manifest)
    return ranker_inputs_of(batch, spec, short_length_of(run.config))


def score(scorer: Scorer, exported: Exported, batch: RequestBatch) -> Tensor:
    codes = {block.number: batch.candidate_codes[:, block.column] for block in exported.blocks if block.probe}
    return scorer.score(users_of(batch), inputs_without_memory(exported, batch), codes)


BOUND: dict[Dtype, float] = {"float32": 1e-6, "float16": 1e-3, "int8": 3e-2}
"""of a probability; 8 bits are 1/254 of the largest number of a block"""


def test_scores_from_the_store_are_the_whole_rankers(
    exported: Exported, batch: RequestBatch, dtype: Dtype, scorer_of: Callable[[str], Scorer], tmp_path: Path
):
    url = f"lmdb:{tmp_path / 'store'}"
    fill(url, exported, batch, dtype)
    scorer = scorer_of(url)
    found = score(scorer, exported, batch)
    expected = exported.model("ranker.pt")(**inputs_of(batch))
    assert not expected.requires_grad
    assert scorer.outputs == ["p_ctr", "p_ctcvr", "p_cvr"]
    difference = float((found - expected).abs().max())
    assert difference <= BOUND[dtype]
    assert dtype == "float32" or difference > 0
    counted = scorer.reader.counters
    assert counted.records("found") > batch.requests
    assert counted.records("missing") == 0


def test_users_without_memories_are_scored_as_users_without_a_history(
    exported: Exported, batch: RequestBatch, scorer_of: Callable[[str], Scorer], tmp_path: Path
):
    url, known = f"lmdb:{tmp_path / 'store'}", batch.requests // 2
    fill(url, exported, batch, "float32", only=known)
    scorer = scorer_of(url)
    found = score(scorer, exported, batch)
    nothing = score(scorer_of(f"lmdb:{tmp_path / 'no store'}"), exported, batch)
    whole = exported.model("ranker.pt")(**inputs_of(batch))
    first = int(batch.offsets[known])
    torch.testing.assert_close(found[:first], whole[:first], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[first:], nothing[first:], rtol=0, atol=1e-6)
    assert float((nothing - whole).abs().max()) > 1e-3
    assert scorer.reader.counters.records("missing") > 0


def test_a_code_that_the_codebook_lacks_reads_the_group_of_none_as_in_the_whole_ranker(
    exported: Exported, batch: RequestBatch, scorer_of: Callable[[str], Scorer], tmp_path: Path
):
    url = f"lmdb:{tmp_path / 'store'}"
    fill(url, exported, with_candidates_code(batch, 0), "float32")
    beyond = with_candidates_code(batch, 10**6)
    scorer = scorer_of(url)
    found = score(scorer, exported, beyond)
    torch.testing.assert_close(found, exported.model("ranker.pt")(**inputs_of(beyond)), rtol=0, atol=1e-6)
    assert scorer.reader.counters.records("missing") == 0


@pytest.mark.parametrize(
    ("codes", "told"),
    [
        (None, r"codes: none for block 0; must be \[\d+\]: item.sid_1 of each candidate"),
        ({0: torch.zeros(2, dtype=torch.int64)}, r"codes: those of block 0 are \[2\]; must be "),
    ],
)
def test_codes_that_are_not_the_candidates_are_named(
    exported: Exported,
    batch: RequestBatch,
    scorer_of: Callable[[str], Scorer],
    codes: dict[int, Tensor] | None,
    told: str,
):
    with pytest.raises(UserError, match=told):
        scorer_of("lmdb:nowhere").score(users_of(batch), inputs_without_memory(exported, batch), codes)


def test_an_absent_store_is_counted_and_every_candidate_has_a_score(
    exported: Exported, batch: RequestBatch, scorer_of: Callable[[str], Scorer]
):
    scorer = scorer_of("redis://127.0.0.1:1/0")  # nobody listens there
    found = score(scorer, exported, batch)
    assert found.shape == (batch.candidates, 3)
    assert torch.isfinite(found).all()
    assert scorer.reader.counters.records("unavailable") > 0
    assert scorer.reader.counters.records("found") == 0


def test_memories_of_another_model_are_not_read(
    exported: Exported, batch: RequestBatch, tmp_path: Path, scorer_of: Callable[[str], Scorer]
):
    url = f"lmdb:{tmp_path / 'store'}"
    fill(url, exported, batch, "float32")
    other = tmp_path / "export"
    other.mkdir()
    (other / "candidate_ranker.pt").symlink_to(exported.root / "candidate_ranker.pt")
    manifest = json.loads((exported.root / "manifest.json").read_text())
    manifest["memory"]["versions"]["model"] = "00000000000000aa"
    (other / "manifest.json").write_text(json.dumps(manifest))
    scorer = Scorer(other, url)
    found = score(scorer, exported, batch)
    torch.testing.assert_close(found, score(scorer_of("lmdb:nowhere"), exported, batch))
    assert scorer.reader.counters.records("found") == 0
    assert scorer.reader.counters.snapshot()['ranker_memory_failures_total{reason="no_generation"}'] == 1
    scorer.close()


@pytest.mark.parametrize(("file", "told"), [
    ("candidate_ranker.pt", "manifest.json: not there; "),
    ("ranker.exe", "no ranker.exe; it has ranker.pt, "),
])  # fmt: skip
def test_no_export(exported: Exported, tmp_path: Path, file: str, told: str):
    root = tmp_path if file.endswith(".pt") else exported.root
    with pytest.raises(UserError, match=told):
        Scorer(root, "lmdb:nowhere", file)


def test_a_server_imports_neither_torchrec_nor_pyarrow(exported: Exported):
    program = (
        "import sys; from pathlib import Path; from ranker.serve import Scorer; Scorer(Path(sys.argv[1]), 'lmdb:none');"
        "print([name for name in sys.modules if name.split('.')[0] in ('torchrec', 'pyarrow', 'duckdb', 'pandas')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(exported.root)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"
