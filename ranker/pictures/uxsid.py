"""UxSID: where in a history each of the candidates' groups looks (methods' step 4), and what its anchors cover (1)."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from features.views import Ints
from ranker.blocks import Block
from ranker.longseq import UxSID
from ranker.longseq.protocol import Probes, latest
from ranker.longseq.uxsid import interest_recall
from ranker.pictures.canvas import (
    BINS,
    BLUE,
    DARK,
    GREY,
    Floats,
    bin_means,
    bins_of,
    mark_events,
    new_figure,
    note,
    time_axis,
    weights_map,
)
from ranker.pictures.shown import Shown

RECALL_AT = 10
_ITEMS = 3
"""candidates of one group that are named"""


@torch.no_grad()
def draw(block: Block, shown: Shown) -> Figure:
    """The attention of each distinct group of candidates over the history, and that of the anchors."""
    module = block.block
    assert isinstance(module, UxSID)
    history, probes, target = block.inputs(shown.history, shown.target)
    weights = module.attention(history, probes)[0]
    seen = latest(shown.history, module.length)
    window = slice(int(seen.start), int(seen.end))
    code, time = seen.code[window, block.probe_column], seen.time[window].numpy()
    now = int(seen.now)

    groups, anchors = len(weights.probes), len(weights.anchors)
    figure = new_figure(13, 2.6 + 0.34 * max(groups, 4) + (1.6 + 0.16 * anchors if anchors else 0))
    heights = [1.2 + 0.34 * max(groups, 4), *([0.16 * anchors + 0.7, 0.9] if anchors else [])]
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    figure.suptitle(f"UxSID: {shown.title}")

    own = code.unsqueeze(0) == probes.code.unsqueeze(1)
    column = shown.codes[block.probe_column]
    if groups:
        weights_map(figure, panels[0], weights.probes.numpy(), _labels(shown, block.probe_column, probes, target.probe))
        mark_events(panels[0], own.numpy() & (probes.code != 0).unsqueeze(1).numpy())
        panels[0].set_title(_recall(weights.probes, code, probes.code, column))
        panels[0].set_ylabel(f"{column}: its candidates (* clicked)")
        time_axis(panels[0], time, now)
    else:
        note(panels[0], "global_probe is off: no group attends to the raw history")
    if anchors:
        _coverage(figure, panels[1], panels[2], weights.anchors.numpy(), time, now)
    return figure


def _labels(shown: Shown, column: int, probes: Probes, probe: torch.Tensor) -> list[str]:
    """Each group with its candidates, the clicked first."""
    labels: list[str] = []
    for group, value in enumerate(shown.values(column, probes.code)):
        candidates = sorted((probe == group).nonzero()[:, 0].tolist(), key=lambda n: not shown.clicked[n])
        items = [f"{shown.item[n]}{'*' if shown.clicked[n] else ''}" for n in candidates[:_ITEMS]]
        more = f" +{len(candidates) - _ITEMS}" if len(candidates) > _ITEMS else ""
        labels.append(f"{value}: {', '.join(items)}{more}")
    return labels


def _recall(weights: torch.Tensor, code: torch.Tensor, probe: torch.Tensor, column: str) -> str:
    """Int.R@k of the request, beside what attention that knows nothing would have."""
    found = interest_recall([weights], [code], [probe], RECALL_AT)
    title = f"attention of the candidates' groups; dots: events with the group's own {column}"
    if found.numel() == 0:
        return title
    chance = float((code.unsqueeze(0) == probe[probe != 0].unsqueeze(1)).double().mean())
    return f"{title}. Int.R@{RECALL_AT} {float(found.mean()):.2f} (by chance {chance:.2f})"


def coverage(anchors: Floats) -> Floats:
    """The most that any anchor gives each event, in even shares: `[L]` of weights `[K, L]`."""
    return anchors.max(0) * anchors.shape[1]


def effective_events(weights: Floats) -> Floats:
    """e^entropy of each row of weights: over so many events it would be spread if it were even. `[K]` of `[K, L]`."""
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    return np.exp(-(weights * logs).sum(1))


def _coverage(figure: Figure, above: Axes, below: Axes, anchors: Floats, time: Ints, now: int) -> None:
    """The anchors' attention, those that look furthest back on top; below, the most that any of them gives."""
    events = anchors.shape[1]
    order = np.argsort(anchors @ np.arange(events), kind="stable")
    spread = effective_events(anchors)
    rows = [f"{k} ({spread[k] / events:.0%})" for k in order]
    weights_map(figure, above, anchors[order], rows)
    above.set_title(f"attention of the {len(anchors)} anchors (in brackets: e^entropy, as a share of the events)")
    above.set_ylabel("anchor")
    time_axis(above, time, now, label=False)
    most = coverage(anchors)
    edges = bins_of(events, BINS)
    below.stairs(bin_means(most, edges), edges, fill=True, color=BLUE)
    below.axhline(1, color=DARK, linewidth=0.9, linestyle="--")
    below.set_ylim(bottom=0)
    below.grid(axis="y", color=GREY, linewidth=0.4)
    below.spines[["top", "right"]].set_visible(False)
    below.set_ylabel("even shares")
    below.set_title(f"the most that any anchor gives: {(most >= 1).mean():.0%} of the events get an even share or more")
    time_axis(below, time, now)
