"""What a codebook is judged by: figures, plots and projector files.

Symbols: n items that have content, d width of content vectors, M levels, K_l codes of level l, s items of a sample. A
prefix of length l is an item's first l codes; a leaf is a full semantic ID that items have.
"""

from features.semantic_ids.report.agreement import (
    AMI_ITEMS,
    column_agreement,
    cooccurrence,
    draw_sample,
    neighbour_agreement,
    prefixes,
)
from features.semantic_ids.report.figures import SidsReport
from features.semantic_ids.report.findings import DEAD_SHARE, make_report
from features.semantic_ids.report.meter import CodebookMeter, partial_reconstructions
from features.semantic_ids.report.render import render

__all__ = [
    "AMI_ITEMS",
    "DEAD_SHARE",
    "CodebookMeter",
    "SidsReport",
    "column_agreement",
    "cooccurrence",
    "draw_sample",
    "make_report",
    "neighbour_agreement",
    "partial_reconstructions",
    "prefixes",
    "render",
]
