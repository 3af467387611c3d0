"""Encoders of whole histories, one file a method: what the compressors are compared with.

All map events and candidates to tokens by :mod:`.tokens`, and let candidates read what they make of a history by
:mod:`.outputs`. LONGER and ELASTIC keep a number of outputs that does not grow with the history; SASRec and HSTU attend
every event to every earlier one, at a cost of Σ L², and keep one output an event.
"""

from ranker.longseq.encoders.elastic import ELASTIC
from ranker.longseq.encoders.hstu import HSTU
from ranker.longseq.encoders.longer import LONGER
from ranker.longseq.encoders.sasrec import SASRec

__all__ = ["ELASTIC", "HSTU", "LONGER", "SASRec"]
