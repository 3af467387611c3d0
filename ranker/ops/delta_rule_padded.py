"""The delta rule without a loop over the data: what ``torch.export`` traces in the place of the scan over chunks.

A chunk does to a state S ← transition S + addition (:mod:`ranker.ops.delta_rule_chunks`), and two such steps are one:

    (T_2, A_2) ∘ (T_1, A_1) = (T_2 T_1, T_2 A_1 + A_2)

which is associative. So all states come of doublings (Hillis & Steele 1986): after i of them, a chunk's step is that of
the 2^i chunks up to it. That is log M products for each of M chunks instead of one, but a fixed number of them.
"""

import torch
from torch import Tensor

from ranker.ops.delta_rule_chunks import Writes, decays_of, terms
from ranker.ops.delta_rule_stops import Within
from ranker.ops.padded import in_places, out_of_places, padded_rows, promise, widest

DOUBLINGS = 15
"""enough for 2^15 chunks of a sequence"""


def padded_delta_rule(writes: Writes, offsets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Outputs and last states, as of :func:`ranker.ops.delta_rule.delta_rule` without `state` and `at`.

    A token of padding has no key, no strengths and no decay, and leaves the state as it is.
    """
    start, end, tokens = offsets[:-1], offsets[1:], writes.k.size(0)
    requests, heads, dk, dv = start.numel(), writes.k.size(1), writes.k.size(2), writes.v.size(2)
    chunks = widest(torch.div(end - start + (chunk - 1), chunk, rounding_mode="floor"))
    promise(chunks <= 2**DOUBLINGS)
    row = padded_rows(start, end, chunks * chunk, tokens)

    def of_chunks(x: Tensor) -> Tensor:
        """`[T, h, d]` to `[R · M · h, C, d]`."""
        return in_places(x, row).unflatten(1, [chunks, chunk]).transpose(2, 3).flatten(0, 2)

    decays: Within | None = None
    if writes.log_decay is not None:
        decays = decays_of(of_chunks(writes.log_decay.unsqueeze(2)).squeeze(2))
    of = terms(
        of_chunks(writes.q),
        of_chunks(writes.k),
        of_chunks(writes.v),
        of_chunks(writes.erase.unsqueeze(2)),
        of_chunks(writes.write.unsqueeze(2)),
        decays,
    )
    shape = [requests, chunks, heads]
    after = _states(of.transition.unflatten(0, shape), of.addition.unflatten(0, shape))
    before = torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], 1)
    o = torch.baddbmm(of.own, of.reader, before.flatten(0, 2)).unflatten(0, shape).transpose(2, 3).flatten(1, 2)
    return out_of_places(o, offsets, tokens), after[:, -1].reshape(requests, heads, dk, dv)


def _states(transition: Tensor, addition: Tensor) -> Tensor:
    """The state after each chunk `[R, M, h, dk, dv]`, from none before the first.

    Args:
        transition: `[R, M, h, dk, dk]`; addition: `[R, M, h, dk, dv]`.
    """
    place = torch.arange(transition.size(1), device=transition.device)
    for i in range(DOUBLINGS):
        earlier = place - (1 << i)
        some = (earlier >= 0).view(-1, 1, 1, 1)
        earlier = earlier.clamp(min=0)
        # before the first chunk there is no state, whatever the transition: that of a step too long is not read again
        added = torch.matmul(transition, addition.index_select(1, earlier))
        addition = addition + torch.where(some, added, 0.0)
        transition = torch.matmul(transition, transition.index_select(1, earlier))
    return addition
