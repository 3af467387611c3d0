"""What ``*.int8.pt`` may cost: the exported files once more with tables of bytes, a quarter of the size.

Tables are all that is large. Every one is quantised, row by row (:mod:`ranker.tables.served`), frozen content vectors
too: they are read as embeddings are. Dense parameters stay float32, and so do memories.

A number moves by half a step at most, 1/510 of its row's range. What that makes of a score depends on the model, so it
is measured on the export's held-out requests, and beyond these bounds nothing is exported:

- The AUC of clicks may move by 0.001, ten times the greatest move over the tests' models of every block.
- No score may move by more than 0.1. Where a model is smooth in its embeddings, the tests' greatest move is 0.003.
  Where it chooses by them, by a search or as a nearest group, a choice that was nearly even may fall otherwise, and
  single scores move by as much as 0.055. More than 0.1 is no rounding: a row's numbers lie orders of magnitude apart.
"""

ALLOWED = 0.1
"""greatest difference of a score from the trainer's"""
ALLOWED_AUC = 1e-3
"""greatest change of the clicks' AUC from the trainer's"""
