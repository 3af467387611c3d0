"""The ranker as two files with a memory store between them: what is known of a user, and what is known of candidates.

The user encoder makes a record of each history, or of each group that a history is probed with; the candidate ranker
reads records beside the short history. Both are the ranker's own code, with the tables that they need; their dense
parameters, small beside tables, are the ranker's whole. Records are made and read wherever and whenever: a record of
lengths 0, 0 is a lost one, and reads as an empty history.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.batch import names, sequence_keys
from features.selection import FeatureSpec
from ranker.config import TablesConfig
from ranker.export.whole import known_ids, sizes
from ranker.longseq import Probes, Stored, Target
from ranker.model import Plain, Ranker
from ranker.ops.probing import known_codes
from ranker.tables.embeddings import Tables
from ranker.towers import esmm_probabilities


class UserEncoder(nn.Module):
    """Histories, and what they are probed with, to records. Unknown ids read row 0, as in the whole ranker."""

    none: list[str]
    code_sizes: list[int]

    def __init__(self, ranker: Ranker, spec: FeatureSpec, config: TablesConfig) -> None:
        super().__init__()
        own = replace(spec, request=(), candidate=())
        self.tables, self.dense = tables_for(own, ranker.tables, config), ranker.dense
        self.none, self.keys = [], sequence_keys(own)
        self.sizes = sizes((*own.sequence, *own.event, *own.content, *own.sequence))
        self.shared = len(own.sequence)
        self.code_sizes = sizes(own.codes)

    def forward(
        self,
        history_values: Tensor,
        history_lengths: Tensor,
        event_dense: Tensor,
        event_codes: Tensor,
        event_time: Tensor,
        now: Tensor,
        start: Tensor,
        end: Tensor,
        probes: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """For block i `i.values`, `i.exact`, `i.lengths` and `i.time`: a :class:`~ranker.longseq.stored.Stored`.

        Args:
            history_values, history_lengths: the ``history:`` keys of a sequence, at stride R.
            probes: for a block i with probes, `i.code` and `i.request` `[Q]`, ascending by request, each pair once.
        """
        asked, asking = self._looked_up(probes, now)
        values = torch.cat([history_values, asked])
        lengths = torch.cat([history_lengths, asking.to(history_lengths.dtype).repeat(self.shared)])
        sequence = KeyedJaggedTensor(self.keys, known_ids(values, lengths, self.sizes), lengths=lengths)
        nothing = KeyedJaggedTensor(self.none, values[:0], lengths=lengths[:0])
        embedded = self.tables(nothing, nothing, sequence)
        event_codes = known_codes(event_codes, self.code_sizes)
        unread, none = event_dense[:0, :0], now[:0]
        plain = Plain(
            unread, unread, event_dense, event_codes, event_codes[:0], event_time, now, start, end, none
        )  # fmt: skip
        history, _ = self.dense.sequences(embedded, plain)
        stored: dict[str, Tensor] = {}
        first = 0
        for i, block in enumerate(self.dense.long):
            asks = Probes(embedded.target[:0], none, none)
            if block.probe_column >= 0:  # type: ignore[operator]
                code = probes[f"{i}.code"]
                x = embedded.target.narrow(0, first, code.numel()).narrow(1, block.probe_start, block.dim)
                asks = Probes(x, code, probes[f"{i}.request"])
                first += code.numel()
            record = block.store(history, asks)  # type: ignore[operator]
            stored[f"{i}.values"] = record.values
            stored[f"{i}.exact"] = record.exact
            stored[f"{i}.lengths"] = record.lengths
            stored[f"{i}.time"] = record.time
        return stored

    def _looked_up(self, probes: dict[str, Tensor], now: Tensor) -> tuple[Tensor, Tensor]:
        """Probes as candidates of which no more is known than the group: their ids, feature by feature, one block's
        probes after another's; and how many each request has `[R]`."""
        ids = [torch.zeros([self.shared, 0], dtype=torch.int64, device=now.device)]
        of_request = torch.zeros_like(now)
        place = torch.arange(self.shared, device=now.device).unsqueeze(1)
        for i, block in enumerate(self.dense.long):
            if block.probe_column >= 0:  # type: ignore[operator]
                code, request = probes[f"{i}.code"], probes[f"{i}.request"]
                feature = block.probe_start // block.dim  # type: ignore[operator]
                ids.append(torch.where(place == feature, code.unsqueeze(0), 0))
                of_request = of_request.index_add(0, request, torch.ones_like(request))
        return torch.cat(ids, 1).flatten(), of_request


