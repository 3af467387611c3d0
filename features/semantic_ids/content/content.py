"""An item's content vector: parts side by side, each of its own length, whatever the part's numbers were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from features.dataset import Dataset
from features.semantic_ids import config as configs
from features.semantic_ids.content import behaviour, sentences, text, vector_part
from features.semantic_ids.content.protocol import ContentPart, Floats, Log, Read, State
from features.semantic_ids.errors import SidsError
from features.views import Ints

Configs = Sequence[configs.ContentPart]


@dataclass(frozen=True)
class Content:
    """Fitted parts. Each item's vector is that of every part, scaled to the length `weight`, one after another.

    A part that an item has nothing in is zero; an item with nothing in any part has no content, and is all zero.
    """

    configs: Configs
    parts: Sequence[ContentPart]

    @property
    def dim(self) -> int:
        return sum(part.dim for part in self.parts)

    @classmethod
    def fit(cls, config_parts: Configs, dataset: Dataset, seed: int, log: Log) -> Content:
        """Learn every part from `dataset`.

        Raises:
            SidsError: a part cannot be made from this dataset.
        """
        return cls(config_parts, [_fit(config, dataset, seed, log) for config in config_parts])

    @classmethod
    def load(cls, config_parts: Configs, state: State) -> Content:
        """Content as it was fitted, from its :meth:`state`.

        Raises:
            SidsError: the state is that of other parts.
        """
        parts: list[ContentPart] = []
        for number, config in enumerate(config_parts):
            prefix = f"{number}."
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            try:
                parts.append(_load(config, own))
            except KeyError as error:
                raise SidsError(
                    f"content[{number}] ({config.type}): the codebook's state has no {error.args[0]!r} for it, only "
                    f"{', '.join(own) or 'nothing'}; fit the codebook again"
                ) from error
        return cls(config_parts, parts)

    def state(self) -> State:
        """What the parts have learned; names begin with the part's number."""
        return {f"{n}.{name}": value for n, part in enumerate(self.parts) for name, value in part.state().items()}

    def open(self, dataset: Dataset) -> Read:
        """The content vectors `[n, dim]` of a dataset's items.

        Raises:
            SidsError: the dataset lacks what a part is made of.
        """
        opened = [(part.open(dataset), config.weight) for part, config in zip(self.parts, self.configs, strict=True)]

        def read(rows: Ints) -> Floats:
            return np.concatenate([_unit(one(rows)) * np.float32(weight) for one, weight in opened], axis=1)

        return read

    def collaborative(self, dataset: Dataset) -> Read | None:
        """Vectors of the first behaviour part alone, of length 1 or zero; None if there is no such part."""
        for part in self.parts:
            if isinstance(part, behaviour.Behaviour):
                read = part.open(dataset)
                return lambda rows: _unit(read(rows))
        return None


def _fit(config: configs.ContentPart, dataset: Dataset, seed: int, log: Log) -> ContentPart:
    match config:
        case configs.VectorPart():
            return vector_part.fit(config, dataset, seed, log)
        case configs.TextPart(encoder="tfidf"):
            return text.fit(config, dataset, seed, log)
        case configs.TextPart():
            return sentences.fit(config, dataset, seed, log)
        case configs.BehaviourPart():
            return behaviour.fit(config, dataset, seed, log)


def _load(config: configs.ContentPart, state: State) -> ContentPart:
    match config:
        case configs.VectorPart():
            return vector_part.load(config, state)
        case configs.TextPart(encoder="tfidf"):
            return text.load(config, state)
        case configs.TextPart():
            return sentences.load(config, state)
        case configs.BehaviourPart():
            return behaviour.load(config, state)


def _unit(vectors: Floats) -> Floats:
    """Rows of length 1; zero stays zero."""
    length = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)  # squares outgrow single precision
    return (vectors / np.where(length > 0, length, 1)).astype(np.float32)
