"""What servers send that logs do not have: no candidates, no history, ids and codes that no table knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.batch import RequestBatch
from features.dataset import Dataset
from features.selection import FeatureSpec, resolve
from ranker.config import TrainConfig
from ranker.evaluation.predict import scoring_loader, selection_of
from ranker.export.inputs import (
    StoredBlock,
    encoder_inputs_of,
    inputs_of,
    probes_of,
    ranker_inputs_of,
    short_length_of,
    stored_blocks,
)
from ranker.export.pair import CandidateRanker, UserEncoder
from ranker.export.whole import ServedRanker
from ranker.model import Ranker
from ranker.ranks import Ranks
from ranker.run import codewords_of

ConfigOf = Callable[..., TrainConfig]
CODED = (
    "features.candidate=[item, item.category, item.sid_path]", "features.sequence=[item, item.sid_1]",
    "features.codes=[item.sid_1, item.sid_2]",
    "model.long=[{type: uxsid}, {type: hisac, keep: [2, 2], z: codewords}, {type: hytrec}, {type: mean}]",
)  # fmt: skip


class Served(NamedTuple):
    """Scripted modules with fresh weights, and a request of the test split."""

    config: TrainConfig
    spec: FeatureSpec
    blocks: list[StoredBlock]
    whole: nn.Module
    encoder: nn.Module
    reader: nn.Module
    batch: RequestBatch

    def by_the_pair(self, batch: RequestBatch) -> Tensor:
        probes, records = probes_of(batch, self.blocks)
        memory = self.encoder(**encoder_inputs_of(batch, probes)) | records
        return self.reader(**ranker_inputs_of(batch, self.spec, short_length_of(self.config)), memory=memory)


@pytest.fixture(scope="module")
def served(config_of: ConfigOf, coded: Path) -> Served:
    config = config_of(f"dataset={coded}", *CODED, "loader.requests=1")
    data = Dataset(coded)
    spec = resolve(config.features, data.manifest)
    torch.manual_seed(0)
    ranker = Ranker(spec, config, {}, codewords_of(config, data), device=torch.device("cpu"))
    ranker.eval().requires_grad_(False)
    alone = Ranks(0, 1, 1, torch.device("cpu"))
    batch = next(scoring_loader(config, data, "test", selection_of(config, data, spec), alone).batches())
    modules = ServedRanker(ranker, spec), UserEncoder(ranker, spec, config.tables)
    scripted = [torch.jit.script(m.eval()) for m in (*modules, CandidateRanker(ranker, spec, config.tables))]
    return Served(config, spec, stored_blocks(config, spec), *scripted, batch)


def with_candidates_code(batch: RequestBatch, code: int) -> RequestBatch:
    """All candidates of one group."""
    old = batch.sequence
    sequence = KeyedJaggedTensor(old.keys(), old.values().clone(), lengths=old.lengths())
    sequence["candidate:item.sid_1"].values().fill_(code)
    return batch._replace(sequence=sequence, candidate_codes=torch.full_like(batch.candidate_codes, code))


def without_candidates(inputs: dict[str, Tensor], keys: int) -> dict[str, Tensor]:
    """The last `keys` features of the sequence are candidates'."""
    empty = {name: x[:0] for name, x in inputs.items() if name.startswith("candidate_")}
    lengths = inputs["sequence_lengths"].clone()
    kept = int(lengths[:-keys].sum())
    lengths[-keys:] = 0
    sequence = {"sequence_values": inputs["sequence_values"][:kept], "sequence_lengths": lengths}
    return inputs | empty | sequence | {"offsets": torch.zeros_like(inputs["offsets"])}


def test_a_request_without_candidates_has_no_scores(served: Served):
    keys = len(served.spec.sequence)
    assert served.whole(**without_candidates(inputs_of(served.batch), keys)).shape == (0, 3)
    inputs = ranker_inputs_of(served.batch, served.spec, short_length_of(served.config))
    probes, records = probes_of(served.batch, served.blocks)
    memory = served.encoder(**encoder_inputs_of(served.batch, probes)) | {name: x[:0] for name, x in records.items()}
    assert served.reader(**without_candidates(inputs, keys), memory=memory).shape == (0, 3)


def test_codes_beyond_the_codebook_are_none(served: Served):
    batch = served.batch
    beyond = batch._replace(event_codes=batch.event_codes + 10**6)
    none = batch._replace(event_codes=torch.zeros_like(batch.event_codes))
    for score in (lambda b: served.whole(**inputs_of(b)), served.by_the_pair):
        assert torch.equal(score(beyond), score(none))
        assert not torch.equal(score(batch), score(none))


def test_candidates_codes_beyond_the_codebook_are_none(served: Served):
    """As ids of the sequence, which a probe's embedding is looked up by, and as codes."""
    beyond, none = (with_candidates_code(served.batch, code) for code in (10**6, 0))
    for score in (lambda b: served.whole(**inputs_of(b)), served.by_the_pair):
        assert torch.equal(score(beyond), score(none))
        assert not torch.equal(score(served.batch), score(none))
