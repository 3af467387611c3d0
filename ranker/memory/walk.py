"""Walk over users and write the records of each: what a build and a refresh have in common.

All ranks make records together, as tables may be on others; a rank whose users have run out makes those of nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from features.batch import RequestBatch, from_tensors
from features.collate import assemble, nothing
from features.progress import Progress
from features.selection import Selection
from features.users import NEVER, UserBatches
from features.workers import built
from ranker.longseq import Stored
from ranker.memory.config import MemoryConfig
from ranker.memory.encode import encode
from ranker.memory.job_lease import JobLease
from ranker.memory.keys import I64, U64, Keys, keys_of, user_keys
from ranker.memory.making import BlockRecords, RecordMaker
from ranker.memory.raw_users import RawUsers
from ranker.memory.stamps import BLOCK, Asked, stamped
from ranker.memory.store import Generation, GenerationWriter
from ranker.ranks import Ranks

Before = Callable[[U64, list[BlockRecords]], Counter[str]]
"""What is to be done before the records of some users `[R, 2]` are written; what it counted."""
After = Callable[[int, bool, Counter[str]], None]
"""What is to be done when they are: with their partition, whether it has no users left, and what was counted."""


@dataclass(frozen=True)
class Walk:
    """What records are made by, and where they go."""

    maker: RecordMaker
    raw: RawUsers
    writer: GenerationWriter
    generation: Generation
    selection: Selection
    config: MemoryConfig
    ranks: Ranks
    lease: JobLease

    def over(self, source: UserBatches, what: str, after: After, before: Before | None = None) -> int:
        """Write the records of this rank's users, batch by batch; how many users. Every rank calls it.

        Raises:
            UserError: the job's lease was lost; nothing was written since.
        """
        steps = max(self.ranks.gathered(len(source)))
        batches = self._batches(source)
        users = 0
        with Progress(what, steps, self.ranks.first) as progress:
            for step in range(steps):
                own = step < len(source)
                batch = next(batches) if own else self._nobody()
                with self.ranks.named(lambda step=step: f"batch {step} of users"):
                    made = self.maker.make(batch.to(self.ranks.device))
                    self.lease.check()
                if own:
                    hashes, counts = self.raw.hashes(batch.user.numpy()), Counter[str]()
                    if before is not None:
                        counts.update(before(hashes, made))
                    counts.update(self._write(batch, hashes, made))
                    partition = source.slots[step].partition
                    last = step + 1 == len(source) or source.slots[step + 1].partition != partition
                    after(partition, last, counts)
                    users += batch.requests
                progress.note(f"{users:,} users of this rank")
                progress.advance()
        return users

    def _batches(self, source: UserBatches) -> Iterator[RequestBatch]:
        config = self.config
        for tensors in built(source, range(len(source)), config.workers, config.prefetch):
            yield from_tensors(self.selection.spec, tensors)

    def _nobody(self) -> RequestBatch:
        return from_tensors(self.selection.spec, assemble([nothing(self.selection)], self.selection))

    def _write(self, batch: RequestBatch, users: U64, made: list[BlockRecords]) -> Counter[str]:
        """Records first, and then the stamps that speak of them."""
        now = batch.now.numpy()
        counts: Counter[str] = Counter(users=batch.requests)
        for block, stored, codes in made:
            number = block.number
            if codes is None:
                keys, as_of = user_keys(users, number), now
            else:
                request = codes.request.cpu().numpy()
                keys, as_of = keys_of(users, number, request, codes.code.cpu().numpy()), now[request]
                counts["cut"] += codes.cut
            records, size = self._put(keys, stored, as_of, counts)
            counts[f"{number}.records"] += records
            counts[f"{number}.bytes"] += size
            counts["memories"] += records
            counts["memory_bytes"] += size
        asked = [Asked(made_.codes.code.cpu(), made_.codes.request.cpu()) for made_ in made if made_.codes is not None]
        stamps = stamped(batch.history_length, last_of(batch), asked)
        counts["stamp_bytes"] += self._put(user_keys(users, BLOCK), stamps, now, counts)[1]
        counts["longer"] += int((batch.history_length > batch.end - batch.start).sum())
        return counts

    def _put(self, keys: Keys, stored: Stored, as_of: I64, counts: Counter[str]) -> tuple[int, int]:
        """How many records, of how many bytes."""
        encoded = encode(stored, keys.fingerprint, self.generation.versions, as_of, self.generation.dtype)
        self.writer.put_many(keys.key, encoded.values)
        counts["clamped"] += encoded.clamped
        return len(encoded.values), sum(map(len, encoded.values))


def last_of(batch: RequestBatch) -> torch.Tensor:
    """The time of the last event known of each user `[R]`, NEVER without one."""
    known = batch.end > batch.start
    last = torch.full_like(batch.now, NEVER)
    last[known] = batch.event_time[batch.end[known] - 1]
    return last
