"""Raw ids of a dataset's users, which name records: another preparation gives the same user another index."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.dataset import Dataset, read_arrow
from features.errors import UserError
from ranker.memory.keys import U64, hashes_of


class RawUsers:
    """The users of a dataset by their dense index.

    Raises:
        UserError: the dataset does not keep their ids.
    """

    def __init__(self, dataset: Dataset) -> None:
        path = dataset.root / "vocabularies" / "user.arrow"
        if not path.is_file():
            raise UserError(
                f"{dataset.root}: users are hashed (user_hash_buckets), and their ids, which name the records of a "
                "store, were not kept; prepare it without user_hash_buckets (a model that should not know users can "
                "leave `user` out of features.request)"
            )
        self._values: pa.Array = read_arrow(path).column("value")

    def hashes(self, index: npt.NDArray[np.integer]) -> U64:
        """:func:`ranker.memory.keys.hashes_of` of the users with these dense indices: `[U, 2]`."""
        return hashes_of(self._values.take(pa.array(index.astype(np.int64) - 1)).to_pylist())
