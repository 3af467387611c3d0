"""Search methods: of a long history a candidate sees the K events that some search finds for it, and attends to them.

`read` grows with the history by the search alone, an inner product a pair of candidate and event at most.
"""

from ranker.longseq.search.eta import ETA
from ranker.longseq.search.mirrn import MIRRN
from ranker.longseq.search.sim_hard import SimHard
from ranker.longseq.search.sim_soft import SimSoft
from ranker.longseq.search.twin import TWIN

__all__ = ["ETA", "MIRRN", "TWIN", "SimHard", "SimSoft"]
