"""Content vectors for TensorBoard's embedding projector, where codes and categories can be seen in three dimensions.

``tensorboard --logdir FOLDER`` shows the items under *Projector*; colour them by a code or a column.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from features.semantic_ids.quantizers.protocol import Codes, Floats
from features.views import Ints

TAG = "items"


def write_projector(
    folder: Path, vectors: Floats, items: Ints, codes: Codes, columns: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Write the files that TensorBoard reads; `folder` holds nothing else.

    Args:
        vectors: content of a sample of items, `[s, d]`.
        items: their ids, or rows of the item table, `[s]`.
        codes: `[s, M]`, counted from 0.
        columns: values to colour by, each `[s]`.
    """
    from torch.utils.tensorboard import SummaryWriter

    names = ["item", *(f"code {level}" for level in range(1, codes.shape[1] + 1)), *columns]
    cells = [items.tolist(), *codes.T.tolist(), *(np.asarray(values).tolist() for values in columns.values())]
    rows = [[_cell(value) for value in row] for row in zip(*cells, strict=True)]
    with SummaryWriter(str(folder)) as writer:
        writer.add_embedding(vectors, metadata=rows, metadata_header=[_cell(name) for name in names], tag=TAG)


def _cell(value: object) -> str:
    """What cannot end a cell or a line of a tab-separated file."""
    return " ".join(str(value).split()) or "–"
