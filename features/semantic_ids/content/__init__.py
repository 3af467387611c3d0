"""Content vectors: what semantic IDs are made from."""

from features.semantic_ids.content.content import Content

__all__ = ["Content"]
