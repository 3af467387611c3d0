"""Text columns through a pretrained sentence encoder (sentence-transformers, the optional extra `text`)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from features.dataset import Dataset
from features.semantic_ids.config import TextPart
from features.semantic_ids.content import item_columns
from features.semantic_ids.content.protocol import Floats, Log, Read, State
from features.semantic_ids.errors import SidsError
from features.views import Ints

PROBE = "The same words give the same numbers."
BATCH = 64
_CHUNK = 4_096
"""Items whose text is in memory at a time."""
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Sentences:
    """Text columns of an item, a line each, as one vector. probe `[dim]`: the vector of a fixed sentence, by which
    another model of the same name is noticed. An item without text has nothing in this part."""

    config: TextPart
    probe: Floats

    @property
    def dim(self) -> int:
        return len(self.probe)

    def open(self, dataset: Dataset) -> Read:
        _check_columns(self.config, dataset)
        model = _model(self.config)
        probe = _encode(model, [PROBE])[0]
        if probe.shape != self.probe.shape or np.abs(probe - self.probe).max() > _TOLERANCE * np.abs(self.probe).max():
            raise SidsError(
                f"content part text: model {self.config.model!r} is not the one the codebook was fitted with: it gives "
                "another vector for the same sentence; bring the former back, or fit the codebook again"
            )
        items = dataset.items()

        def read(rows: Ints) -> Floats:
            found = np.zeros((len(rows), self.dim), np.float32)
            for first in range(0, len(rows), _CHUNK):
                chunk = rows[first : first + _CHUNK]
                columns = [item_columns.texts(items, name, chunk) for name in self.config.columns]
                texts = ["\n".join(filter(None, lines)) for lines in zip(*columns, strict=True)]
                filled = [place for place, text in enumerate(texts) if text.strip()]
                if filled:
                    found[first + np.array(filled)] = _encode(model, [texts[place] for place in filled])
            return found

        return read

    def state(self) -> State:
        return {"probe": self.probe}


def fit(config: TextPart, dataset: Dataset, seed: int, log: Log) -> Sentences:
    """Learns the width of the model's vectors only.

    Raises:
        SidsError: sentence-transformers is not installed, the model cannot be loaded, a column is no text.
    """
    _check_columns(config, dataset)
    return Sentences(config, _encode(_model(config), [PROBE])[0])


def load(config: TextPart, state: State) -> Sentences:
    """The part as it was fitted."""
    return Sentences(config, state["probe"])


def _check_columns(config: TextPart, dataset: Dataset) -> None:
    for name in config.columns:
        item_columns.find(dataset, name, ("text",), "text (sentence_transformers)")


def _model(config: TextPart) -> Any:
    try:
        library = importlib.import_module("sentence_transformers")
    except ModuleNotFoundError as error:
        raise SidsError(
            f"content part text: encoder sentence_transformers needs a library that is not installed ({error.name}): "
            "pip install -e '.[text]', or use encoder: tfidf"
        ) from error
    try:
        return library.SentenceTransformer(config.model)
    except (OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise SidsError(
            f"content part text: model {config.model!r} cannot be loaded ({why}); name a folder with a model, or a "
            "model that can be downloaded"
        ) from error


def _encode(model: Any, texts: list[str]) -> Floats:
    found = model.encode(texts, batch_size=BATCH, convert_to_numpy=True, show_progress_bar=False)
    return np.asarray(found, dtype=np.float32)
