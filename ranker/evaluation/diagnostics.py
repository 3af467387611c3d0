"""What the long-sequence blocks of a trained ranker do with histories: measured by `ranker evaluate` on a sample.

- UxSID: Int.R@k, the share of the k events with most attention that have the group of the probe.
- HiSAC: agents made of a history, and events that no agent can be made of.
- HyTRec with a next-item head: how often the event after the long branch is found among the known items.

The sample is the first requests of a shuffled pass over the split, on several ranks those of the first rank's share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.batch import names, sequence_keys
from features.dataset import Dataset
from features.loader import Loader, Selection
from features.schema import Split
from features.selection import FeatureSpec
from features.views import item_file
from ranker.blocks import Block
from ranker.config import TrainConfig
from ranker.evaluation.report import BlockReport, Figure
from ranker.longseq import HiSAC, History, HyTRec, Target, UxSID
from ranker.longseq.protocol import latest
from ranker.longseq.uxsid import interest_recall
from ranker.model import Dense, plain_of
from ranker.ops.next_item import hit_rate_at_k, ndcg_at_k
from ranker.ranks import Ranks
from ranker.tables.embeddings import Tables

SAMPLE = 500
"""requests"""
POOL = 10_000
"""items that the next one is looked for among, at most: a seeded sample where more are known"""
RECALL_AT = (10, 50)
NEXT_AT = (10, 500)

M = TypeVar("M", bound=nn.Module)


@dataclass
class _Mean:
    """A mean over `what`, gathered batch by batch."""

    what: str
    total: float = 0.0
    count: int = 0

    def add(self, mean: float, count: int) -> None:
        """`mean` of `count` more."""
        if count > 0:  # the mean of none is no number
            self.total += mean * count
            self.count += count

    def figure(self, name: str) -> Figure:
        """Undefined over nothing."""
        return Figure(name, self.total / self.count if self.count else None, self.count, self.what)


class Items(NamedTuple):
    """A pool of items. id: `[I]` dense indices; x: `[I, d]` what candidates with these items would be embedded as."""

    id: Tensor
    x: Tensor


class Sample(NamedTuple):
    """A batch's requests. following: `[T]` the events' dense item indices; pool: where next items are looked for; both
    only where some block predicts them. Others as :meth:`ranker.blocks.Block.inputs` reads them."""

    history: History
    target: Target
    following: Tensor
    pool: Items | None


class _Interests:
    """Int.R@k of probes with a code and a history, and of attention that is blind: that takes all events alike."""

    def __init__(self, block: Block, uxsid: UxSID) -> None:
        self.block, self.uxsid = block, uxsid
        self.recall, self.blind = {k: _Mean("probes") for k in RECALL_AT}, _Mean("probes")

    def add(self, sample: Sample) -> None:
        """Measure a batch's requests."""
        if self.uxsid.global_head is None:
            return  # no probe attends to the events
        group = sample.history.code[:, self.block.probe_column]
        history, probes, _ = self.block.inputs(sample.history, sample.target)
        history = latest(history, self.uxsid.length)
        attention = [weights.probes for weights in self.uxsid.attention(history, probes)]
        events = [group[a:b] for a, b in zip(history.start.tolist(), history.end.tolist(), strict=True)]
        asked = [probes.code[probes.request == r] for r in range(len(events))]
        for k, mean in self.recall.items():
            shares = interest_recall(attention, events, asked, k)
            mean.add(float(shares.mean()), shares.numel())
        shares = interest_recall(attention, events, asked, max((e.numel() for e in events), default=0))
        self.blind.add(float(shares.mean()), shares.numel())

    def figures(self) -> list[Figure]:
        """One for each k, and the blind one."""
        return [*(mean.figure(f"Int.R@{k}") for k, mean in self.recall.items()), self.blind.figure("Int.R of all")]


class _AgentCounts:
    """Agents a history, and the share of events that have no vote."""

    def __init__(self, block: Block, hisac: HiSAC) -> None:
        self.block, self.hisac = block, hisac
        self.agents, self.outside = _Mean("requests with events"), _Mean("events")

    def add(self, sample: Sample) -> None:
        """Measure a batch's requests."""
        history, _, _ = self.block.inputs(sample.history, sample.target)
        agents = self.hisac.agents_of(history)
        history = latest(history, self.hisac.length)
        events = history.end - history.start
        made = (agents.offsets[1:] - agents.offsets[:-1])[events > 0].double()
        self.agents.add(float(made.mean()), made.numel())
        total = int(events.sum())
        self.outside.add(1 - int(agents.voters.sum()) / max(total, 1), total)

    def figures(self) -> list[Figure]:
        """Both."""
        return [self.agents.figure("agents"), self.outside.figure("without a full semantic ID")]


class _NextItems:
    """Hit Rate and NDCG of the event after the long branch, where training knew its item."""

    def __init__(self, block: Block, hytrec: HyTRec) -> None:
        self.block, self.hytrec = block, hytrec
        self.found = {f"{name}@{k}": _Mean("next items") for k in NEXT_AT for name in ("HR", "NDCG")}

    def add(self, sample: Sample) -> None:
        """Measure a batch's requests."""
        if sample.pool is None:
            return
        history, _, _ = self.block.inputs(sample.history, sample.target)
        following, pool = sample.following[next_event(history, self.hytrec)], sample.pool
        scores = self.hytrec.score_next(history, pool.x)
        place = torch.searchsorted(pool.id, following).clamp(max=pool.id.numel() - 1)
        known = pool.id[place] == following
        scores, place = scores[known], place[known]
        for k in NEXT_AT:
            for name, measure in (("HR", hit_rate_at_k), ("NDCG", ndcg_at_k)):
                mean = self.found[f"{name}@{k}"]
                mean.add(float(measure(scores, place, k)), place.numel())
                mean.what = f"next items among {pool.id.numel():,}"

    def figures(self) -> list[Figure]:
        """Two for each k."""
        return [mean.figure(name) for name, mean in self.found.items()]


