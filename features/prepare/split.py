"""Requests, and which of train, valid and test each belongs to.

Makes ``requests(u, part_of, request, began, split)``: `began` is the time of the request's first impression; `part_of`
the split its source names, `split` the one it gets: 0 train, 1 valid, 2 test, 3 (:data:`PAST`) none, before training
starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from features.instants import instant_ms, iso
from features.prepare.engine import Engine
from features.prepare.errors import PrepareError
from features.prepare.sources.tables import Table
from features.prepare.staging import SHARE_STEPS
from features.schema import SPLITS, Split, SplitConfig

PAST = 3
"""of requests that are not written, but count for what training knows"""
HELD_BACK = 4
"""of those of users who are held out: training is to know nothing of them"""
KNOWN = f"split IN (0, {PAST})"
"""SQL condition: requests whose users, items and values are known"""


@dataclass(frozen=True)
class Periods:
    """When each split's requests begin and end, ms; splits without requests are absent."""

    first: Mapping[Split, int]
    last: Mapping[Split, int]

    @property
    def train_end(self) -> int:
        """Time of the last training request."""
        return self.last["train"]


def split_requests(engine: Engine, table: Table, config: SplitConfig) -> Periods:
    """Group impressions to requests and divide them.

    Raises:
        PrepareError: the training split or a split the config asks for is empty.
    """
    if config.by == "column" and "@split" not in table.types:
        raise PrepareError(
            f"{table.path}: split.by is 'column' but there is no split column; "
            "name it (columns: {split: …}), or split by time or last"
        )
    engine.run(
        f"""CREATE TABLE requests AS SELECT u, part_of, request, began, {_split_sql(config)} AS split
        FROM (SELECT u, part_of, request, min(time) AS began FROM impressions GROUP BY ALL) ORDER BY u""",
        "dividing requests",
    )
    if config.valid_users:
        engine.run(
            f"""UPDATE requests SET split = CASE split WHEN 0 THEN 1 ELSE {HELD_BACK} END WHERE split IN (0, {PAST})
            AND u IN (SELECT u FROM users WHERE share < {round(config.valid_users * SHARE_STEPS)})""",
            "dividing requests",
        )
    if config.valid_time:
        _carve_latest(engine, config.valid_time)
    found = engine.rows(
        f"SELECT split, min(began), max(began) FROM requests WHERE split < {PAST} GROUP BY split", "dividing requests"
    )
    periods = Periods({SPLITS[s]: lo for s, lo, _ in found}, {SPLITS[s]: hi for s, _, hi in found})
    _check_not_empty(engine, table, config, periods)
    return periods


def _split_sql(config: SplitConfig) -> str:
    match config.by:
        case "column":
            return "part_of"
        case "time":
            starts = {
                name: (text, instant_ms(text, f"split.{name}"))
                for name in ("train_from", "valid_from", "test_from")
                if (text := getattr(config, name))
            }
            for (name, (text, start)), (later, (later_text, end)) in pairwise(starts.items()):
                if start >= end:
                    raise PrepareError(f"split.{name} {text} is not before split.{later} {later_text}; exchange them")
            number = {"valid_from": 1, "test_from": 2}
            cases = [f"WHEN began < {starts['train_from'][1]} THEN {PAST}"] if "train_from" in starts else []
            cases += [
                f"WHEN began >= {starts[n][1]} THEN {number[n]}" for n in ("test_from", "valid_from") if n in starts
            ]
            return f"CAST(CASE {' '.join(cases)} ELSE 0 END AS TINYINT)"
        case "last":
            place = "row_number() OVER (PARTITION BY u ORDER BY began DESC, request DESC)"
            test, valid = config.test_last, config.test_last + config.valid_last
            return f"CAST(CASE WHEN {place} <= {test} THEN 2 WHEN {place} <= {valid} THEN 1 ELSE 0 END AS TINYINT)"


def _carve_latest(engine: Engine, share: float) -> None:
    """Requests at or after an instant, the earliest with no more than `share` of training after it, validate."""
    start = engine.row(
        f"""SELECT min(began) FROM (
        SELECT began, sum(count(*)) OVER (ORDER BY began DESC) AS later, sum(count(*)) OVER () AS total
        FROM requests WHERE split = 0 GROUP BY began) WHERE later <= {share!r} * total""",
        "dividing requests",
    )[0]
    if start is not None:
        engine.run(f"UPDATE requests SET split = 1 WHERE split = 0 AND began >= {start}", "dividing requests")


def _check_not_empty(engine: Engine, table: Table, config: SplitConfig, periods: Periods) -> None:
    wanted: dict[Split, str] = {"train": "every dataset needs training requests"}
    if config.by == "last":
        if config.test_last:
            wanted["test"] = f"split.test_last is {config.test_last}"
        if config.valid_last:
            wanted["valid"] = f"split.valid_last is {config.valid_last}"
    if config.by == "time":
        if config.test_from:
            wanted["test"] = f"split.test_from is {config.test_from}"
        if config.valid_from:
            wanted["valid"] = f"split.valid_from is {config.valid_from}"
    if config.valid_users or config.valid_time:
        wanted["valid"] = f"split.valid_users is {config.valid_users}, split.valid_time {config.valid_time}"
    for name, why in wanted.items():
        if name not in periods.first:
            count, low, high = engine.row("SELECT count(*), min(began), max(began) FROM requests", table.path)
            found = (
                f"its {count} requests lie between {iso(low)} and {iso(high)}"
                if count
                else "there are no requests at all"
            )
            raise PrepareError(f"{table.path}: the {name} split is empty ({why}); {found}: change `split`")
