"""Long-sequence methods: one file a method, behind the one protocol of :mod:`ranker.longseq.protocol`.

Here: the three compressors, and the two references that need no more than a sentence, mean pooling and exact target
attention. What they are compared with: :mod:`.search`, which finds the K events that matter; :mod:`.groups`, which
keeps a fixed number of vectors; :mod:`.encoders`, which run self-attention over the history.
"""

from ranker.longseq.hisac import HiSAC
from ranker.longseq.hytrec import HyTRec
from ranker.longseq.mean import MeanPooling
from ranker.longseq.protocol import Compressor, History, LongSequence, Probes, Target
from ranker.longseq.stored import Stored
from ranker.longseq.target_attention import TargetAttention
from ranker.longseq.uxsid import UxSID

__all__ = [
    "Compressor",
    "HiSAC",
    "History",
    "HyTRec",
    "LongSequence",
    "MeanPooling",
    "Probes",
    "Stored",
    "Target",
    "TargetAttention",
    "UxSID",
]