_Measure = _Interests | _AgentCounts | _NextItems


def next_event(history: History, hytrec: HyTRec) -> Tensor:
    """The event `[R']` that follows the long branch of each request that has one: what `score_next` looks for."""
    history = latest(history, hytrec.length)
    split = torch.maximum(history.start, history.end - hytrec.short_length)
    return split[split > history.start]


def first_requests(history: History, target: Target, n: int) -> tuple[History, Target]:
    """The first `n` requests of a batch; events stay where they are."""
    candidates = int(target.offsets[: n + 1][-1])
    history = history._replace(start=history.start[:n], end=history.end[:n], now=history.now[:n])
    return history, Target(target.x[:candidates], target.offsets[: n + 1], target.probe, target.code[:candidates])


def measures_of(model: nn.Module) -> list[_Measure]:
    """What there is to measure of a ranker's blocks."""
    found: list[_Measure] = []
    for block in _all(model, Block):
        method = block.block
        if isinstance(method, UxSID):
            found.append(_Interests(block, method))
        elif isinstance(method, HiSAC):
            found.append(_AgentCounts(block, method))
        elif isinstance(method, HyTRec) and method.next_item_weight > 0:
            found.append(_NextItems(block, method))
    return found


@torch.no_grad()
def diagnose(
    model: nn.Module,
    dataset: Dataset,
    split: Split,
    selection: Selection,
    config: TrainConfig,
    ranks: Ranks,
    sample: int = SAMPLE,
    pool: int = POOL,
) -> list[BlockReport]:
    """Measure the blocks of a ranker, sharded or not, on this rank's sample. All ranks call it: tables are shared."""
    measures = measures_of(model.eval())
    if not measures:
        return []
    (tables,), (dense,) = _all(model, Tables), _all(model, Dense)
    next_items = [measure for measure in measures if isinstance(measure, _NextItems)]
    # an item's hashed id does not tell which item it is
    finds = len(next_items) > 0 and "item" in tables.shared and "item" not in dataset.manifest.hashed_ids
    items = _Pool(dataset, selection.spec, tables, pool, config.seed) if finds else None
    measured = 0
    for batch in _shuffled(dataset, split, selection, config, ranks).batches():
        batch = batch.to(ranks.device)
        embedded = tables(batch.request, batch.candidate, batch.sequence)
        left = max(sample - measured, 0)
        history, target = first_requests(*dense.sequences(embedded, plain_of(batch)), left)
        measured += history.start.numel()
        following, known = history.time, None
        if items is not None:
            following = batch.sequence["history:item"].values()
            asked = [next_event(history, measure.hytrec) for measure in next_items]
            known = items.with_items(following[torch.cat(asked)])
        for measure in measures:
            measure.add(Sample(history, target, following, known))
        if ranks.total(float(measured < sample)) == 0:  # together: a look-up in shared tables takes every rank
            break
    return [BlockReport(m.block.name, m.block.kind, measured, m.figures()) for m in measures]


class _Pool:
    """Items by their embeddings, looked up anew for each batch: tables may be on other ranks."""

    def __init__(self, dataset: Dataset, spec: FeatureSpec, tables: Tables, size: int, seed: int) -> None:
        self.tables, self.keys, self.features = tables, sequence_keys(spec), names(spec.sequence)
        self.file, self.known = item_file(dataset), dataset.manifest.known_items
        ids = np.arange(1, self.known)
        if ids.size > size:
            ids = np.sort(np.random.default_rng(seed).choice(ids, size, replace=False))
        self.ids = torch.from_numpy(ids)

    def with_items(self, more: Tensor) -> Items:
        """The pool, and those of `more` that training knew."""
        more = more[(more > 0) & (more < self.known)]
        id = torch.cat([self.ids.to(more.device), more]).unique()
        rows = id.cpu().numpy()
        columns = [rows if name == "item" else self.file.flat(name).take(rows) for name in self.features]
        values = torch.from_numpy(np.concatenate(columns).astype(np.int64)).to(id.device)
        histories = len(self.keys) - len(columns)  # none of these items is in a history
        lengths = torch.tensor([0] * histories + [rows.size] * len(columns), device=id.device)
        ids = KeyedJaggedTensor(self.keys, values, lengths=lengths)
        return Items(id, self.tables.shared_of(self.tables.rows(ids))[1])


def _shuffled(dataset: Dataset, split: Split, selection: Selection, config: TrainConfig, ranks: Ranks) -> Loader:
    """The split in a seeded order, no id dropped."""
    loader = config.loader.model_copy(update={"shards": None, "drop_item": 0.0, "drop_user": 0.0})
    return Loader(dataset, (split,), selection, loader, config.seed, True, ranks.rank, ranks.world)


def _all(model: nn.Module, kind: type[M]) -> list[M]:
    return [module for module in model.modules() if isinstance(module, kind)]
