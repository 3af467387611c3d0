"""From a block's config to its module, with what it reads of the batch beside embeddings: codes, content and probes."""

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from features.batch import names
from features.errors import UserError
from features.selection import FeatureSpec
from ranker.config_blocks import HiSacConfig, HyTrecConfig, LongConfig, SimHardConfig, SimSoftConfig, UxSidConfig
from ranker.longseq import HiSAC, History, HyTRec, MeanPooling, Probes, Stored, Target, TargetAttention, UxSID
from ranker.longseq.encoders import ELASTIC, HSTU, LONGER, SASRec
from ranker.longseq.groups import LSH, SDIM, VQL, Aggregator, CFormer, KMeans, Patching, PolyEncoder
from ranker.longseq.search import ETA, MIRRN, TWIN, SimHard, SimSoft
from ranker.ops.probing import distinct_probes

Codewords = dict[str, list[Tensor]]
"""`[K_l + 1, dz]` of each level of each codebook; row 0, no code, is zero"""

MODULES: dict[str, Callable[..., nn.Module]] = {
    "mean": MeanPooling,
    "target_attention": TargetAttention,
    "hytrec": HyTRec,
    "sim_hard": SimHard,
    "sim_soft": SimSoft,
    "eta": ETA,
    "twin": TWIN,
    "mirrn": MIRRN,
    "sdim": SDIM,
    "vql": VQL,
    "cformer": CFormer,
    "kmeans": KMeans,
    "lsh": LSH,
    "patching": Patching,
    "aggregator": Aggregator,
    "poly_encoder": PolyEncoder,
    "longer": LONGER,
    "elastic": ELASTIC,
    "sasrec": SASRec,
    "hstu": HSTU,
}
"""Blocks that need the width of events and their options alone, by `type`."""


def compresses(config: LongConfig) -> bool:
    """Whether a store can keep the block's memory: it is of a size that reading does not need the history for."""
    if isinstance(config, UxSidConfig | HiSacConfig):
        return True
    return hasattr(MODULES[config.type], "store")


def per_probe(config: LongConfig) -> bool:
    """Whether a compressor keeps a record for each probe of a request, and not one for the request."""
    return isinstance(config, UxSidConfig)


class BlockInput(NamedTuple):
    """The block's own view of the batch: the codes it reads, the probes it asks about, and each candidate's probe."""

    history: History
    probes: Probes
    target: Target


class BlockOutput(NamedTuple):
    """out: `[N, out_dim]`, what each candidate reads; loss: the block's own, a scalar; click_logits: `[N, k]`, its own
    of a click, from which it learns too; k = 0 for most, and for all but in training."""

    out: Tensor
    loss: Tensor
    click_logits: Tensor


class Block(nn.Module):
    """One long-sequence block of the ranker, number `index` of ``model.long``.

    Args:
        dim: width of a sequence feature's table; events and candidates have one such slice a feature.
        codewords: of the codebooks that blocks name.

    Raises:
        UserError: the block needs features that the config does not read, or its sizes do not fit.
    """

    code_columns: list[int]
    predicts: Final[bool]  # final, so that TorchScript looks for `click_logits` only where they are
    shortens: Final[bool]  # by `read_few`, where candidates are few; such blocks have no loss of their own

    def __init__(self, index: int, config: LongConfig, spec: FeatureSpec, dim: int, codewords: Codewords) -> None:
        super().__init__()
        self.code_columns = []
        self.probe_column, self.probe_start, self.dim = -1, 0, dim
        self.content_start, self.content_dim = 0, 0
        self.name, self.kind = f"model.long[{index}]", config.type
        self.predicts = isinstance(config, SimSoftConfig)
        self.shortens = hasattr(MODULES.get(config.type), "read_few")
        if isinstance(config, UxSidConfig | SimHardConfig):
            self.probe_column, self.probe_start = _probe(f"{self.name}.probe", config.probe, spec, dim)
        if isinstance(config, SimHardConfig):
            self.code_columns = [self.probe_column]
        if isinstance(config, HiSacConfig):
            self.code_columns = _levels(self.name, config, spec, len(codewords[config.codebook]))
            if config.z == "content":
                self.content_start, self.content_dim = _content(self.name, config, spec, codewords)
        if isinstance(config, HyTrecConfig):
            self.code_columns = [_probe(f"{self.name}.slots", feature, spec, dim)[0] for feature in config.slots]
        try:
            self.block = _module(self.name, config, spec, dim, self.probe_start, codewords)
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from error
        self.out_dim = int(self.block.out_dim)  # type: ignore[arg-type]

    def forward(self, history: History, target: Target) -> BlockOutput:
        """What candidates read of their histories; arguments as of :meth:`inputs`."""
        history, probes, target = self.inputs(history, target)
        if self.shortens:  # noqa: SIM102  apart, so that TorchScript does not look for what other blocks have not
            if not torch.jit.is_scripting() and self.training and self.block.few(history, target):  # type: ignore[operator]
                out = self.block.read_few(history, target)  # type: ignore[operator]
                return BlockOutput(out, torch.zeros([], device=out.device), out[:, :0])
        memory = self.block.encode(history, probes)  # type: ignore[operator]
        out = self.block.read(memory, target)  # type: ignore[operator]
        loss, click_logits = torch.zeros([], device=out.device), torch.zeros([out.size(0), 0], device=out.device)
        if self.training:
            loss = self.block.auxiliary(history, memory)  # type: ignore[operator]
            if self.predicts:
                click_logits = self.block.click_logits(memory, target)  # type: ignore[operator]
        return BlockOutput(out, loss, click_logits)

    def inputs(self, history: History, target: Target) -> BlockInput:
        """What the block itself reads: of the codes its own, and the probes that candidates share.

        Args:
            history: `code` holds every feature of ``features.codes``, `content` every one of ``features.content``.
            target: without probes; its `code` too holds every feature of ``features.codes``.
        """
        none = torch.zeros([0], dtype=torch.int64, device=target.x.device)
        probes = Probes(target.x[:0], none, none)
        if self.probe_column >= 0:
            group, request, probe, first = distinct_probes(target.code[:, self.probe_column], target.offsets)
            c = target.x.index_select(0, first).narrow(1, self.probe_start, self.dim)
            probes = Probes(c, group, request)
            target = Target(target.x, target.offsets, probe, target.code)
        return BlockInput(self.own(history), probes, self._asking(target))

    def _asking(self, target: Target) -> Target:
        """The same with the codes that the block reads, of all the ranker's."""
        return Target(target.x, target.offsets, target.probe, self._own_codes(target.code))

    def _own_codes(self, code: Tensor) -> Tensor:
        if len(self.code_columns) == 0:
            return code[:, :0]
        return code.index_select(1, torch.tensor(self.code_columns, device=code.device))

    def own(self, history: History) -> History:
        """The same with the codes and the content that the block reads, of all the ranker's."""
        code = self._own_codes(history.code)
        content = history.content.narrow(1, self.content_start, self.content_dim)
        return History(history.x, history.time, history.start, history.end, history.now, code, content)

    def store(self, history: History, probes: Probes) -> Stored:
        """Of a compressor: what a store keeps of each request, or of each probe.

        Args:
            history: with every code and all content of the ranker, as of :meth:`inputs`.
        """
        memory = self.block.encode(self.own(history), probes)  # type: ignore[operator]
        return self.block.store(memory)  # type: ignore[operator]

    def read_stored(self, stored: Stored, now: Tensor, target: Target) -> Tensor:
        """Of a compressor: what candidates read of stored records at `now` `[R]`: `[N, out_dim]`.

        Args:
            target: each candidate's probe is its record of `stored`, for a block with probes.
        """
        return self.block.read(self.block.restore(stored, now), self._asking(target))  # type: ignore[operator]


