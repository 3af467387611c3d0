"""What a rank's memory is kept for, and which tables do not fit into what is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from torchrec.distributed.planner.types import ShardingOption, Storage

from ranker.config import TablesConfig
from ranker.planning.cluster import Cluster
from ranker.planning.constraints import ShardingError
from ranker.planning.reads import Reads
from ranker.planning.tables import tables_of
from ranker.tables.managed_collision import history_bytes

_ID_BYTES = 8
_ID_COPIES = 20
"""of a batch's ids, in TorchRec's own estimate: two batches under way, ten copies of each"""
_DENSE_COPIES = 4
"""of the dense parameters: themselves, their gradients, which are DDP's buckets, and Adam's two moments"""


class Room(NamedTuple):
    """A rank's memory, HBM of a GPU, and what of it is not for tables; host_bytes: what offloaded tables may take."""

    memory: str
    memory_bytes: int
    reserve_bytes: int
    dense_bytes: int
    ids_bytes: int
    host_bytes: int

    @property
    def left_bytes(self) -> int:
        """For tables, and the vectors that they bring."""
        return self.memory_bytes - self.reserve_bytes - self.dense_bytes - self.ids_bytes


class Misfit(NamedTuple):
    """A table of which some shard fits on no rank, however sharded: the option whose largest shard is smallest."""

    table: str
    sharding: str
    shard_bytes: int
    offloaded_bytes: int


class DoesNotFit(ShardingError):
    """There is not the memory. misfits: tables that do not fit even alone; none where all together are too much."""

    def __init__(self, message: str, room: Room, misfits: Sequence[Misfit] = ()) -> None:
        super().__init__(message)
        self.room, self.misfits = room, tuple(misfits)


def room_of(model: nn.Module, config: TablesConfig, cluster: Cluster, reads: Reads) -> Room:
    """What each rank's memory is kept for; the dense part is the same on all."""
    # tables alone are on the meta device, before they are sharded
    dense = sum(p.nbytes for p in model.parameters() if not p.is_meta) * _DENSE_COPIES
    buffers = sum(b.nbytes for b in model.buffers() if not b.is_meta)
    # of managed tables: whose row each is, divided like rows, and the ids met between two times that others are let in
    slots = sum(b.nbytes for b in model.buffers() if b.is_meta) / cluster.ranks
    for table in tables_of(model):
        met = sum(reads[key].lists * reads[key].ids for key in table.features if key in reads)
        slots += history_bytes(model, table.name, met)
    ids = sum(reads[key].lists * reads[key].ids for table in tables_of(model) for key in table.features if key in reads)
    reserved = config.reserve * cluster.hbm_bytes if cluster.device == "cuda" else 0
    return Room(
        memory=cluster.memory,
        memory_bytes=cluster.memory_bytes,
        reserve_bytes=round(reserved),
        dense_bytes=dense + buffers + round(slots),
        ids_bytes=round(ids * _ID_BYTES * _ID_COPIES),
        host_bytes=cluster.ddr_bytes if cluster.device == "cuda" else 0,
    )


def impossible(options: Sequence[ShardingOption], room: Room, ranks: int) -> DoesNotFit | None:
    """Why no plan can be, where that is plain before one is searched for."""
    if room.left_bytes <= 0:
        return DoesNotFit(f"nothing is left for tables: {_kept(room)}", room)
    misfits = [misfit for table in _by_table(options).values() if (misfit := _misfit(table, room)) is not None]
    if misfits:
        misfits.sort(key=lambda misfit: -misfit.shard_bytes - misfit.offloaded_bytes)
        told = "; ".join(
            f"{misfit.table}, {misfit.sharding}: a shard takes at least "
            f"{_amounts(misfit.shard_bytes, misfit.offloaded_bytes, room)}"
            for misfit in misfits
        )
        offloaded = any(misfit.offloaded_bytes for misfit in misfits)
        return DoesNotFit(f"{told}. A rank has {_left(room, offloaded)}", room, misfits)
    least = sum(min(_total(option, room)[0] for option in table) for table in _by_table(options).values())
    return no_way(options, room, ranks) if least > ranks * room.left_bytes else None


def no_way(options: Sequence[ShardingOption], room: Room, ranks: int) -> DoesNotFit:
    """That all tables together do not fit, though each would alone.

    Args:
        options: every one that the planner may choose from, with its shards' memory.
    """
    least = {name: min(_total(option, room) for option in table) for name, table in _by_table(options).items()}
    largest = ", ".join(f"{name} {size(sum(least[name]))}" for name in sorted(least, key=least.__getitem__)[:-4:-1])
    own, offloaded = sum(own for own, _ in least.values()), sum(offloaded for _, offloaded in least.values())
    return DoesNotFit(
        f"no place for all tables together: they take at least {_amounts(own, offloaded, room)} ({largest}, …). Each "
        f"of {ranks} ranks has {_left(room, offloaded > 0)}",
        room,
    )


def _by_table(options: Sequence[ShardingOption]) -> dict[str, list[ShardingOption]]:
    tables: dict[str, list[ShardingOption]] = {}
    for option in options:
        tables.setdefault(option.name, []).append(option)
    return tables


def _misfit(options: Sequence[ShardingOption], room: Room) -> Misfit | None:
    """A table none of whose options fits on empty ranks."""
    largest: dict[str, tuple[int, int]] = {}
    for option in options:
        shards = [_split(shard.storage, room) for shard in option.shards]
        if all(own <= room.left_bytes and offloaded <= room.host_bytes for own, offloaded in shards):
            return None
        largest.setdefault(option.sharding_type, max(shards))
    sharding = min(largest, key=largest.__getitem__)
    return Misfit(options[0].name, sharding, *largest[sharding])


def _total(option: ShardingOption, room: Room) -> tuple[int, int]:
    """All shards' memory, the ranks' own and their hosts'."""
    shards = [_split(shard.storage, room) for shard in option.shards]
    return sum(own for own, _ in shards), sum(offloaded for _, offloaded in shards)


def _split(storage: Storage | None, room: Room) -> tuple[int, int]:
    """A shard's memory: the rank's own, and what is offloaded to its host."""
    assert storage is not None
    return (storage.hbm, storage.ddr) if room.memory == "HBM" else (storage.ddr, 0)


def _kept(room: Room) -> str:
    return (
        f"of {size(room.memory_bytes)} of {room.memory}, {size(room.reserve_bytes)} are in reserve, "
        f"{size(room.dense_bytes)} for the dense part, {size(room.ids_bytes)} for ids"
    )


def _left(room: Room, offloaded: bool) -> str:
    return f"{_amounts(room.left_bytes, room.host_bytes if offloaded else 0, room)} for tables ({_kept(room)})"


def _amounts(own: int, offloaded: int, room: Room) -> str:
    text = f"{size(own)} of {room.memory}"
    return f"{text} and {size(offloaded)} of the host's" if offloaded else text


def size(count: float) -> str:
    """Bytes in the unit that reads best.

    >>> size(3 * 2**30), size(1536)
    ('3.0 GiB', '1.5 KiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
