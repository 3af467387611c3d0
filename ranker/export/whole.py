"""The whole ranker on plain tensors by name: what a server without a memory store loads.

:class:`features.batch.RequestBatch` says what each input holds; the numbers of requests, candidates and events are
free.
"""

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.batch import names, sequence_keys
from features.selection import Feature, FeatureSpec
from ranker.model import Plain, Ranker
from ranker.ops.probing import known_codes
from ranker.towers import esmm_probabilities


def sizes(features: tuple[Feature, ...]) -> list[int]:
    """Ids of each feature's table, the reserved 0 included."""
    return [f.size for f in features]


def known_ids(values: Tensor, lengths: Tensor, sizes: list[int]) -> Tensor:
    """Ids outside their feature's table read the reserved row 0.

    Args:
        values: `[V]` ids, feature by feature; lengths: `[features · stride]`.
    """
    if len(sizes) == 0:
        return values
    of_feature = lengths.view(len(sizes), lengths.numel() // len(sizes)).sum(1)  # also of no candidate
    size = torch.repeat_interleave(torch.tensor(sizes, device=values.device), of_feature)
    return torch.where((values >= 0) & (values < size), values, torch.zeros_like(values))


class ServedRanker(nn.Module):
    """The ranker on plain tensors, unsharded: what is scripted.

    Ids and codes at or above their table's size are unknown and read the reserved row 0, so that a server may send any
    dense index.
    """

    # lists may be empty, and then do not tell their type
    request_keys: list[str]
    candidate_keys: list[str]
    request_sizes: list[int]
    candidate_sizes: list[int]
    code_sizes: list[int]

    def __init__(self, ranker: Ranker, spec: FeatureSpec) -> None:
        super().__init__()
        self.tables, self.dense = ranker.tables, ranker.dense
        self.request_keys, self.candidate_keys = names(spec.request), names(spec.candidate)
        self.sequence_keys = sequence_keys(spec)
        self.request_sizes = sizes(spec.request)
        self.candidate_sizes = sizes(spec.candidate)
        self.sequence_sizes = sizes((*spec.sequence, *spec.event, *spec.content, *spec.sequence))
        self.code_sizes = sizes(spec.codes)

    def forward(
        self,
        request_values: Tensor,
        request_lengths: Tensor,
        candidate_values: Tensor,
        candidate_lengths: Tensor,
        sequence_values: Tensor,
        sequence_lengths: Tensor,
        request_dense: Tensor,
        candidate_dense: Tensor,
        event_dense: Tensor,
        event_codes: Tensor,
        candidate_codes: Tensor,
        event_time: Tensor,
        now: Tensor,
        start: Tensor,
        end: Tensor,
        offsets: Tensor,
    ) -> Tensor:
        """Probabilities `[N, 1]` (click) or `[N, 3]` (click; click and conversion; conversion given a click)."""
        if torch.jit.is_scripting() and candidate_dense.size(0) == 0:  # which TorchRec's look-ups do not take
            return esmm_probabilities(torch.zeros([0, self.dense.tasks]))
        request_values = known_ids(request_values, request_lengths, self.request_sizes)
        candidate_values = known_ids(candidate_values, candidate_lengths, self.candidate_sizes)
        sequence_values = known_ids(sequence_values, sequence_lengths, self.sequence_sizes)
        request = KeyedJaggedTensor(self.request_keys, request_values, lengths=request_lengths)
        candidate = KeyedJaggedTensor(self.candidate_keys, candidate_values, lengths=candidate_lengths)
        sequence = KeyedJaggedTensor(self.sequence_keys, sequence_values, lengths=sequence_lengths)
        event_codes = known_codes(event_codes, self.code_sizes)
        candidate_codes = known_codes(candidate_codes, self.code_sizes)
        plain = Plain(
            request_dense, candidate_dense, event_dense, event_codes, candidate_codes,
            event_time, now, start, end, offsets,
        )  # fmt: skip
        return esmm_probabilities(self.dense(self.tables(request, candidate, sequence), plain).logits)
