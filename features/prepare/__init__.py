"""Logs to a dataset folder: ``prepare(config, out)``; see :mod:`features.prepare.pipeline` for the steps."""

from features.prepare.errors import PrepareError
from features.prepare.pipeline import prepare

__all__ = ["PrepareError", "prepare"]
