"""What a codebook is judged by: one typed object, written as JSON and shown as tables.

Symbols: n items that have content, d width of content vectors, M levels, K_l codes of level l, s items of a sample. A
prefix of length l is an item's first l codes; a leaf is a full semantic ID that items have.

Every agreement stands beside chance, the same share among random pairs: few codes agree with everything.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Figures(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LevelReport(Figures):
    """One level. `error` is what levels 1 … l leave of the variance of the content vectors: 1 is as bad as their mean;
    null where all vectors are equal."""

    level: int
    codes: int
    used: int
    dead: float
    """share of the codes that no item has"""
    perplexity: float
    """exp of the entropy of the level's codes: so many equally frequent codes would be as hard to guess"""
    largest: float
    """share of the items that have the most frequent code"""
    error: float | None


class LeafReport(Figures):
    """Items of each full semantic ID that items have. At least 99 % of the leaves hold at most `p99` items."""

    leaves: int
    median: float
    p99: int
    max: int
    unique: float
    """share of the items that are alone in their leaf"""


class PrefixAgreement(Figures):
    """Shares for prefixes of one length; null where there is no pair to count."""

    length: int
    share: float | None
    chance: float | None
    """the same share among random pairs"""

    @property
    def lift(self) -> float | None:
        """How many times more often than by chance."""
        return self.share / self.chance if self.share is not None and self.chance else None


class NeighbourAgreement(Figures):
    """`share` of an item's nearest neighbours (L2 between content vectors) that have its prefix."""

    neighbours: int
    items: int
    """among which the neighbours are sought: all items with content, or a sample"""
    items_in_all: int
    prefixes: list[PrefixAgreement]


class ColumnAgreement(Figures):
    """`share` of the pairs of items of one prefix that have the same category, all such pairs counted."""

    column: str
    items: int
    unknown: int
    """items with category 0, left out"""
    prefixes: list[PrefixAgreement]
    ami: list[float]
    """adjusted mutual information of each prefix and the category: 0 is chance, 1 says one is the other"""
    ami_items: int
    """on how many items"""


class Cooccurrence(Figures):
    """`share` of the pairs of events, of one user and at most `window` apart, whose different items have the same
    prefix; chance draws two different items, each as often as it has events."""

    window: int
    events: int
    events_without_code: int
    """left out, with the pairs they are in"""
    items_without_code: int
    """different items among these"""
    pairs: int
    prefixes: list[PrefixAgreement]


class SidsReport(Figures):
    """What is known of one codebook."""

    name: str
    items: int
    """with content"""
    items_without_content: int
    """they have the reserved code"""
    distinct_vectors: int
    duplicates: int
    """items whose content vector another item has too: no code can tell them apart"""
    levels: list[LevelReport]
    leaves: LeafReport
    neighbours: NeighbourAgreement | None
    columns: list[ColumnAgreement]
    cooccurrence: Cooccurrence | None
    warnings: list[str]
