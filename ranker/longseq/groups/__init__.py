"""Methods that keep a constant number of vectors of a history, one a file; they differ in what they keep."""

from ranker.longseq.groups.aggregator import Aggregator
from ranker.longseq.groups.cformer import CFormer
from ranker.longseq.groups.kmeans import KMeans
from ranker.longseq.groups.lsh import LSH
from ranker.longseq.groups.patching import Patching
from ranker.longseq.groups.poly_encoder import PolyEncoder
from ranker.longseq.groups.sdim import SDIM
from ranker.longseq.groups.vql import VQL

__all__ = ["LSH", "SDIM", "VQL", "Aggregator", "CFormer", "KMeans", "Patching", "PolyEncoder"]
