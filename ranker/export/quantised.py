"""The exported files once more with tables of bytes, ``*.int8.pt``: a quarter of the size, nearly the same scores.

Tables are all that is large. Every table is quantised, row by row (:mod:`ranker.served_tables`), frozen content vectors
too: they are read as embeddings are. Dense parameters stay float32, and so do memories.

What it may cost is bounded, and an export beyond it is refused. A number moves by half a step at most, 1/510 of its
row's range; what that makes of a score depends on the model, and is measured on held-out requests:

- no score moves by more than `ALLOWED` = 0.02. Runs of the tests, whose tables are trained for minutes at the highest
  rates and so have the widest rows, move by 1e-4 to 4e-3. One beyond 0.02 has rows whose numbers differ by orders of
  magnitude, and should be looked at rather than served.
- the AUC of clicks moves by at most `ALLOWED_AUC` = 0.001, of what experiments on rankers take for a difference at all,
  a tenth to a half.
"""

from __future__ import annotations

ALLOWED = 0.02
"""greatest difference of a score from the trainer's"""
ALLOWED_AUC = 1e-3
"""greatest change of the clicks' AUC from the trainer's"""
