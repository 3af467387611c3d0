"""What the pictures share: figures without a display, events along time, heat maps of weights over them.

Time runs to the right, an event a step: real time would crowd a burst of events into one line. Ticks tell how long
before the request an event was. A history of more events than a picture can show apart is drawn in *bins* of as equal
numbers of them as can be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from features.views import Ints

Floats = NDArray[np.floating[Any]]

BLUE, GREY, RED, DARK = "#3b6fb5", "#c9c9c9", "#c44e52", "#333333"
BINS = 500
"""columns of a heat map: about the pixels it has"""
_SHARES = LinearSegmentedColormap.from_list(
    "shares", [(0, "#c3d5ea"), (0.5, "#ffffff"), (0.8, "#e0775c"), (1, "#7d1120")]
)
"""less than an even share is pale, not dark: what is attended to must stand out, where most is not"""
LINES = 200
"""points of a line: more look like noise"""
_DECADES = 15
"""a scale that reaches further is labelled by powers of ten only"""


def new_figure(width: float, height: float) -> Figure:
    """A figure that pyplot knows nothing of: it is gone with its last reference."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def note(axes: Axes, text: str) -> None:
    """A panel without anything to draw says why."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color=DARK, transform=axes.transAxes)


def bins_of(events: int, most: int) -> Ints:
    """Edges `[b + 1]` of at most `most` bins of `events` events, an event a bin where they are few.

    >>> bins_of(5, 2).tolist(), bins_of(3, 9).tolist()
    ([0, 2, 5], [0, 1, 2, 3])
    """
    bins = max(1, min(events, most))
    return np.arange(bins + 1) * events // bins


def bin_means(x: Floats, edges: Ints) -> Floats:
    """Mean of `[..., events]` in each bin: `[..., b]`."""
    return np.add.reduceat(x, edges[:-1], axis=-1) / np.diff(edges)


def time_axis(axes: Axes, time_ms: Ints, now_ms: int, label: bool = True) -> None:
    """Events from left to right; ticks say how long before the request they were."""
    events = time_ms.size
    axes.set_xlim(0, events)
    at = np.unique(np.linspace(0, events - 1, min(events, 9)).round().astype(int))
    axes.set_xticks(at + 0.5, [age((now_ms - int(time_ms[i])) / 1000) if label else "" for i in at])
    if label:
        axes.set_xlabel(f"{events:,} events, oldest to newest; time before the request")


def age(seconds: float) -> str:
    """A span of time in its unit.

    >>> age(40), age(5400), age(3 * 86400)
    ('40 s', '1.5 h', '3 d')
    """
    for unit, span in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= span:
            return f"{seconds / span:.{1 if seconds < 10 * span else 0}f}".removesuffix(".0") + f" {unit}"
    return f"{seconds:.0f} s"


def weights_map(figure: Figure, axes: Axes, weights: Floats, rows: list[str]) -> None:
    """Heat map of rows of weights over events `[rows, events]` that sum to 1, in multiples of an even share: white is
    even, red more, pale blue less, on a logarithmic scale. The first row is on top."""
    count, events = weights.shape
    edges = bins_of(events, BINS)
    share = bin_means(weights * events, edges)
    reach = float(np.clip(np.quantile(share, 0.995), 2, 100))
    mesh = axes.pcolormesh(
        edges,
        np.arange(count + 1),
        np.clip(share, 1 / reach, reach),
        cmap=_SHARES,
        norm=LogNorm(1 / reach, reach),
        rasterized=True,
    )
    axes.set_ylim(count, 0)
    axes.hlines(np.arange(1, count), 0, events, color=GREY, linewidth=0.5)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, fontsize=8)
    axes.tick_params(axis="y", length=0)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=30, extend="both")
    bar.ax.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if reach < _DECADES else (1.0,)))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    bar.set_label("weight, in even shares")


def mark_events(axes: Axes, marked: NDArray[np.bool_]) -> None:
    """A dot at the foot of a heat map's row for each marked event `[rows, events]`."""
    row, event = np.nonzero(marked)
    axes.scatter(event + 0.5, row + 0.84, s=5, color="black", linewidths=0, clip_on=False)
