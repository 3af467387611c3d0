"""Leak-safe statistics: of the rows with an impression's key, how many came before it, and the mean of their value.

A row at time t counts for impressions after t + delay, strictly, and with a window only up to t + delay + window. So it
is two marks on the key's time line, +1 and −1; the statistic is a running sum over marks and impressions in the order
of time, impressions ahead of marks at one instant. One sort a counter, no range frame; sums are integers
(value · 10^6), hence exact in any order. A row whose value is null does not count.

Makes ``counter_K(ordinal, n, total)``.
"""

from __future__ import annotations

from features.prepare.engine import Engine, quote
from features.schema import CounterConfig

SCALE = 1_000_000
_KEY = {"user": "u", "item": "i"}


def table_of(number: int) -> str:
    """Table of the counter at a place in the config."""
    return f"counter_{number}"


def count(engine: Engine, number: int, config: CounterConfig) -> None:
    """Make the counter's table, one row an impression."""
    key = ", ".join(_KEY[k] for k in config.key)
    value = quote("counter." + config.name)
    delay, about = round(config.delay_s * 1000), f"counters.{config.name}"
    exact = f"CAST(round({value} * {SCALE}) AS BIGINT)"
    rows = f"SELECT {key}, time + {delay} AS began, {exact} AS v FROM {config.of} WHERE {value} IS NOT NULL"
    marks = f"SELECT {key}, began, 1 AS kind, 1 AS n, v, NULL AS ordinal FROM ({rows})"
    if config.window_s is not None:
        window = round(config.window_s * 1000)
        marks += f" UNION ALL SELECT {key}, began + {window}, 1, -1, -v, NULL FROM ({rows})"
    engine.run(
        f"""CREATE TABLE {table_of(number)} AS
        SELECT ordinal, CAST(sum(n) OVER line AS BIGINT) AS n, CAST(sum(v) OVER line AS BIGINT) AS total
        FROM ({marks} UNION ALL SELECT {key}, time, 0, 0, 0, ordinal FROM impressions)
        WINDOW line AS (PARTITION BY {key} ORDER BY began, kind ROWS UNBOUNDED PRECEDING)
        QUALIFY ordinal IS NOT NULL""",
        about,
    )


def prior(engine: Engine, config: CounterConfig, train_end: int) -> float:
    """Mean of the value over the rows of the training period."""
    value = quote("counter." + config.name)
    relation = "staged WHERE split = 0" if config.of == "impressions" else f"events WHERE time <= {train_end}"
    total, n = engine.row(
        f"SELECT coalesce(sum(CAST(round({value} * {SCALE}) AS BIGINT)), 0), count({value}) FROM {relation}",
        f"counters.{config.name}",
    )
    return float(total) / SCALE / n if n else 0.0
