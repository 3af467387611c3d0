"""Long-sequence methods: one file a method, behind the one protocol of :mod:`ranker.longseq.protocol`."""

from ranker.longseq.hisac import HiSAC
from ranker.longseq.hytrec import HyTRec
from ranker.longseq.mean import MeanPooling
from ranker.longseq.protocol import History, LongSequence, Probes, Target
from ranker.longseq.target_attention import TargetAttention
from ranker.longseq.uxsid import UxSID

__all__ = [
    "HiSAC",
    "History",
    "HyTRec",
    "LongSequence",
    "MeanPooling",
    "Probes",
    "Target",
    "TargetAttention",
    "UxSID",
]
