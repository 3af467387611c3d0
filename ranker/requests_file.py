"""`ranker requests RUN --split test --requests 100 --out FILE`: requests of a split as a server would send them.

A server's team needs inputs to try its code on, and scores to compare its own with. The file is safetensors, which
every language reads without PyTorch or Python: 8 bytes of header length, a JSON header, the numbers. Its tensors are
named ``REQUEST/MODEL/INPUT``, or ``REQUEST/MODEL/INPUT/KEY`` where an input is a dictionary:
``17/ranker/candidate_values`` is what request 17 gives to the exported ``ranker.pt`` as ``candidate_values``.
``17/expected`` ``[N, tasks]`` are the trainer's scores of its candidates. Of ``candidate_ranker``'s memory the file
has only what the request tells, each candidate's record: the rest is what ``user_encoder`` returns, or a store keeps.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from features.batch import RequestBatch
from features.errors import UserError
from features.progress import log
from features.schema import Split
from features.selection import FeatureSpec, resolve
from ranker.config import TrainConfig
from ranker.evaluate import restore
from ranker.evaluation.predict import scoring_loader, selection_of
from ranker.export import (
    encoder_inputs_of,
    inputs_of,
    no_pair_because,
    probes_of,
    ranker_inputs_of,
    short_length_of,
    stored_blocks,
)
from ranker.ranks import join_ranks
from ranker.run import Run
from ranker.towers import esmm_probabilities

FORMAT = "ranker requests 1"

Inputs = Mapping[str, Tensor | Mapping[str, Tensor]]


class Example(NamedTuple):
    """One request.

    models: what each exported model is given, by the model's file name without its ending.
    expected: `[N, tasks]` the trainer's probabilities.
    """

    models: Mapping[str, Inputs]
    expected: Tensor


def save_requests(examples: Sequence[Example], out: Path) -> None:
    """Write aside, then rename."""
    tensors: dict[str, Tensor] = {}
    for number, example in enumerate(examples):
        tensors[f"{number}/expected"] = example.expected
        for model, inputs in example.models.items():
            for name, value in inputs.items():
                entries = {"": value} if isinstance(value, Tensor) else {f"/{key}": x for key, x in value.items()}
                tensors |= {f"{number}/{model}/{name}{key}": x for key, x in entries.items()}
    # the format has no shared memory, and some inputs are views of one array
    tensors = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    aside = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        save_file(tensors, aside, {"format": FORMAT, "requests": str(len(examples))})
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)


def models_of(batch: RequestBatch, spec: FeatureSpec, config: TrainConfig) -> dict[str, Inputs]:
    """What a batch gives to each exported model; to the whole ranker alone where there is no pair."""
    whole: dict[str, Inputs] = {"ranker": inputs_of(batch)}
    if no_pair_because(config):
        return whole
    probes, records = probes_of(batch, stored_blocks(config, spec))
    own = ranker_inputs_of(batch, spec, short_length_of(config))
    return whole | {"user_encoder": encoder_inputs_of(batch, probes), "candidate_ranker": own | {"memory": records}}


def write_requests(run_root: Path, split: Split, requests: int, out: Path) -> int:
    """The first `requests` requests of a split in the dataset's order; how many there were.

    Raises:
        UserError: no run, no such split, or `out` exists.
    """
    if out.exists():
        raise UserError(f"{out}: exists; choose another --out")
    run = Run(run_root)
    dataset, config = run.dataset(), run.config
    if split not in dataset.manifest.filled_splits():
        raise UserError(f"--split {split}: not in {dataset.root}; it has {', '.join(dataset.manifest.filled_splits())}")
    one_by_one = config.model_copy(update={"loader": config.loader.model_copy(update={"requests": 1, "workers": 0})})
    spec = resolve(config.features, dataset.manifest)
    selection = selection_of(config, dataset, spec)
    examples: list[Example] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    with join_ranks("cpu", config.training.threads) as ranks:
        trained = restore(run, ranks).eval()
        batches = scoring_loader(one_by_one, dataset, split, selection, ranks).batches()
        with torch.no_grad():
            for batch in islice(batches, requests):
                expected = esmm_probabilities(trained(batch).logits)
                examples.append(Example(models_of(batch, spec, config), expected))
    save_requests(examples, out)
    log(f"{len(examples):,} {split} requests, {sum(len(e.expected) for e in examples):,} candidates in {out}")
    return len(examples)
