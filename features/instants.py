"""Instants as milliseconds since 1970, and as people write them."""

from __future__ import annotations

import datetime as dt

from features.errors import UserError


def instant_ms(text: str, about: str) -> int:
    """Milliseconds of an ISO date or instant; without a zone it is UTC.

    >>> instant_ms("1970-01-02", "time_range")
    86400000
    """
    try:
        instant = dt.datetime.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"{about}: {text!r} is not an ISO date or instant such as 2023-05-25T07:00:00") from error
    return round((instant if instant.tzinfo else instant.replace(tzinfo=dt.UTC)).timestamp() * 1000)


def iso(ms: int) -> str:
    """An instant for people. Years that the calendar lacks are given as the number.

    >>> iso(86400000)
    '1970-01-02 00:00:00'
    """
    try:
        return (dt.datetime(1970, 1, 1) + dt.timedelta(milliseconds=ms)).isoformat(" ", "seconds")
    except OverflowError:
        return f"{ms} ms"
