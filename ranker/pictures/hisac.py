"""HiSAC: the tree of a user's semantic IDs with its votes and what pruning keeps, and what the agents gather."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from features.views import Ints
from ranker.blocks import Block
from ranker.longseq import HiSAC
from ranker.longseq.protocol import History, latest
from ranker.ops.votes import Agents, Nodes
from ranker.pictures.canvas import BLUE, DARK, GREY, RED, mark_events, new_figure, note, time_axis, weights_map
from ranker.pictures.shown import Shown

AGENTS = 24
"""rows of the heat map: those of most votes"""
_LEGIBLE = 0.018
"""the part of the picture's width from which a node has room for its code"""
_LIGHT = "#8fb0d9"


class Place(NamedTuple):
    """A node of the tree in the picture: from `left`, as wide as its votes."""

    code: tuple[int, ...]
    left: int
    votes: int
    kept: bool


@torch.no_grad()
def draw(block: Block, shown: Shown) -> Figure:
    """Above, the tree: a node is as wide as its votes, below its parent, siblings by votes; kept nodes are blue, pruned
    ones grey. Below, the share of each event in what an agent gathers."""
    module = block.block
    assert isinstance(module, HiSAC)
    given = block.inputs(shown.history, shown.target)
    agents = module.agents_of(given.history)
    count = min(AGENTS, agents.votes.numel())
    figure = new_figure(13, 5.2 + 0.2 * max(count, 4))
    tree, routing = figure.subplots(2, 1, height_ratios=[3.4, 0.7 + 0.2 * max(count, 4)])
    figure.suptitle(f"HiSAC: {shown.title}")
    if agents.votes.numel() == 0:
        note(tree, "no event of the history has a semantic ID: no votes, no agents")
        routing.set_axis_off()
        return figure
    candidates = shown.target.code[:, torch.tensor(block.code_columns)]
    columns = [shown.codes[column] for column in block.code_columns]
    _tree(tree, places(module.tree(given.history)), columns, {tuple(code) for code in candidates.tolist()})
    _routing(figure, routing, module, given.history, agents)
    return figure


def places(levels: list[Nodes]) -> list[list[Place]]:
    """Where each level's nodes stand: under their parents, most votes first, of equal ones the latest, then the lower
    code, which is the order in which pruning prefers them."""
    left: dict[tuple[int, ...], int] = {(): 0}
    found: list[list[Place]] = []
    for nodes in levels:
        codes = [tuple(code) for code in nodes.code.tolist()]
        votes, latest_ms, kept = nodes.votes.tolist(), nodes.latest.tolist(), nodes.kept.tolist()
        here: list[Place] = []
        for i in sorted(range(len(codes)), key=lambda i: (-votes[i], -latest_ms[i], codes[i])):
            parent = codes[i][:-1]
            here.append(Place(codes[i], left[parent], votes[i], kept[i]))
            left[codes[i]] = left[parent]
            left[parent] += votes[i]  # where its next child stands
        found.append(here)
    return found


def _tree(axes: Axes, levels: list[list[Place]], columns: list[str], candidates: set[tuple[int, ...]]) -> None:
    total = sum(place.votes for place in levels[0])
    for level, nodes in enumerate(levels):
        for place in nodes:
            _node(axes, place, level, total)
    leaves = levels[-1]
    wanted = [place for place in leaves if place.code in candidates]
    foot = len(levels) + 0.1
    axes.scatter(
        [p.left + p.votes / 2 for p in wanted], [foot] * len(wanted), marker="^", s=30, color=RED, clip_on=False
    )
    axes.set_xlim(0, total)
    axes.set_ylim(len(levels) + 0.2, 0)
    axes.set_yticks(np.arange(len(levels)) + 0.5, columns)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(f"{total:,} votes")
    agents = [place for place in leaves if place.kept]
    axes.set_title(
        f"{len(agents)} of {len(leaves)} leaves are agents and have {sum(p.votes for p in agents) / total:.0%} of the "
        f"votes; {len(wanted)} of the candidates' {len(candidates)} leaves are in the history"
    )
    axes.legend(
        handles=[
            Patch(color=BLUE, label="kept"),
            Patch(facecolor=GREY, hatch="////", edgecolor="white", label="pruned"),
            Line2D([], [], marker="^", linestyle="", color=RED, label="a candidate's leaf"),
        ],
        loc="upper right",
        bbox_to_anchor=(1, -0.08),
        ncols=3,
        fontsize=8,
        frameon=False,
    )


def _node(axes: Axes, place: Place, level: int, total: int) -> None:
    wide = place.votes / total >= _LEGIBLE
    colour = (_LIGHT if level % 2 else BLUE) if place.kept else GREY
    axes.bar(
        place.left, 0.94, place.votes, level + 0.03, align="edge", color=colour,
        edgecolor="white", linewidth=0.8 if wide else 0.3, hatch=None if place.kept else "////",
    )  # fmt: skip
    if wide:
        text = "white" if colour == BLUE else DARK
        middle = place.left + place.votes / 2
        axes.text(
            middle, level + 0.42, str(place.code[-1]), color=text, ha="center", va="center", weight="bold", size=9
        )
        axes.text(middle, level + 0.66, f"{place.votes}", color=text, ha="center", va="center", size=7)


def _routing(figure: Figure, axes: Axes, module: HiSAC, history: History, agents: Agents) -> None:
    count = agents.votes.numel()
    seen = latest(history, module.length)
    start, end = int(seen.start), int(seen.end)
    weights, own = routing_of(module, history, agents)
    most = agents.votes.argsort(descending=True, stable=True)[:AGENTS]
    rows = [f"{'·'.join(map(str, agents.code[a].tolist()))} ({int(agents.votes[a])} votes)" for a in most.tolist()]
    weights_map(figure, axes, weights[most].numpy(), rows)
    mark_events(axes, own[most].numpy())
    shown = f"the {len(rows)} agents of most votes (of {count:,})" if count > len(rows) else f"the {count} agents"
    axes.set_title(f"routing: what each of {shown} gathers of the events; dots: events of the agent's own leaf")
    time: Ints = seen.time[start:end].numpy()
    time_axis(axes, time, int(seen.now))


def routing_of(module: HiSAC, history: History, agents: Agents) -> tuple[torch.Tensor, torch.Tensor]:
    """What share each event of one request's window has in each agent `[A, L]`, 0 for events without a semantic ID;
    and whether it is of the agent's own leaf `[A, L]`."""
    seen = latest(history, module.length)
    start, end = int(seen.start), int(seen.end)
    event, share = module.routing_weights(history, agents)
    weights = share.new_zeros([share.size(0), end - start]).index_copy(1, event - start, share)
    own = (history.code[start:end].unsqueeze(0) == agents.code.unsqueeze(1)).all(2)
    return weights, own
