"""From a batch of users to the records of all their memories, by the blocks that train and serve.

A probe is embedded as a candidate of which no more is known than its group, as in the exported user encoder; a code
that many users of the batch have is looked up once.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.batch import RequestBatch
from features.dataset import Dataset
from features.errors import UserError
from features.selection import FeatureSpec
from ranker.blocks import Block
from ranker.config import TrainConfig
from ranker.export.inputs import StoredBlock, stored_blocks
from ranker.longseq import Probes, Stored
from ranker.memory.config import CodesConfig
from ranker.memory.policy import Codes, codes_of, nearest_codes
from ranker.model import Dense, plain_of
from ranker.tables.embeddings import Tables

M = TypeVar("M", bound=nn.Module)


class BlockRecords(NamedTuple):
    """What a store keeps of one block for a batch of users. codes: of which group each record is; None where each user
    has one."""

    block: StoredBlock
    stored: Stored
    codes: Codes | None


class RecordMaker:
    """Makes the records of a ranker's compressors.

    Args:
        model: sharded or not; with several ranks all of them make records together.
        dataset: the run's own, for its codewords.

    Raises:
        UserError: no block's memory can be kept, or the policy needs semantic IDs where there are none.
    """

    def __init__(
        self, model: nn.Module, spec: FeatureSpec, config: TrainConfig, codes: CodesConfig, dataset: Dataset
    ) -> None:
        (self._tables,), (self._dense,) = _all(model.eval(), Tables), _all(model, Dense)
        self.blocks, self._codes = compressors(config, spec), codes
        self._shared = len(spec.sequence)
        self._nearest = {
            block.number: _nearest(block, dataset, codes) for block in self.blocks if codes.policy == "nearest"
        }

    @torch.no_grad()
    def make(self, batch: RequestBatch) -> list[BlockRecords]:
        """The records of a batch of users without candidates (:mod:`features.users`)."""
        asked = {
            block.number: self.codes(block, batch.event_codes, batch.start, batch.end)
            for block in self.blocks
            if block.probe is not None
        }
        distinct = {number: torch.unique(codes.code, return_inverse=True) for number, codes in asked.items()}
        sequence = self._with_probes(batch, {number: codes for number, (codes, _) in distinct.items()})
        embedded = self._tables(batch.request, _one_empty_row(batch.candidate), sequence)
        history, _ = self._dense.sequences(embedded, plain_of(batch))
        none = torch.zeros([0], dtype=torch.int64, device=batch.now.device)
        made: list[BlockRecords] = []
        first = 0
        for block in self.blocks:
            module = self._module(block)
            probes, codes = Probes(embedded.target[:0], none, none), asked.get(block.number)
            if codes is not None:
                found, which = distinct[block.number]
                x = embedded.target.narrow(0, first, found.numel()).narrow(1, module.probe_start, module.dim)
                probes = Probes(x.index_select(0, which), codes.code, codes.request)
                first += found.numel()
            made.append(BlockRecords(block, module.store(history, probes), codes))
        return made

    def codes(self, block: StoredBlock, event_codes: Tensor, start: Tensor, end: Tensor) -> Codes:
        """The groups of each user that a block with probes gets records of.

        Args:
            event_codes: `[T, codes]`; start, end: `[R]`, each user's events.
        """
        nearest = self._nearest.get(block.number)
        if nearest is not None and nearest.device != start.device:
            nearest = self._nearest[block.number] = nearest.to(start.device)
        return codes_of(self._codes, event_codes[:, block.column], start, end, nearest)

    def _module(self, block: StoredBlock) -> Block:
        module = self._dense.long[block.number]
        assert isinstance(module, Block)
        return module

    def _with_probes(self, batch: RequestBatch, codes: dict[int, Tensor]) -> KeyedJaggedTensor:
        """The batch's sequences with these codes of each block as candidates of its first request: a group's embedding
        is of no request in particular."""
        sequence = batch.sequence
        columns = [torch.zeros([self._shared, 0], dtype=torch.int64, device=batch.now.device)]
        place = torch.arange(self._shared, device=batch.now.device).unsqueeze(1)
        for block in self.blocks:
            if block.number in codes:
                module = self._module(block)
                columns.append(torch.where(place == module.probe_start // module.dim, codes[block.number], 0))
        candidates = torch.cat(columns, 1)  # [features, D]
        lengths = sequence.lengths().view(-1, batch.requests).clone()
        lengths[-self._shared :, 0] = candidates.size(1)
        values = torch.cat([sequence.values(), candidates.flatten()])
        return KeyedJaggedTensor(sequence.keys(), values, lengths=lengths.flatten())


def compressors(config: TrainConfig, spec: FeatureSpec) -> list[StoredBlock]:
    """The blocks of a ranker whose memory a store keeps.

    Raises:
        UserError: it has none.
    """
    blocks = stored_blocks(config, spec)
    if not blocks:
        types = ", ".join(f"model.long[{i}] ({block.type})" for i, block in enumerate(config.model.long))
        raise UserError(
            f"no block has a memory that a store could keep; model.long has {types or 'none'}: `ranker schema train` "
            "lists compressors, such as uxsid, hisac and hytrec"
        )
    return blocks


def _one_empty_row(candidate: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """A candidate without ids, whose embedding nobody reads: unsharded tables look up no batch of no rows."""
    lengths = torch.zeros([len(candidate.keys())], dtype=candidate.lengths().dtype, device=candidate.values().device)
    return KeyedJaggedTensor(candidate.keys(), candidate.values(), lengths=lengths)


def _nearest(block: StoredBlock, dataset: Dataset, codes: CodesConfig) -> Tensor:
    """Each code's nearest ones, by the codewords of its level."""
    if block.probe is None:
        return torch.zeros([1, 0], dtype=torch.int64)
    scope, _, name = block.probe.partition(".")
    column = dataset.manifest.columns.get(scope, {}).get(name)
    codebook = column.codebook if column is not None else None
    level = name.removeprefix(f"{codebook}_")
    if codebook is None or not level.isdigit():
        raise UserError(
            f"codes.policy: nearest needs codewords, and {block.probe}, the probe of model.long[{block.number}], is no "
            "level of a semantic ID; set it to seen or frequent"
        )
    return nearest_codes(torch.from_numpy(dataset.codewords(codebook)[int(level) - 1]), codes.most)


def _all(model: nn.Module, kind: type[M]) -> list[M]:
    return [module for module in model.modules() if isinstance(module, kind)]
