"""What ``*.int8.pt`` may cost: the exported files once more with tables of bytes, a quarter of the size.

Tables are all that is large. Every one is quantised, row by row (:mod:`ranker.tables.served`), frozen content vectors
too: they are read as embeddings are. Dense parameters stay float32, and so do memories.

A number moves by half a step at most, 1/510 of its row's range. What that makes of a score depends on the model, so it
is measured on the export's held-out requests, and beyond these bounds nothing is exported:

- The AUC of clicks may move by 0.001, four times the greatest move over the tests' models of every block.
- The scores' differences may have a root mean square of 0.01. The tests' models stay below 0.0004 where they are smooth
  in their embeddings, and below 0.003 where they choose by them, by a search or as a nearest group: a choice that was
  nearly even may fall otherwise. The greatest difference is not bounded, because such a choice moves a single score by
  0.1 and more, and the more requests are compared, the surer one is met. A greater root mean square is no rounding: a
  row's numbers lie orders of magnitude apart.
"""

ALLOWED_RMS = 0.01
"""greatest root mean square of the scores' differences from the trainer's"""
ALLOWED_AUC = 1e-3
"""greatest change of the clicks' AUC from the trainer's"""
