"""`ranker export RUN --out DIR`: TorchScript that scores as the trainer does, wherever torch and fbgemm_gpu load.

:mod:`.whole` is the ranker in one file; :mod:`.pair` is the same in two, with a memory store between them.
:mod:`.parity` compares every file's scores with the trainer's; :mod:`.manifest` describes them to a server.
"""

from ranker.export.command import export
from ranker.export.inputs import (
    StoredBlock,
    encoder_inputs_of,
    inputs_of,
    no_pair_because,
    probes_of,
    ranker_inputs_of,
    short_length_of,
    stored_blocks,
)
from ranker.export.pair import CandidateRanker, UserEncoder
from ranker.export.restored import ExportError, unsharded
from ranker.export.ways import through_pair
from ranker.export.whole import ServedRanker, known_ids, sizes

__all__ = [
    "CandidateRanker",
    "ExportError",
    "ServedRanker",
    "StoredBlock",
    "UserEncoder",
    "encoder_inputs_of",
    "export",
    "inputs_of",
    "known_ids",
    "no_pair_because",
    "probes_of",
    "ranker_inputs_of",
    "short_length_of",
    "sizes",
    "stored_blocks",
    "through_pair",
    "unsharded",
]
