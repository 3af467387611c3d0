"""Deep Interest Network's local activation unit on the latest events (Zhou et al. 2018, arXiv:1706.06978).

The weight of event i for target t is ``MLP([e_t; e_i; e_t − e_i; e_t ⊙ e_i])``, the output ``Σ_i weight_i e_i``. The
first layer is linear, so it is split by its four inputs: what depends on the target alone or on the event alone is
multiplied once per candidate or once per event. The pair's own input needs no pair's vector: ``(e_t ⊙ e_i) W = e_i
(diag(e_t) W)``, a product of a chunk of events with what each candidate makes of W. Events are gathered once a chunk
for all candidates of a tile, also those of several requests (:mod:`ranker.ops.units`).

Not in the paper: the unit sees events and candidates through a LayerNorm each (`normalise`). Small embeddings have far
smaller products, and the unit would take epochs to see what it is for: MovieLens 1M, validation AUC .787 to .792.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from ranker.longseq.protocol import History, Target, covered, latest
from ranker.ops.jagged import log_bucket, segment_sum, segments_of
from ranker.ops.padded import exporting, with_spare
from ranker.ops.units import in_units, merge, out_of_units, shared_windows, sizes_of, units_of


class DIN(nn.Module):
    """DIN over the latest `length` events of each request (0: all of them).

    Args:
        dim: width of events and candidates; the output's too.
        hidden: widths of the activation unit's hidden layers, at least one.
        softmax: normalise the weights over the events (the paper does not).
        age_buckets: buckets of log2(age in seconds) with a learned term in the first hidden layer; 0 for none.
        normalise: what the activation unit sees, not what is summed; False for the paper's unit.
    """

    def __init__(
        self,
        dim: int,
        hidden: list[int],
        length: int = 50,
        softmax: bool = False,
        age_buckets: int = 0,
        normalise: bool = True,
    ) -> None:
        super().__init__()
        self.out_dim, self.length, self.softmax = dim, length, softmax
        self.age_buckets, self.normalise = age_buckets, normalise
        width = hidden[0]
        self.target_norm = nn.LayerNorm(dim) if normalise else nn.Identity()
        self.event_norm = nn.LayerNorm(dim) if normalise else nn.Identity()
        bound = 1.0 / math.sqrt(4 * dim)
        self.w_target = nn.Parameter(torch.empty(dim, width).uniform_(-bound, bound))
        self.w_event = nn.Parameter(torch.empty(dim, width).uniform_(-bound, bound))
        self.w_difference = nn.Parameter(torch.empty(dim, width).uniform_(-bound, bound))
        self.w_product = nn.Parameter(torch.empty(dim, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(width))
        self.age = nn.Parameter(torch.zeros(age_buckets, width)) if age_buckets > 0 else None
        layers: list[nn.Module] = []
        for a, b in pairwise(hidden):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.rest = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))

    def forward(self, history: History, target: Target) -> Tensor:
        """`[N, dim]`; zero for an empty history."""
        history = latest(history, self.length)
        if self.length > 0 and (torch.jit.is_scripting() or not exporting()):
            history = covered(history)
        candidates = target.x.size(0)
        if not torch.jit.is_scripting() and exporting():
            history = history._replace(x=with_spare(history.x), time=with_spare(history.time))
            target = target._replace(x=with_spare(target.x))
        dim, width = target.x.size(1), self.bias.numel()
        shared = shared_windows(target.offsets, history.start, history.end)
        tile_width, chunk = sizes_of(shared.q_offsets, shared.start, shared.end)
        if torch.jit.is_scripting() or not exporting():
            chunk = min(chunk, 64)  # narrower products than attention's: padding costs more than batches do
        plan = units_of(shared.q_offsets, shared.start, shared.end, tile_width, chunk)
        tiles, units = plan.row.size(0), plan.tile.numel()

        event = (shared.start[plan.request].unsqueeze(1) + plan.within).flatten()
        x = history.x.index_select(0, event).view(units, chunk, dim)
        # with a one behind each event, what depends on the candidate alone is one more row of the candidate's map
        seen_event = torch.nn.functional.pad(self.event_norm(history.x), [0, 1], value=1.0)
        seen_event = seen_event.index_select(0, event).view(units, chunk, dim + 1)
        seen_target = self.target_norm(target.x)
        of_target = seen_target @ (self.w_target + self.w_difference) + self.bias
        of_event = seen_target.unsqueeze(2) * self.w_product + (self.w_event - self.w_difference)  # [N, dim, width]
        maps = torch.cat([of_event, of_target.unsqueeze(1)], 1).index_select(0, plan.row.flatten())
        maps = maps.view(tiles, tile_width, dim + 1, width).transpose(1, 2).flatten(2)
        hidden = torch.bmm(seen_event, maps.index_select(0, plan.tile))  # [units, chunk, tile_width · width]
        age = self.age
        if age is not None:
            now = in_units(history.now.index_select(0, segments_of(target.offsets, candidates)), plan)
            age_s = (now - history.time[event].view(units, chunk, 1)) // 1000
            hidden = hidden.add_(age[log_bucket(age_s, self.age_buckets)].flatten(2))
        hidden = hidden.relu_().view(units, chunk, tile_width, width)
        weight = self.rest(hidden).squeeze(3).transpose(1, 2)  # [units, tile_width, chunk]
        real = plan.real_key.unsqueeze(1)
        if shared.low.numel() > 0:
            within = plan.within.unsqueeze(2)
            seen = (within >= in_units(shared.low, plan)) & (within < in_units(shared.high, plan))
            real = real & seen.transpose(1, 2)
        if self.softmax:
            weight = weight.masked_fill(~real, float("-inf"))
            top = weight.detach().amax(2).clamp(min=-1e30)  # finite, where a candidate sees nothing of a unit
            weight = torch.exp(weight - top.unsqueeze(2))
            out = merge(top, weight.sum(2), torch.bmm(weight, x), plan.tile, tiles)
        else:
            out = segment_sum(torch.bmm(weight * real, x), plan.tile, tiles)
        return out_of_units(out, plan, target.offsets, candidates)
