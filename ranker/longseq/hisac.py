"""HiSAC: a history becomes the user's interest agents, and candidates attend to the agents (Yuan et al. 2026,
arXiv:2602.21009). A compressor: `read` costs O(agents), whatever the length.

Every event's item has a frozen content vector z_i, a semantic ID (c_i^1 … c_i^M) in frozen codebooks C_1 … C_M, and a
ranking embedding e_i learned end to end. Events vote on the tree of codes, pruning keeps the leaves with most votes:
the agents (:mod:`ranker.ops.votes`). An agent's prototype in content space gathers the events by similarity, and what
it gathers is their ranking embeddings. An event without a semantic ID is not in content space and takes no part.

Which agents, and which weights, depends on frozen quantities only: agents can be made offline and handed in, and no
gradient flows through the weights.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ranker.longseq.heads import Heads
from ranker.longseq.protocol import History, Probes, Target, latest
from ranker.longseq.stored import Stored, restore_parts, store_parts
from ranker.ops.attention import window_attention
from ranker.ops.frozen_attention import frozen_attention, window_logsumexp
from ranker.ops.jagged import log_bucket, offsets_of, segment_softmax, segment_sum
from ranker.ops.padded import exporting
from ranker.ops.take_rows import take_rows
from ranker.ops.votes import Agents, Leaves, Nodes, history_leaves, keep_agents, keep_leaves, row_keys, tree_nodes

ROUTINGS = ("items", "agents", "hard")
SPACES = ("content", "codewords", "embedding")
_PIECE = 512
"""events whose routing weights are found at once"""


class HiSACMemory(NamedTuple):
    """What is kept of each request, of a size that does not follow its history's length.

    k, v: `[A, heads, d_head]` of the agents' representations; log_weight: `[A]` log w_a; offsets: `[R + 1]` int64, the
    agents of request r are ``offsets[r] : offsets[r + 1]``.
    """

    k: Tensor
    v: Tensor
    log_weight: Tensor
    offsets: Tensor


class Routed(NamedTuple):
    """What is routed to agents, request after request: events, or leaves that stand for all their events.

    z: `[n, dz]`; e: `[n, d]`; events: `[n]` how many a row stands for; offsets: `[R + 1]`; prototype: `[A, dz]`.
    """

    z: Tensor
    e: Tensor
    events: Tensor
    offsets: Tensor
    prototype: Tensor


class HiSAC(nn.Module):
    """Attention of candidates to the interest agents of a history.

    Args:
        dim: width of events and candidates.
        codewords: `[K_l + 1, dz]` of each level, row 0 zero: no code. Frozen.
        keep: [k_1 … k_M], children kept under each kept node; at most Π k_l agents.
        heads, head_dim: attention width is their product.
        gamma: agents weigh V^γ of their votes V; 0 weighs them all the same.
        temperature: of the routing, in units of the mean squared norm of the last level's codewords, which is about how
            far apart neighbouring leaves are. (z = "embedding": in units of the variance of the request's events.)
        routing: "items", softmax over the history's events for each agent; "agents", softmax over the agents for each
            event, then each agent's weighted mean; "hard", the mean of the events nearest to each agent.
        z: events' place for routing: their "content" vector; the sum of their "codewords", where all events of a leaf
            go together, so that cost follows distinct leaves; or, without content, their ranking "embedding"
            (detached), with the mean of an agent's own events as its prototype.
        voting: False makes every leaf of the history an agent, at most `most_leaves` of those with most votes.
        length: the latest events used, 0: all.
        age_buckets: buckets of log2(age in seconds): e_i decays by a learned factor of its age; 0 turns it off.
    """

    centre: Tensor
    codewords: Tensor
    first_code: Tensor
    most_code: Tensor

    def __init__(
        self,
        dim: int,
        codewords: list[Tensor],
        keep: list[int],
        heads: int = 2,
        head_dim: int = 16,
        gamma: float = 1.0,
        temperature: float = 1.0,
        routing: str = "items",
        z: str = "content",
        voting: bool = True,
        most_leaves: int = 1000,
        length: int = 0,
        age_buckets: int = 32,
    ) -> None:
        super().__init__()
        _check(codewords, keep, routing, z, temperature, most_leaves)
        self.out_dim = heads * head_dim
        self.heads, self.keep, self.gamma, self.routing, self.z = heads, list(keep), gamma, routing, z
        self.voting, self.most_leaves, self.length, self.age_buckets = voting, most_leaves, length, age_buckets
        scale = _mean_square(codewords[-1])
        if z == "embedding":
            scale = 1.0
        elif scale < 1e-3 * _mean_square(codewords[0]):  # no content left for the last level: routing would be noise
            scale = 1e-3 * _mean_square(codewords[0])
        self.temperature = temperature * (scale if scale > 0 else 1.0)
        # centred: a shift changes no distance, and near zero float32 loses less in 2 p·z − ‖z‖²
        self.register_buffer("centre", codewords[0][1:].mean(0))
        self.register_buffer("codewords", torch.cat(codewords))
        sizes = torch.tensor([level.size(0) for level in codewords])
        self.register_buffer("first_code", torch.cumsum(sizes, 0) - sizes)
        self.register_buffer("most_code", sizes - 1)
        self.project = Heads(dim, heads, head_dim)
        self.decay = nn.Parameter(torch.ones(age_buckets)) if age_buckets > 0 else None

    @torch.jit.export
    def agents_of(self, history: History) -> Agents:
        """The agents of each request: what an offline cache keeps, for :meth:`encode_with`."""
        return self._agents(self._leaves(history))

    @torch.jit.export
    def encode_with(self, history: History, agents: Agents) -> HiSACMemory:
        """:meth:`encode` with agents made before, for these requests in this order."""
        return self._encode(history, self._leaves(history), agents)

    def encode(self, history: History, probes: Probes) -> HiSACMemory:
        """Vote, prune, route; keys and values of the agents are projected once for all candidates."""
        leaves = self._leaves(history)
        return self._encode(history, leaves, self._agents(leaves))

    def read(self, memory: HiSACMemory, target: Target) -> Tensor:
        """softmax(q kᵀ / √d + log w) v over the request's agents `[N, heads · d_head]`; zero where it has none."""
        q = self.project.queries(target.x)
        start, end = memory.offsets[:-1], memory.offsets[1:]
        bias = memory.log_weight.unsqueeze(1).expand(-1, self.heads)
        return window_attention(q, target.offsets, memory.k, memory.v, start, end, bias).flatten(1)

    @torch.jit.export
    def store(self, memory: HiSACMemory) -> Stored:
        """Keys of a request's agents, then their values; exact: the logarithms of their weights."""
        count = memory.offsets[1:] - memory.offsets[:-1]
        return store_parts([memory.k, memory.v], [count, count], memory.log_weight)

    @torch.jit.export
    def restore(self, stored: Stored, now: Tensor) -> HiSACMemory:
        """A lost record has no agents."""
        count, shape = stored.lengths[:, 1], self.project.shape
        parts = restore_parts(stored.values, stored.lengths[:, 0], [count, count], [shape, shape])
        return HiSACMemory(parts[0], parts[1], stored.exact, offsets_of(count))

    def auxiliary(self, history: History, memory: HiSACMemory) -> Tensor:
        """None of its own."""
        return history.x.new_zeros([])

    def forward(self, history: History, probes: Probes, target: Target) -> Tensor:
        """`encode` and `read` in one: `[N, out_dim]`."""
        return self.read(self.encode(history, probes), target)

    @torch.jit.unused
    def routing_weights(self, history: History, agents: Agents) -> tuple[Tensor, Tensor]:
        """For a picture, of a history of one request: the events that voted `[P']`, and what share each has in each
        agent's representation `[A, P']`. Rows sum to 1 (or are 0: a hard agent nearest to no event)."""
        leaves = self._leaves(history)
        vote = torch.arange(leaves.event.numel(), device=history.x.device)
        # Σ_i α_{a,i} of events that are columns of the identity; in pieces, for it would be P' × P'
        shares = [
            self._represent(history, leaves, agents, (vote.unsqueeze(1) == some).to(history.x.dtype))
            for some in vote.split(_PIECE)
        ]
        return leaves.event, torch.cat(shares, 1)

    @torch.jit.unused
    def tree(self, history: History) -> list[Nodes]:
        """For a picture: every node of each level with its votes, and whether an agent is it or below it."""
        leaves = self._leaves(history)
        agents = self._agents(leaves)
        levels: list[Nodes] = []
        for nodes in tree_nodes(leaves, self.keep):
            codes = torch.cat([nodes.code, agents.code[:, : nodes.code.size(1)]])
            keys = row_keys(torch.cat([nodes.request, agents.request]), codes)
            kept = torch.isin(keys[: nodes.votes.numel()], keys[nodes.votes.numel() :])
            levels.append(nodes._replace(kept=kept))
        return levels

    def _leaves(self, history: History) -> Leaves:
        history = latest(history, self.length)
        if history.code.size(1) != len(self.keep):
            raise ValueError(f"events have {history.code.size(1)} levels of semantic IDs, codewords {len(self.keep)}")
        return history_leaves(history.code, history.time, history.start, history.end)

    def _agents(self, leaves: Leaves) -> Agents:
        return keep_agents(leaves, self.keep) if self.voting else keep_leaves(leaves, self.most_leaves)

    def _encode(self, history: History, leaves: Leaves, agents: Agents) -> HiSACMemory:
        r = self._represent(history, leaves, agents, self._ranking_embeddings(history, leaves))
        logit = self.gamma * agents.votes.to(r.dtype).log().unsqueeze(1)  # w_a = V^γ / Σ V^γ
        weight = segment_softmax(logit, agents.request, agents.offsets.numel() - 1)
        k, v = self.project.keys_values(r)
        return HiSACMemory(k, v, weight.squeeze(1).log(), agents.offsets)

    def _ranking_embeddings(self, history: History, leaves: Leaves) -> Tensor:
        """e_i of every vote `[P', d]`: the event's embedding, times the decay of its age at the request."""
        e = take_rows(history.x, leaves.event)
        decay = self.decay
        if decay is not None:
            now = history.now.index_select(0, leaves.request).index_select(0, leaves.leaf)
            age_s = (now - history.time.index_select(0, leaves.event)) // 1000
            e = e * decay.index_select(0, log_bucket(age_s, self.age_buckets)).unsqueeze(1)
        return e

    def _represent(self, history: History, leaves: Leaves, agents: Agents, e: Tensor) -> Tensor:
        """r_a = Σ_i α_{a,i} e_i `[A, d]`, e: `[P', d]` of every vote.

        −‖z − p‖² = 2 p·z − ‖z‖² − ‖p‖²: attention with query 2 p / T, key z and a bias of the key; ‖p‖² cancels.
        """
        at = self._routed(history, leaves, agents, e)
        start, end = agents.offsets[:-1], agents.offsets[1:]
        query = 2 / self.temperature * at.prototype
        if self.routing == "items":
            bias = at.events.log() - torch.linalg.vector_norm(at.z, dim=1).square() / self.temperature
            return frozen_attention(query, agents.offsets, at.z, bias, at.e, at.offsets[:-1], at.offsets[1:])
        own = -at.prototype.square().sum(1) / self.temperature
        total, nearest = window_logsumexp(at.z, at.offsets, query, own, start, end)
        if (
            self.routing == "agents"
        ):  # β_{i,a} = e^(logit − total_i); the mean of e_i by β is a softmax over i of its log
            bias = at.events.log() - total
            return frozen_attention(query, agents.offsets, at.z, bias, at.e, at.offsets[:-1], at.offsets[1:])
        agent = torch.where(nearest < 0, agents.votes.numel(), nearest)  # an outdated cache may have none for a request
        count = segment_sum(at.events, agent, agents.votes.numel() + 1).clamp(min=1)
        mean = segment_sum(at.e * at.events.unsqueeze(1), agent, agents.votes.numel() + 1) / count.unsqueeze(1)
        return mean[:-1]

    def _routed(self, history: History, leaves: Leaves, agents: Agents, e: Tensor) -> Routed:
        """What goes to the agents, and their prototypes p_a = Σ_l C_l[a^l]."""
        n = leaves.votes.numel()
        together = self.z == "codewords"
        if torch.jit.is_scripting() or not exporting():
            together = together and 5 * n < 4 * leaves.event.numel()  # else the sums cost more than they save
        if together:
            count = leaves.votes.to(e.dtype)
            mean = segment_sum(e, leaves.leaf, n) / count.unsqueeze(1)
            return Routed(self._in_space(leaves.code, e), mean, count, leaves.offsets, self._in_space(agents.code, e))
        offsets = offsets_of(torch.zeros_like(history.start).index_add_(0, leaves.request, leaves.votes))
        count = torch.ones_like(e[:, 0])
        if self.z == "codewords":
            z = self._in_space(leaves.code, e).index_select(0, leaves.leaf)
            return Routed(z, e, count, offsets, self._in_space(agents.code, e))
        if self.z == "content":
            if history.content.size(1) != self.centre.numel():
                raise ValueError(
                    f"events have content vectors of width {history.content.size(1)}, codewords {self.centre.numel()}"
                )
            z = history.content.detach().index_select(0, leaves.event).sub_(self.centre).to(e.dtype)
            return Routed(z, e, count, offsets, self._in_space(agents.code, e))
        request = leaves.request.index_select(0, leaves.leaf)
        z = _standardised(history.x.detach().index_select(0, leaves.event), request, history.start.numel())
        mean = segment_sum(z, leaves.leaf, n) / leaves.votes.unsqueeze(1)
        mean = torch.cat([mean, z.new_zeros([1, z.size(1)])])
        return Routed(z, e, count, offsets, mean.index_select(0, _leaf_of(agents, leaves)))

    def _in_space(self, code: Tensor, like: Tensor) -> Tensor:
        """Σ_l C_l[code^l], centred `[n, dz]`."""
        if (torch.jit.is_scripting() or not exporting()) and bool((code > self.most_code).any()):
            raise ValueError(f"semantic IDs up to {code.amax(0)}, but the codebooks end at {self.most_code}")
        row = code + self.first_code
        place = self.codewords.index_select(0, row[:, 0]).sub_(self.centre)
        for level in range(1, code.size(1)):
            place.add_(self.codewords.index_select(0, row[:, level]))
        return place.to(like.dtype)


def _mean_square(level: Tensor) -> float:
    """Mean squared norm of a level's codewords, the zero row apart."""
    return float(level[1:].double().square().sum(1).mean())


def _standardised(x: Tensor, request: Tensor, requests: int) -> Tensor:
    """`x` `[n, d]` less its request's mean, in units of the root of its request's variance."""
    count = segment_sum(torch.ones_like(request), request, requests).clamp(min=1).unsqueeze(1)
    x = x - (segment_sum(x, request, requests) / count).index_select(0, request)
    variance = segment_sum(x.square().sum(1, keepdim=True), request, requests) / count
    return x / (variance + 1e-12).sqrt().index_select(0, request)


def _leaf_of(agents: Agents, leaves: Leaves) -> Tensor:
    """The leaf of each agent `[A]`; the number of leaves where the history has no such leaf."""
    n = leaves.votes.numel()
    if (torch.jit.is_scripting() or not exporting()) and n == 0:
        return torch.zeros_like(agents.votes)
    keys = row_keys(torch.cat([leaves.request, agents.request]), torch.cat([leaves.code, agents.code]))
    leaf = torch.searchsorted(keys[:n], keys[n:])
    found = keys.index_select(0, leaf.clamp(max=n - 1)) == keys[n:]
    return torch.where(found, leaf, n)


def _check(
    codewords: list[Tensor], keep: list[int], routing: str, z: str, temperature: float, most_leaves: int
) -> None:
    """Refuse what cannot work."""
    if not codewords or len(keep) != len(codewords) or min(keep) < 1:
        raise ValueError(f"keep is {keep}: it needs a number >= 1 for each of the {len(codewords)} levels of codewords")
    for level, words in enumerate(codewords, 1):
        if words.dim() != 2 or words.size(0) < 2 or words.size(1) != codewords[0].size(1) or bool(words[0].any()):
            raise ValueError(
                f"codewords of level {level} are {list(words.shape)}: they need row 0 zero (no code), a row for each "
                f"code, and the width {codewords[0].size(-1)} of level 1"
            )
    if routing not in ROUTINGS or z not in SPACES:
        raise ValueError(f"routing is {routing!r}, z is {z!r}: known are {ROUTINGS} and {SPACES}")
    if temperature <= 0 or most_leaves < 1:
        raise ValueError(f"temperature is {temperature}, most_leaves {most_leaves}: both must be above 0")
