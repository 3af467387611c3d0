"""The row of an id without a vocabulary: a hash that is the same on every machine, modulo a number of buckets.

    row = 1 + h mod buckets,   h = first 8 bytes, little-endian, of MD5("#" + the id's text in UTF-8)

and row 0 for a missing id. An integer's text is its decimal form, so that 42 and "42" are one id; truth values are 1
and 0. MD5 because it is specified to the bit and at hand in every language and database: a server that applies this to
a raw id reads the row that training has taught. The "#" keeps rows apart from a user's partition and from her share in
``split.valid_users``, which come from MD5 of the bare text: with one hash for both, users that validate would have rows
that no user of the training split has.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import numpy.typing as npt

FUNCTION: Literal["md5_64"] = "md5_64"
"""name of the rule in manifests"""
RULE = (
    "row = 1 + h mod buckets, h = first 8 bytes, little-endian, of MD5('#' + text); text: the id in UTF-8, integers in "
    "decimal, true and false as 1 and 0, a bag's values one by one, trimmed, empty ones left out; a missing id is row 0"
)
SALT = "#"
MOST_BUCKETS = 2**31 - 2
"""rows are stored as int32"""


def hash_of(value: int | str) -> int:
    """h of a raw id.

    >>> hash_of(42), hash_of("42")
    (1594813871803611071, 1594813871803611071)
    """
    text = str(int(value)) if isinstance(value, bool) else str(value)
    return int.from_bytes(hashlib.md5((SALT + text).encode()).digest()[:8], "little")


def row_of(value: int | str | None, buckets: int) -> int:
    """Row of a raw id in a table of `buckets` rows beside row 0.

    >>> row_of("u-17", 1000), row_of(None, 1000)
    (324, 0)
    """
    return 0 if value is None else 1 + hash_of(value) % buckets


def rows_of(hashes: npt.NDArray[np.uint64], buckets: int) -> npt.NDArray[np.int32]:
    """Rows of the ids with these h; missing ones are the caller's to set to 0."""
    return (hashes % np.uint64(buckets)).astype(np.int32) + np.int32(1)
