"""A run's ranker as it is exported: restored by the trainer's own code, then with whole tables on this CPU."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from features.errors import UserError
from features.selection import FeatureSpec
from ranker.model import Ranker
from ranker.run import Run, codewords_of
from ranker.tables.held_rows import HeldRows


class ExportError(UserError):
    """The exported model does not do what the trainer's does."""


def unsharded(model: nn.Module, spec: FeatureSpec, run: Run) -> Ranker:
    """The same ranker with whole tables on this CPU.

    Raises:
        ExportError: a parameter has no counterpart.
    """
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, ShardedTensor):
            whole = torch.empty(value.size(), dtype=value.dtype) if dist.get_rank() == 0 else None
            value.gather(0, whole)
            assert whole is not None
            state[name] = whole
        else:
            state[name] = value.detach().cpu()
    codewords = codewords_of(run.config, run.dataset())
    ranker = Ranker(spec, run.config, run.moments(), codewords, device=torch.device("cpu"), held=True)
    missing, unexpected = ranker.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ExportError(f"parameters do not match: missing {missing}, unexpected {unexpected}")
    for own, trained in zip(_held(ranker), _held(model), strict=True):
        own.take(trained)
    return ranker.eval()


def _held(model: nn.Module) -> list[HeldRows]:
    return [module for module in model.modules() if isinstance(module, HeldRows)]
