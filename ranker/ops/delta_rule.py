"""The (gated) delta rule: a state of constant size that each token of a sequence corrects rather than adds to.

    S_t = e^(g_t) (I − a_t k_t k_tᵀ) S_(t−1) + b_t k_t v_tᵀ,    o_t = S_tᵀ q_t

S is `[dk, dv]`, the transpose of the papers' `dv × dk`: a key's row space is the state's first axis. The erase strength
a and the write strength b are apart, so that no form divides by either; a = b is the delta rule (Schlag et al. 2021),
with g the gated one (Yang et al. 2024). With unit keys and a in [0, 1] nothing grows.

Forms with one signature: :func:`naive_delta_rule`, the definition; :func:`chunked_delta_rule`, scriptable, and
:func:`delta_rule`, the same with a backward pass written out, or on CUDA flash-linear-attention's kernel where that is
installed. Work follows Σ L, however lengths differ.
"""

import importlib.util

import torch
from torch import Tensor

from ranker.ops.delta_rule_backward import DeltaRule
from ranker.ops.delta_rule_chunks import Writes, chunked_delta_rule
from ranker.ops.delta_rule_padded import padded_delta_rule
from ranker.ops.padded import exporting
from ranker.ops.query_tiles import Tiles, of_tiles

__all__ = ["Writes", "chunked_delta_rule", "delta_rule", "delta_rule_kernel", "naive_delta_rule", "read_state"]


def naive_delta_rule(
    writes: Writes, offsets: Tensor, chunk: int = 0, state: Tensor | None = None, at: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, token by token: see :func:`delta_rule`. `chunk` is not looked at."""
    q, k, v, erase, write, log_decay = writes
    no_state = torch.zeros([k.size(1), k.size(2), v.size(2)], dtype=k.dtype, device=k.device)
    out: list[Tensor] = []
    after: list[Tensor] = []  # the state after each token
    last: list[Tensor] = []
    for r in range(offsets.numel() - 1):
        s = no_state if state is None else state[r]
        for t in range(int(offsets[r]), int(offsets[r + 1])):
            found = torch.einsum("hk,hkv->hv", k[t], s)
            s = s - torch.einsum("h,hk,hv->hkv", erase[t], k[t], found)
            if log_decay is not None:
                s = torch.exp(log_decay[t])[:, None, None] * s
            s = s + torch.einsum("h,hk,hv->hkv", write[t], k[t], v[t])
            out.append(torch.einsum("hk,hkv->hv", q[t], s))
            after.append(s)
        last.append(s)
    states = last if at is None else [after[int(t)] for t in at]
    return torch.stack(out) if out else v, torch.stack(states) if states else no_state.unsqueeze(0)[:0]


def delta_rule(
    writes: Writes, offsets: Tensor, chunk: int = 32, state: Tensor | None = None, at: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run R sequences through the delta rule.

    Args:
        writes: of T tokens.
        offsets: `[R + 1]` int64; sequence r has the tokens ``offsets[r] : offsets[r + 1]``, and together they have all.
        chunk: tokens worked on at once; the result does not depend on it.
        state: `[R, h, dk, dv]` to begin with (zero if None): the one returned for earlier tokens continues them.
        at: `[P]` int64, the tokens after which to return the state, in any order; None: the last of each sequence.

    Half-precision inputs are worked on, and their states kept, in float32; under autocast too.

    Returns:
        o `[T, h, dv]`, and the states after each token of `at` `[P, h, dk, dv]`, or the last ones `[R, h, dk, dv]`.
    """
    if not torch.jit.is_scripting() and exporting() and state is None and at is None:
        return padded_delta_rule(writes, offsets, chunk)
    if not torch.jit.is_scripting() and delta_rule_kernel(offsets.device) != "chunked" and at is None and len(writes.q):
        return _fla(writes, offsets, state)
    dtype = writes.v.dtype
    autocast = not torch.jit.is_scripting() and _autocast(offsets)
    if dtype == torch.bfloat16 or dtype == torch.float16 or autocast:
        log_decay = writes.log_decay
        writes = Writes(
            writes.q.float(),
            writes.k.float(),
            writes.v.float(),
            writes.erase.float(),
            writes.write.float(),
            log_decay.float() if log_decay is not None else None,
        )
        state = state.float() if state is not None else None
    if torch.jit.is_scripting():
        o, states = chunked_delta_rule(writes, offsets, chunk, state, at)
    else:
        o, states = _recomputing(writes, offsets, chunk, state, at)
    return o.to(dtype), states


@torch.jit.unused
def delta_rule_kernel(device: torch.device) -> str:
    """Which implementation :func:`delta_rule` runs on a device: for the log of a run. States that are asked for in the
    midst of sequences are always our own's."""
    if device.type == "cuda" and importlib.util.find_spec("fla") is not None:
        return "flash-linear-attention"
    return "chunked"


@torch.jit.unused
def _recomputing(
    writes: Writes, offsets: Tensor, chunk: int, state: Tensor | None, at: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Autograd functions cannot be scripted, and know no tuples of tensors."""
    with torch.autocast(offsets.device.type, enabled=False):
        o, states = DeltaRule.apply(*writes, offsets, chunk, state, at)  # pyright: ignore
    return o, states


@torch.jit.unused
def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


@torch.jit.unused
def _fla(writes: Writes, offsets: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """flash-linear-attention's kernel knows one strength β: the same states come of β = a and values v b / a."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore

    q, k, v, erase, write, log_decay = writes
    shape = [offsets.numel() - 1, k.size(1), k.size(2), v.size(2)]
    begin = torch.zeros(shape, dtype=torch.float32, device=k.device) if state is None else state.float()
    some = (offsets[1:] > offsets[:-1]).nonzero().squeeze(1)  # its kernel is given no empty sequence
    g = torch.zeros_like(erase) if log_decay is None else log_decay
    o, last = chunk_gated_delta_rule(
        q.unsqueeze(0),
        k.unsqueeze(0),
        (v * (write / erase.clamp(min=1e-20)).unsqueeze(2)).unsqueeze(0),
        g.float().unsqueeze(0),
        erase.unsqueeze(0),
        scale=1.0,
        initial_state=begin[some],
        output_final_state=True,
        cu_seqlens=torch.cat([offsets[:-1][some], offsets[-1:]]),
    )
    return o.squeeze(0), begin.index_copy(0, some, last).to(torch.promote_types(k.dtype, torch.float32))


def read_state(q: Tensor, tiles: Tiles, state: Tensor) -> Tensor:
    """S_rᵀ q for the queries of request r: no state is copied for each query.

    Args:
        q: `[t, w, h, dk]`, tiles of queries; state: `[R, h, dk, dv]`.

    Returns:
        `[t, w, h, dv]`.
    """
    return torch.matmul(q.transpose(1, 2), of_tiles(state, tiles)).transpose(1, 2)