class CandidateRanker(nn.Module):
    """Candidates, the short history and records to the whole ranker's scores; no content vectors, no codes of events.
    Candidates' codes are their ids of the sequence's features: those that blocks read of candidates are among these."""

    # lists may be empty, and then do not tell their type
    request_keys: list[str]
    candidate_keys: list[str]
    request_sizes: list[int]
    candidate_sizes: list[int]
    code_places: list[int]

    def __init__(self, ranker: Ranker, spec: FeatureSpec, config: TablesConfig) -> None:
        super().__init__()
        own = replace(spec, content=())
        self.tables, self.dense = tables_for(own, ranker.tables, config), ranker.dense
        self.request_keys, self.candidate_keys = names(own.request), names(own.candidate)
        self.sequence_keys = sequence_keys(own)
        self.history_keys = len(own.sequence) + len(own.event)
        self.request_sizes, self.candidate_sizes = sizes(own.request), sizes(own.candidate)
        self.sequence_sizes = sizes((*own.sequence, *own.event, *own.sequence))
        have = names(own.sequence)
        self.code_places = [have.index(name) if name in have else -1 for name in names(own.codes)]

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
        event_time: Tensor,
        now: Tensor,
        start: Tensor,
        end: Tensor,
        offsets: Tensor,
        memory: dict[str, Tensor],
    ) -> Tensor:
        """Probabilities, as the whole ranker's.

        Args:
            sequence_values, sequence_lengths: without the whole ranker's content keys. Of the history no more is read
                than the short history's latest events; others may be there or not.
            memory: for block i `i.values`, `i.exact`, `i.lengths` and `i.time`: records of the R requests in their
                order, or, for a block with probes, of any groups, with `i.probe` `[N]`, the record of each candidate.
        """
        if torch.jit.is_scripting() and candidate_dense.size(0) == 0:  # which TorchRec's look-ups do not take
            return esmm_probabilities(torch.zeros([0, self.dense.tasks]))
        request_values = known_ids(request_values, request_lengths, self.request_sizes)
        candidate_values = known_ids(candidate_values, candidate_lengths, self.candidate_sizes)
        sequence_values = known_ids(sequence_values, sequence_lengths, self.sequence_sizes)
        embedded = self.tables(
            KeyedJaggedTensor(self.request_keys, request_values, lengths=request_lengths),
            KeyedJaggedTensor(self.candidate_keys, candidate_values, lengths=candidate_lengths),
            KeyedJaggedTensor(self.sequence_keys, sequence_values, lengths=sequence_lengths),
        )
        no_codes = event_time.unsqueeze(1)[:, :0]
        codes = self._codes(sequence_values, candidate_dense.size(0))
        plain = Plain(
            request_dense, candidate_dense, event_dense, no_codes, codes, event_time, now, start, end, offsets
        )  # fmt: skip
        history, target = self.dense.sequences(embedded, plain)
        found: list[Tensor] = []
        for i, block in enumerate(self.dense.long):
            stored = Stored(
                memory[f"{i}.values"], memory[f"{i}.exact"], memory[f"{i}.lengths"], memory[f"{i}.time"]
            )  # fmt: skip
            probe = target.probe
            if block.probe_column >= 0:  # type: ignore[operator]
                probe = memory[f"{i}.probe"]
            own = Target(target.x, target.offsets, probe, target.code)
            found.append(block.read_stored(stored, now, own))  # type: ignore[operator]
        return esmm_probabilities(self.dense.logits(embedded, plain, history, target, found))

    def _codes(self, sequence_values: Tensor, candidates: int) -> Tensor:
        """Those of ``features.codes`` that are in ``features.sequence`` too `[N, codes]`; 0, none, of the others."""
        keys = len(self.sequence_keys)
        of_events = sequence_values.numel() - (keys - self.history_keys) * candidates
        ids = sequence_values[of_events:].view(keys - self.history_keys, candidates)
        found = [ids[place] if place >= 0 else torch.zeros_like(ids[0]) for place in self.code_places]
        if len(found) == 0:
            return ids.t()[:, :0]
        return torch.stack(found, 1)


def tables_for(spec: FeatureSpec, tables: Tables, config: TablesConfig) -> Tables:
    """Those of a ranker's tables that the features of `spec`, some of the ranker's, need; not copied."""
    read = {f.name for f in (*spec.request, *spec.candidate, *spec.sequence, *spec.event)}
    pooled = {f.name for f in (*spec.request, *spec.candidate)}
    own = config.model_copy(
        update={
            "dims": {name: dim for name, dim in config.dims.items() if name in pooled},
            "buckets": {name: fewer for name, fewer in config.buckets.items() if name in read},
            "managed_collision": {name: rows for name, rows in config.managed_collision.items() if name in read},
        }
    )
    kept = Tables(spec, own, device=torch.device("meta"), held=True)
    managed = [f"managed_{place}" for place in ("request", "candidate", "sequence", "events")]
    for place in ("request", "candidate", "sequence", "events", "content", *managed):
        if getattr(kept, place):  # neither None nor an empty list
            setattr(kept, place, getattr(tables, place))
    return kept
