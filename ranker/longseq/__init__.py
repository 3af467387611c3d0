"""Long-sequence methods: one file a method, behind the one protocol of :mod:`ranker.longseq.protocol`."""

from ranker.longseq.mean import MeanPooling
from ranker.longseq.protocol import History, LongSequence, Probes, Target
from ranker.longseq.target_attention import TargetAttention

__all__ = ["History", "LongSequence", "MeanPooling", "Probes", "Target", "TargetAttention"]