def _listed(features: list[str]) -> str:
    return ", ".join(features) or "nothing"


def _probe(key: str, feature: str, spec: FeatureSpec, dim: int) -> tuple[int, int]:
    """Where the probe stands among the codes, and where its embedding starts in a candidate's."""
    return _place(key, feature, "codes", names(spec.codes)), _start(key, feature, spec, dim)


def _start(key: str, feature: str, spec: FeatureSpec, dim: int) -> int:
    """Where a feature's embedding starts in an event's and a candidate's."""
    return dim * _place(key, feature, "sequence", names(spec.sequence))


def _place(key: str, feature: str, place: str, have: list[str]) -> int:
    if feature not in have:
        raise UserError(f"{key}: {feature!r} is not in features.{place}, which has {_listed(have)}; add it there")
    return have.index(feature)


def _levels(block: str, config: HiSacConfig, spec: FeatureSpec, levels: int) -> list[int]:
    """Where the codebook's levels stand among the codes."""
    have = names(spec.codes)
    needed = [f"item.{config.codebook}_{level}" for level in range(1, levels + 1)]
    if missing := [name for name in needed if name not in have]:
        raise UserError(
            f"{block}.codebook: {config.codebook!r} needs {', '.join(missing)} in features.codes, which has "
            f"{_listed(have)}; add what is missing"
        )
    if len(config.keep) != levels:
        raise UserError(
            f"{block}.keep: {config.keep} has {len(config.keep)} numbers, the codebook {config.codebook!r} has "
            f"{levels} levels; give one for each"
        )
    return [have.index(name) for name in needed]


def _content(block: str, config: HiSacConfig, spec: FeatureSpec, codewords: Codewords) -> tuple[int, int]:
    """Where the codebook's vectors begin among the content's columns, and their width."""
    have, needed = names(spec.content), f"item.{config.codebook}_vector"
    if needed not in have:
        raise UserError(
            f"{block}.z: 'content' needs {needed} in features.content, which has {_listed(have)}; add it there"
        )
    at = have.index(needed)
    dim, width = spec.content[at].dim, codewords[config.codebook][0].size(1)
    if dim != width:
        raise UserError(
            f"{block}.z: {needed} has {dim} floats, the codewords of {config.codebook!r} have {width}; apply that "
            "codebook again (`ranker sids apply`)"
        )
    return sum(f.dim for f in spec.content[:at]), dim


def _module(
    block: str, config: LongConfig, spec: FeatureSpec, dim: int, probe_start: int, codewords: Codewords
) -> nn.Module:
    width = dim * len(spec.sequence)
    options = config.model_dump(exclude={"type", "probe", "codebook", "search_weight", "key", "slots"})
    if isinstance(config, UxSidConfig):
        return UxSID(width, dim, probe_start=probe_start, **options)
    if isinstance(config, HiSacConfig):
        return HiSAC(width, codewords[config.codebook], **options)
    if isinstance(config, HyTrecConfig):
        options["code_heads"] = len(config.slots)
        if config.key is not None:
            options |= {"key_start": _start(f"{block}.key", config.key, spec, dim), "key_width": dim}
    return MODULES[config.type](width, **options)
