"""The machines that tables are placed on: ones that one has, or ones that one thinks of.

Bandwidths and the memory of ranks that nobody named are TorchRec's own defaults.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner import constants as torchrec_defaults

from features.errors import UserError
from ranker.ranks import Ranks

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Cluster:
    """Ranks, `per_host` to a machine, each with so much memory; bandwidths in bytes/ms, as TorchRec counts them."""

    device: Device
    ranks: int
    per_host: int
    hbm_bytes: int = torchrec_defaults.HBM_CAP
    """of a rank's GPU; of no meaning on CPU"""
    ddr_bytes: int = torchrec_defaults.DDR_CAP
    """a rank's share of its host's memory"""
    hbm_bandwidth: float = torchrec_defaults.HBM_MEM_BW
    ddr_bandwidth: float = torchrec_defaults.DDR_MEM_BW
    hbm_to_ddr_bandwidth: float = torchrec_defaults.HBM_TO_DDR_MEM_BW
    intra_host_bandwidth: float = torchrec_defaults.INTRA_NODE_BANDWIDTH
    inter_host_bandwidth: float = torchrec_defaults.CROSS_NODE_BANDWIDTH

    @property
    def hosts(self) -> int:
        """How many machines."""
        return self.ranks // self.per_host

    @property
    def memory_bytes(self) -> int:
        """A rank's own memory, where tables lie unless they are offloaded."""
        return self.hbm_bytes if self.device == "cuda" else self.ddr_bytes

    @property
    def memory(self) -> str:
        """What that memory is called."""
        return "HBM" if self.device == "cuda" else "memory"

    def group(self, replicas: int) -> Cluster:
        """The ranks of one of `replicas` groups of neighbours.

        Raises:
            UserError: the groups would be of unlike sizes, or begin in the midst of a machine and end in another's.
        """
        ranks, rest = divmod(self.ranks, replicas)
        if rest:
            fits = ", ".join(str(n) for n in range(1, self.ranks + 1) if self.ranks % n == 0)
            raise UserError(f"tables.replicas: {replicas} groups of {self.ranks} ranks are of unlike sizes; set {fits}")
        per_host = min(ranks, self.per_host)
        if ranks % per_host or self.per_host % per_host:
            raise UserError(
                f"tables.replicas: a group of {ranks} ranks begins in the midst of a machine of {self.per_host} and "
                "ends in another; let a group be a part of a machine, or whole machines"
            )
        return replace(self, ranks=ranks, per_host=per_host)

    def topology(self) -> Topology:
        """The same for TorchRec's planner."""
        return Topology(
            world_size=self.ranks,
            local_world_size=self.per_host,
            compute_device=self.device,
            hbm_cap=self.hbm_bytes,
            ddr_cap=self.ddr_bytes,
            hbm_mem_bw=self.hbm_bandwidth,
            ddr_mem_bw=self.ddr_bandwidth,
            hbm_to_ddr_mem_bw=self.hbm_to_ddr_bandwidth,
            intra_host_bw=self.intra_host_bandwidth,
            inter_host_bw=self.inter_host_bandwidth,
        )


def cluster_of(ranks: Ranks) -> Cluster:
    """The ranks of a run, with the memory that this rank's machine has; the others' are taken to be like it."""
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    ddr_bytes = host_bytes // ranks.local_world
    if ranks.device.type == "cpu":
        return Cluster("cpu", ranks.world, ranks.local_world, ddr_bytes=ddr_bytes)
    hbm_bytes = int(torch.cuda.get_device_properties(ranks.device).total_memory)
    return Cluster("cuda", ranks.world, ranks.local_world, hbm_bytes, ddr_bytes)
