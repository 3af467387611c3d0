"""Where the time of training steps goes."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn
from torch.profiler import record_function

PARTS: tuple[str, ...] = ("data", "ranks", "sparse", "dense", "backward", "optimizer")
"""data: waiting for the loader, the copy to the device; ranks: waiting for the other ranks; sparse: look-ups, with the
exchange of ids and embeddings between ranks; dense: the rest of the forward pass, and the losses; backward: of both,
with the tables' update and the averaging of dense gradients over ranks; optimizer: clipping and the dense update"""

_Moment = float | torch.cuda.Event


class StepClock:
    """Seconds by part of the step, summed until they are read. On a GPU they are those of its stream, not of the host
    that fills it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
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
                self._begun.append(self._now())

        def after(*_: object) -> None:
            if within not in self._now_in:
                return
            begin, end = self._begun.pop(), self._now()
            self._spans.append((name, 1, begin, end))
            self._spans.append((within, -1, begin, end))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last time."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for name, sign, begin, end in self._spans:
            seconds[name] += sign * _seconds(begin, end)
        self._spans.clear()
        return seconds

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
