"""The ranker: tables, DIN on the short history, long-sequence blocks, tower.

One forward pass scores R requests × their candidates.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from features.batch import RequestBatch
from features.selection import FeatureSpec
from ranker.blocks import Block, Codewords
from ranker.config import TrainConfig
from ranker.longseq import History, Target
from ranker.ops.jagged import segments_of
from ranker.tables.embeddings import Embedded, Tables
from ranker.towers import DIN, MLP, MMoE

Moments = dict[str, tuple[float, float]]


class Plain(NamedTuple):
    """What the dense part reads beside embeddings; fields as in :class:`features.batch.RequestBatch`."""

    request_dense: Tensor
    candidate_dense: Tensor
    event_dense: Tensor
    event_codes: Tensor
    candidate_codes: Tensor
    event_time: Tensor
    now: Tensor
    start: Tensor
    end: Tensor
    offsets: Tensor


def plain_of(batch: RequestBatch) -> Plain:
    """What of a batch is no embedding's id."""
    return Plain(
        batch.request_dense, batch.candidate_dense, batch.event_dense, batch.event_codes, batch.candidate_codes,
        batch.event_time, batch.now, batch.start, batch.end, batch.offsets,
    )  # fmt: skip


class Scores(NamedTuple):
    """logits: `[N, tasks]`, click, and conversion given a click; auxiliary: the blocks' own losses, a scalar;
    click_logits: `[N, k]`, the blocks' own of a click, in training; their losses weigh `TrainConfig.search_weights`."""

    logits: Tensor
    auxiliary: Tensor
    click_logits: Tensor


class Standardise(nn.Module):
    """(x − mean) / deviation, by column, clipped to ±5 so that a rare outlier does not rule the step."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, names: list[str], moments: Moments) -> None:
        super().__init__()
        known = [moments.get(name, (0.0, 1.0)) for name in names]
        self.register_buffer("mean", torch.tensor([m for m, _ in known]).float())
        self.register_buffer("deviation", torch.tensor([s for _, s in known]).float())

    def forward(self, x: Tensor) -> Tensor:
        """`[·, features]` in and out."""
        return ((x - self.mean) / self.deviation).clamp(-5, 5)


class Crossed(nn.Module):
    """What a candidate found in its history, `[N, width]`, and beside it the product with the candidate itself.

    Whether the two agree is what decides, and layers on their concatenation learn a product slowly (as in DIN's e_t ⊙
    e_i, Zhou et al. 2018; here the candidate is projected to `width` first). Off, nothing is added.

    Args:
        dim: width of a candidate.
        width: of what it found.
        on: False for what it found alone.
    """

    def __init__(self, dim: int, width: int, on: bool) -> None:
        super().__init__()
        self.project = nn.Linear(dim, width, bias=False) if on else None

    def forward(self, found: Tensor, candidate: Tensor) -> Tensor:
        """`[N, width]` and `[N, dim]` to `[N, 2 · width]`, or to `[N, width]` if off."""
        if self.project is None:
            return found
        return torch.cat([found, found * self.project(candidate)], 1)


class Dense(nn.Module):
    """Everything but the tables: scriptable, and the same in training, evaluation and export."""

    def __init__(
        self, spec: FeatureSpec, config: TrainConfig, tables: Tables, moments: Moments, codewords: Codewords
    ) -> None:
        super().__init__()
        dim = tables.dim
        self.of_request = Standardise([f.name for f in spec.request_dense], moments)
        self.of_candidate = Standardise([f.name for f in spec.candidate_dense], moments)
        self.of_event = Standardise([f.name for f in spec.event_dense], moments)
        self.event_projection = nn.Linear(len(spec.event_dense), dim) if spec.event_dense else None
        short = config.model.short
        self.short = DIN(dim, **short.model_dump()) if short else None
        self.long = nn.ModuleList(
            [Block(i, block, spec, config.tables.dim, codewords) for i, block in enumerate(config.model.long)]
        )
        tower = config.model.tower
        self.target_in_tower = tower.target
        self.cross_short = Crossed(dim, dim, tower.cross and short is not None)
        self.cross_long = nn.ModuleList([Crossed(dim, block.out_dim, tower.cross) for block in self.long])  # type: ignore[arg-type]
        inputs = tables.request_width + tables.candidate_width + len(spec.request_dense) + len(spec.candidate_dense)
        found = dim * int(short is not None) + sum(block.out_dim for block in self.long)  # type: ignore[misc]
        inputs += dim * int(tower.target) + (2 if tower.cross else 1) * found
        self.tasks = tasks = 1 if config.tasks.conversion is None else 2
        self.tower = (
            MLP(inputs, tower.hidden, tasks, tower.dropout)
            if tower.type == "mlp"
            else MMoE(inputs, tower.hidden, tasks, tower.dropout, tower.experts)
        )

    def sequences(self, embedded: Embedded, plain: Plain) -> tuple[History, Target]:
        """Histories and candidates as long-sequence blocks read them, with every code and without probes."""
        x = embedded.event
        if self.event_projection is not None:
            x = x + self.event_projection(self.of_event(plain.event_dense))
        none = torch.zeros([0], dtype=torch.int64, device=x.device)
        history = History(x, plain.event_time, plain.start, plain.end, plain.now, plain.event_codes, embedded.content)
        return history, Target(embedded.target, plain.offsets, none, plain.candidate_codes)

    def forward(self, embedded: Embedded, plain: Plain) -> Scores:
        """Scores of all candidates."""
        history, target = self.sequences(embedded, plain)
        found: list[Tensor] = []
        auxiliary, click_logits = torch.zeros([], device=history.x.device), [target.x[:, :0]]
        for block in self.long:
            output = block(history, target)
            found.append(output.out)
            auxiliary = auxiliary + output.loss
            click_logits.append(output.click_logits)
        logits = self.logits(embedded, plain, history, target, found)
        return Scores(logits, auxiliary, torch.cat(click_logits, 1))

    def logits(self, embedded: Embedded, plain: Plain, history: History, target: Target, found: list[Tensor]) -> Tensor:
        """`[N, tasks]` from all that is known of candidates.

        Args:
            history: of which the short history is read; target: as of :meth:`sequences`.
            found: `[N, out_dim]` of each long-sequence block, what candidates read there.
        """
        request = segments_of(plain.offsets, target.x.size(0))
        per_request = torch.cat([embedded.request, self.of_request(plain.request_dense)], 1)
        parts = [per_request[request], embedded.candidate, self.of_candidate(plain.candidate_dense)]
        if self.target_in_tower:
            parts.append(target.x)
        if self.short is not None:
            parts.append(self.cross_short(self.short(history, target), target.x))
        for i, cross in enumerate(self.cross_long):
            parts.append(cross(found[i], target.x))
        return self.tower(torch.cat(parts, 1))


class Ranker(nn.Module):
    """Tables and dense part together, from a :class:`RequestBatch` to scores.

    Args:
        moments: mean and deviation of dense features, kept with the model's state.
        codewords: of the codebooks that blocks name, kept with it too.
        device: of the tables; ``meta`` when TorchRec is to shard them.
        held: managed tables are as training left them (:mod:`ranker.tables.held_rows`).
    """

    def __init__(
        self,
        spec: FeatureSpec,
        config: TrainConfig,
        moments: Moments,
        codewords: Codewords | None = None,
        device: torch.device | None = None,
        held: bool = False,
    ) -> None:
        super().__init__()
        self.tables = Tables(spec, config.tables, device, held)
        self.dense = Dense(spec, config, self.tables, moments, codewords or {})

    def forward(self, batch: RequestBatch) -> Scores:
        """Scores of all candidates."""
        embedded = self.tables(batch.request, batch.candidate, batch.sequence)
        return self.dense(embedded, plain_of(batch))
