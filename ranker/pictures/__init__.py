"""Pictures of what a run's long-sequence blocks see in one request's history: `ranker picture RUN --out FOLDER`."""

from ranker.pictures.command import picture

__all__ = ["picture"]
