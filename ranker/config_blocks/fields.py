"""Checks that several blocks' configs share."""

from __future__ import annotations

from pydantic import ValidationInfo


def dividing_width(heads: int, info: ValidationInfo) -> int:
    """`heads`, which must divide the field `width` before it."""
    width: int | None = info.data.get("width")  # none where it is wrong itself
    if width is not None and width % heads:
        raise ValueError(f"must divide width ({width})")
    return heads
