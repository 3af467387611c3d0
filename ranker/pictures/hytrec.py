"""HyTRec: what the linear layers of the long branch do along time."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ranker.blocks import Block
from ranker.longseq import HyTRec
from ranker.longseq.hytrec import LayerGates
from ranker.longseq.protocol import latest
from ranker.pictures.canvas import BLUE, DARK, GREY, LINES, RED, Floats, bin_means, bins_of, new_figure, note, time_axis
from ranker.pictures.shown import Shown


@torch.no_grad()
def draw(block: Block, shown: Shown) -> Figure:
    """A panel a linear layer: its gate g (mean over the width, and where 80 % of it lie), the strength with which it
    erases, and the temporal decay τ; the events of the short branch, which no linear layer sees, are grey."""
    module = block.block
    assert isinstance(module, HyTRec)
    history = block.inputs(shown.history, shown.target).history
    found = module.gates(history)
    seen = latest(history, module.length)
    time = seen.time[int(seen.start) : int(seen.end)].numpy()
    layers = len(found.layers)
    figure = new_figure(13, 1.3 + 2.3 * layers)
    panels = figure.subplots(layers, 1, sharey=True, squeeze=False)[:, 0]
    figure.suptitle(f"HyTRec: {shown.title}")
    if found.decay.numel() == 0:
        note(panels[0], f"no event before the latest {module.short_length}: the long branch has nothing to read")
        return figure
    decay = "temporal decay τ" if module.decay_by_age else "what the state keeps since the event before"
    for number, (axes, layer) in enumerate(zip(panels, found.layers, strict=True), 1):
        _layer(axes, layer, found.decay.numpy(), decay)
        axes.axvspan(found.decay.numel(), time.size, color=GREY, alpha=0.5, linewidth=0, label="short branch")
        axes.set_title(f"linear layer {number}: {layer.dynamic:.0%} of the gate follows deviation and time")
        time_axis(axes, time, int(seen.now), label=number == layers)
    panels[0].set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def _layer(axes: Axes, layer: LayerGates, decay: Floats, name: str) -> None:
    edges = bins_of(decay.size, LINES)
    middle = (edges[:-1] + edges[1:]) / 2
    gate = layer.gate.numpy()
    pieces = [np.quantile(gate[a:b], [0.1, 0.9]) for a, b in itertools.pairwise(edges)]
    low, high = np.stack(pieces, 1)
    axes.fill_between(middle, low, high, color=BLUE, alpha=0.25, linewidth=0, label="80 % of the gate's entries")
    axes.plot(middle, bin_means(gate.mean(1), edges), color=BLUE, label="gate g, mean")
    axes.plot(middle, bin_means(layer.erase.numpy().mean(1), edges), color=RED, label="erase strength ĝβ")
    axes.plot(middle, bin_means(decay, edges), color=DARK, linestyle="--", linewidth=1, label=name)
    axes.spines[["top", "right"]].set_visible(False)
