"""Events and candidates as tokens of an encoder's width, and the sequences of tokens that it runs over."""

import torch
from torch import Tensor, nn

from ranker.longseq.protocol import History, compact
from ranker.ops.jagged import log_bucket, segments_of
from ranker.ops.padded import exporting


class Tokens(nn.Module):
    """A linear map without bias and a LayerNorm; events get a learned vector of their age on top.

    Embeddings are small at first: a bias beside them would make all events alike, and layers without a norm before them
    would hardly see them. Events and candidates share the map, so that a candidate is compared with events like it.

    Args:
        dim: width of events and candidates.
        width: of tokens.
        age_buckets: buckets of log2(age in seconds), added to events; 0: none.
    """

    def __init__(self, dim: int, width: int, age_buckets: int = 0) -> None:
        super().__init__()
        self.project = nn.Linear(dim, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.age = nn.Parameter(torch.zeros(age_buckets, width)) if age_buckets > 0 else None
        nn.init.orthogonal_(self.project.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Candidates, or events without their age: `[n, dim]` to `[n, width]`."""
        return self.norm(self.project(x))

    def _once(self, history: History) -> bool:
        """Whether fewer events are mapped where each is mapped once."""
        if not torch.jit.is_scripting() and exporting():
            return True
        return history.x.size(0) < int((history.end - history.start).sum())

    def of_windows(self, history: History) -> History:
        """The same windows over tokens `[P, width]` of their own events alone, request after request.

        Each event is mapped once, or once for each window that it is in, whichever is less work.
        """
        once = self._once(history)
        if once:
            history = _with_tokens(history, self.forward(history.x))
        events = compact(history)
        x = events.x if once else self.forward(events.x)
        age = self.age
        if age is not None:
            now = events.now[segments_of(torch.nn.functional.pad(events.end, [1, 0]), events.time.numel())]
            x = x + age[log_bucket((now - events.time) // 1000, age.size(0))]
        return _with_tokens(events, x)


def _with_tokens(history: History, x: Tensor) -> History:
    return History(x, history.time, history.start, history.end, history.now, history.code, history.content)
