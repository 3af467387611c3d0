"""Where the time of training steps goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn
from torch.profiler import record_function

from ranker.training.collectives import hear_waits

PARTS: tuple[str, ...] = ("data", "ranks", "communication", "sparse", "dense", "backward", "optimizer")
"""data: waiting for the loader, the copy to the device; ranks: meeting the other ranks, in collectives of a few
numbers, and so waiting for the slower ones; communication: waiting for all other collectives, those of ids, embeddings
and their gradients, and of dense gradients, and averaging replicas; sparse: look-ups; dense: the rest of the forward
pass, and the losses; backward: of both, with the tables' update; optimizer: clipping and the dense update.

The parts add up. Communication is what the step stands still for: a collective that is through when it is waited for
costs nothing here, however long it took. One process has none, as what it sends itself is a copy."""

_MEETING = ("ranks", "communication")
"""parts within which waiting is what they count"""

_Moment = float | torch.cuda.Event


class StepClock:
    """Seconds by part of the step, summed until they are read. On a GPU they are those of its stream, not of the host
    that fills it: that of a wait is how long the stream stood still for NCCL's."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.current_stream(device) if self._cuda else None
        self._spans: list[tuple[str, int, _Moment, _Moment]] = []
        self._begun: list[_Moment] = []
        self._now_in: list[str] = []

    @contextmanager
    def part(self, name: str) -> Generator[None]:
        """Count the time in here as this part's."""
        self._now_in.append(name)
        begin = self._now()
        with record_function(f"ranker:{name}"):  # seen in traces
            yield
        self._spans.append((name, 1, begin, self._now()))
        self._now_in.pop()

    def watch(self, module: nn.Module, name: str, within: str) -> None:
        """Count a module's forward passes within part `within` as part `name`, and not as that."""

        def before(*_: object) -> None:
            if within in self._now_in:
                self._now_in.append(name)
                self._begun.append(self._now())

        def after(*_: object) -> None:
            if within not in self._now_in:
                return
            begin, end = self._begun.pop(), self._now()
            self._now_in.pop()
            self._move(within, name, begin, end)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    @contextmanager
    def hearing_waits(self) -> Generator[None]:
        """Count what waits for collectives in here as communication, and not as the part it falls into."""

        training = threading.current_thread()

        def begun() -> tuple[str, _Moment] | None:
            thread, part = threading.current_thread(), self._now_in[-1] if self._now_in else None
            # a GPU's backward pass has a thread that Python did not start; what Python started beside this one, such as
            # the writing of a checkpoint, holds no step
            of_step = thread is training or isinstance(thread, threading._DummyThread)  # type: ignore[attr-defined]
            # nor does a wait on another stream, as that of ids read ahead
            elsewhere = self._stream is not None and torch.cuda.current_stream() != self._stream
            return None if part is None or part in _MEETING or not of_step or elsewhere else (part, self._now())

        def ended(begin: tuple[str, _Moment] | None) -> None:
            if begin is not None:
                part, since = begin
                self._move(part, "communication", since, self._now())

        with hear_waits(begun, ended):
            yield

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last time."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for name, sign, begin, end in self._spans:
            seconds[name] += sign * _seconds(begin, end)
        self._spans.clear()
        return seconds

    def _move(self, source: str, to: str, begin: _Moment, end: _Moment) -> None:
        self._spans.append((to, 1, begin, end))
        self._spans.append((source, -1, begin, end))

    def _now(self) -> _Moment:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(begin: _Moment, end: _Moment) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1000
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin
