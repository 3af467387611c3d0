"""Truncated SVD of a sparse matrix, the same for the same seed, signs included."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from sklearn.utils.extmath import randomized_svd

from features.semantic_ids.content.protocol import Floats, Log

NOTHING = 1e-6
"""A share of the greatest singular value, or of a row's length, below which single precision holds rounding errors."""


def truncated(
    matrix: sp.csr_matrix, dim: int, seed: int, log: Log, part: str
) -> tuple[npt.NDArray[np.float32], Floats]:
    """Right singular vectors `[dim', columns]` and singular values `[dim']`, the greatest first.

    dim' is less than `dim` where the matrix has a lower rank; that is logged.

    Args:
        part: the content part that asks, for the log.
    """
    rows, columns = cast(tuple[int, int], matrix.shape)
    most = min(dim, rows, columns)
    _, sigma, v = cast(Any, randomized_svd)(matrix, most, random_state=seed)
    rank = int((sigma > NOTHING * sigma[0]).sum())
    if rank < dim:
        log(
            f"content part {part}: {rank} numbers instead of {dim}, which is all that {rows} items and "
            f"{columns} columns of rank {rank} hold"
        )
    return v[:rank].astype(np.float32), sigma[:rank].astype(np.float32)


def project(matrix: sp.csr_matrix, v: Floats) -> Floats:
    """`matrix` · `v`ᵀ: `[rows, dim]`. Rows that lie outside the span of `v` are zero, not the rounding error left."""
    found = np.asarray(matrix @ v.T, dtype=np.float32)
    length = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).reshape(-1))
    found[np.linalg.norm(found, axis=1) <= NOTHING * length] = 0
    return found
