"""The machine a benchmark ran on, in one line: a figure without it says nothing."""

from __future__ import annotations

from ranker.machine import machine

__all__ = ["machine"]
