"""Pictures of a codebook: how its codes are used, where they lie among the items, how full its leaves are.

Nothing here needs a display: figures are drawn by matplotlib's Agg and belong to no window.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from features.semantic_ids.quantizers.protocol import Codes, Floats
from features.views import Ints

Points = npt.NDArray[np.float64]
Colour = tuple[float, ...]

COLOURED = 12
"""first codes that have a colour in the projection: more cannot be told apart"""
_BLUE, _GREY, _RED = "#3b6fb5", "#c9c9c9", "#c44e52"
_HALO: list[patheffects.AbstractPathEffect] = [patheffects.withStroke(linewidth=2.5, foreground="white")]
_SKEWED = 50
"""the largest code has so many times the mean: small ones are seen on a logarithmic scale only"""


def plot_usage(counts: Sequence[Ints], path: Path) -> None:
    """Items per code, a panel a level, codes sorted by it, beside what even use would be.

    Args:
        counts: `[K_l]` items of each code, of each level.
    """
    columns = min(len(counts), 4)
    rows = -(-len(counts) // columns)
    figure = _figure(max(5.0, 3.8 * columns), 3.4 * rows)
    for panel, items in enumerate(counts):
        _usage_panel(figure.add_subplot(rows, columns, panel + 1), panel + 1, items)
    _save(figure, path)


def _usage_panel(axes: Axes, level: int, counts: Ints) -> None:
    ordered = np.sort(counts)[::-1]
    used, codes, mean = int((counts > 0).sum()), counts.size, counts.mean()
    axes.stairs(ordered, np.arange(codes + 1), fill=True, color=_BLUE)
    axes.axhline(mean, color="black", linewidth=0.9, linestyle="--", label=f"even use: {mean:,.1f}")
    if used < codes:
        axes.axvspan(used, codes, color=_RED, alpha=0.2, linewidth=0, label=f"dead: {codes - used:,}")
    if mean > 0 and ordered[0] > _SKEWED * mean:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
    axes.set_xlim(0, codes)
    axes.set_title(f"level {level}: {codes:,} codes, {1 - used / codes:.1%} dead")
    axes.set_xlabel("codes, most frequent first")
    axes.set_ylabel("items")
    axes.legend(frameon=False, loc="upper right", fontsize=8)


def plot_projection(vectors: Floats, codes: Codes, path: Path) -> None:
    """Items in the plane of most variance; the most frequent first codes in colour, with their numbers.

    Args:
        vectors: content of a sample of items, `[s, d]`.
        codes: of the same, `[s, M]`.
    """
    points, explained = principal_plane(vectors)
    first = codes[:, 0]
    found, counts = np.unique(first, return_counts=True)
    frequent = found[np.argsort(-counts, kind="stable")[:COLOURED]]
    figure = _figure(8.5, 7)
    axes = figure.add_subplot()
    rest = ~np.isin(first, frequent)
    size = float(np.clip(20_000 / max(1, len(points)), 3, 25))
    axes.scatter(*points[rest].T, s=size, color=_GREY, alpha=0.6, linewidths=0)
    colours = _colours()
    for code, colour in zip(frequent, colours, strict=False):
        axes.scatter(*points[first == code].T, s=1.6 * size, color=colour, alpha=0.75, linewidths=0)
    centres = {int(code): _middle(points[first == code]) for code in found[np.argsort(-counts, kind="stable")]}
    _label(axes, centres, dict(zip(frequent.tolist(), colours, strict=False)))
    axes.set_title(
        f"{len(points):,} items by first code: the {len(frequent)} most frequent of {found.size:,} in colour", pad=10
    )
    axes.set_xlabel(f"first principal component ({explained[0]:.0%} of the variance)")
    axes.set_ylabel(f"second ({explained[1]:.0%})")
    axes.set_xticks([])
    axes.set_yticks([])
    _save(figure, path)


def _middle(points: Points) -> Points:
    """The one of the points `[n, 2]` that is nearest to their medians: unlike these it lies among them."""
    return points[np.abs(points - np.median(points, axis=0)).sum(1).argmin()]


def _label(axes: Axes, centres: dict[int, Points], colours: dict[int, Colour]) -> None:
    """Write each code at its centre, those with a colour large; where another number stands already, the coloured are
    moved aside, with a line to where they belong, and the others left out. The most frequent codes come first."""
    axes.autoscale(False)
    scale = np.array([np.ptp(axes.get_xlim()), np.ptp(axes.get_ylim())])
    placed = list[Points]()
    for code, centre in centres.items():
        colour = colours.get(code)
        shift = next((s for s in _SHIFTS if _free(centre / scale + s, placed)), None if colour is None else _SHIFTS[0])
        if shift is None or (colour is None and shift.any()):
            continue
        placed.append(centre / scale + shift)
        at = centre + shift * scale
        if shift.any():
            axes.plot([centre[0], at[0]], [centre[1], at[1]], color="#444444", linewidth=0.6)
        dark = "#7a7a7a" if colour is None else tuple(0.7 * part for part in colour[:3])
        size, weight = (7, "normal") if colour is None else (12, "bold")
        text = axes.text(
            at[0], at[1], str(code), color=dark, size=size, weight=weight, ha="center", va="center", clip_on=True
        )
        text.set_path_effects(_HALO)


_SHIFTS = [np.zeros(2)] + [
    radius * np.array([np.cos(angle), np.sin(angle)])
    for radius in (0.05, 0.08, 0.12)
    for angle in np.linspace(0, 2 * np.pi, 12, endpoint=False)
]
"""where a number may stand, from its centre, in widths and heights of the picture; the nearest first"""


def _free(place: Points, taken: list[Points]) -> bool:
    return all(abs(place[0] - x) > 0.04 or abs(place[1] - y) > 0.03 for x, y in taken)


def _colours() -> list[Colour]:
    """`COLOURED` colours that differ from one another and from grey."""
    from matplotlib import colormaps

    paired = colormaps["tab20"]
    strong = [paired(i) for i in (0, 2, 4, 6, 8, 10, 12, 16, 18)]  # not 14, a grey
    return [*strong, (0.0, 0.45, 0.35, 1.0), (0.35, 0.0, 0.65, 1.0), (0.95, 0.75, 0.0, 1.0)]


def principal_plane(vectors: Floats) -> tuple[Points, tuple[float, float]]:
    """Coordinates `[s, 2]` along the two directions of most variance, and the share that each explains.

    The same vectors give the same picture: the largest entry of a direction is made positive.
    """
    centred = vectors.astype(np.float64)
    centred -= centred.mean(0)
    values, directions = np.linalg.eigh(centred.T @ centred)  # ascending
    directions = directions[:, ::-1][:, :2]
    directions = directions * np.sign(directions[np.abs(directions).argmax(0), np.arange(directions.shape[1])])
    points = np.zeros((len(centred), 2))
    points[:, : directions.shape[1]] = centred @ directions
    shares = [*(values[::-1][:2] / max(values.sum(), np.finfo(np.float64).tiny)).tolist(), 0.0]
    return points, (max(0.0, shares[0]), max(0.0, shares[1]))


def plot_leaves(sizes: Ints, path: Path) -> None:
    """How many leaves hold how many items, and the share of the items that live in leaves of at most so many.

    Args:
        sizes: items of each leaf, `[leaves]`, each 1 or more.
    """
    figure = _figure(9, 3.6)
    many, share = figure.subplots(1, 2)
    edges = _size_edges(int(sizes.max(initial=1)))
    heights, _ = np.histogram(sizes, edges)
    many.stairs(heights, edges, fill=True, color=_BLUE)
    if sizes.size:
        many.set_yscale("log")
        many.set_ylim(bottom=0.7)
    many.set_title(f"{sizes.size:,} leaves")
    many.set_ylabel("leaves")
    values, leaves = np.unique(sizes, return_counts=True)
    reached = (values * leaves).cumsum() / max(1, sizes.sum())
    share.step([0.5, *values, edges[-1]], [0, *reached, 1], where="post", color=_BLUE)
    share.set_ylim(0, 1.03)
    share.yaxis.set_major_formatter(PercentFormatter(1))
    share.set_title(f"{float((sizes == 1).sum() / max(1, sizes.sum())):.1%} of the items alone in their leaf")
    share.set_ylabel("items in leaves of at most that size")
    for axes in (many, share):
        axes.set_xlabel("items per leaf")
        axes.set_xlim(edges[0], edges[-1])
        if edges[-1] > _LINEAR:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, path)


_LINEAR = 40
"""sizes up to which each has a bar of its own"""


def _size_edges(largest: int) -> npt.NDArray[Any]:
    """Edges between leaf sizes 1 … `largest`: one bar a size, or, where there are many, bars of equal ratio."""
    if largest < _LINEAR:
        return np.arange(0.5, largest + 1)
    ratios = np.geomspace(1, largest + 1, 40)
    return np.unique(np.floor(ratios)) - np.float64(0.5)


def _figure(width: float, height: float) -> Figure:
    """A figure that pyplot knows nothing of: it is gone with its last reference."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
