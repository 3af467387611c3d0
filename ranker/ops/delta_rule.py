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
from ranker.ops.delta_rule_chunks import chunked_delta_rule
from ranker.ops.jagged import expand_windows

__all__ = ["chunked_delta_rule", "delta_rule", "delta_rule_kernel", "naive_delta_rule", "read_state"]


def naive_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor,
    write: Tensor,
    log_decay: Tensor | None,
    offsets: Tensor,
    chunk: int = 0,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token: see :func:`delta_rule`. `chunk` is not looked at."""
    out: list[Tensor] = []
    last: list[Tensor] = []
    for r in range(offsets.numel() - 1):
        s = (
            torch.zeros([k.size(1), k.size(2), v.size(2)], dtype=k.dtype, device=k.device)
            if state is None
            else state[r]
        )
        for t in range(int(offsets[r]), int(offsets[r + 1])):
            found = torch.einsum("hk,hkv->hv", k[t], s)
            s = s - torch.einsum("h,hk,hv->hkv", erase[t], k[t], found)
            if log_decay is not None:
                s = torch.exp(log_decay[t])[:, None, None] * s
            s = s + torch.einsum("h,hk,hv->hkv", write[t], k[t], v[t])
            out.append(torch.einsum("hk,hkv->hv", q[t], s))
        last.append(s)
    no_state = torch.zeros([0, k.size(1), k.size(2), v.size(2)], dtype=k.dtype, device=k.device)
    return torch.stack(out) if out else v, torch.stack(last) if last else no_state


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor,
    write: Tensor,
    log_decay: Tensor | None,
    offsets: Tensor,
    chunk: int = 32,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run R sequences through the delta rule.

    Args:
        q, k: `[T, h, dk]`; keys (and, for bounded outputs, queries) L2-normalised by the caller. v: `[T, h, dv]`.
        erase, write: `[T, h]` a_t and b_t, in [0, 1].
        log_decay: `[T, h]` g_t ≤ 0, or None for no decay.
        offsets: `[R + 1]` int64; sequence r has the tokens ``offsets[r] : offsets[r + 1]``, and together they have all.
        chunk: tokens worked on at once; the result does not depend on it.
        state: `[R, h, dk, dv]` to begin with (zero if None): the one returned for earlier tokens continues them.

    Half-precision inputs are worked on, and their states kept, in float32.

    Returns:
        o `[T, h, dv]`, and the last states `[R, h, dk, dv]`.
    """
    if not torch.jit.is_scripting() and delta_rule_kernel(q.device) == "flash-linear-attention" and q.size(0) > 0:
        return _fla(q, k, v, erase, write, log_decay, offsets, state)
    dtype = v.dtype
    if dtype == torch.bfloat16 or dtype == torch.float16:
        q, k, v, erase, write = q.float(), k.float(), v.float(), erase.float(), write.float()
        log_decay = log_decay.float() if log_decay is not None else None
        state = state.float() if state is not None else None
    if torch.jit.is_scripting():
        o, last = chunked_delta_rule(q, k, v, erase, write, log_decay, offsets, chunk, state)
    else:
        o, last = _recomputing(q, k, v, erase, write, log_decay, offsets, chunk, state)
    return o.to(dtype), last


@torch.jit.unused
def delta_rule_kernel(device: torch.device) -> str:
    """Which implementation :func:`delta_rule` runs on a device: for the log of a run."""
    if device.type == "cuda" and importlib.util.find_spec("fla") is not None:
        return "flash-linear-attention"
    return "chunked"


@torch.jit.unused
def _recomputing(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor,
    write: Tensor,
    log_decay: Tensor | None,
    offsets: Tensor,
    chunk: int,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Autograd functions cannot be scripted."""
    o, last = DeltaRule.apply(q, k, v, erase, write, log_decay, offsets, chunk, state)  # pyright: ignore
    return o, last


@torch.jit.unused
def _fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor,
    write: Tensor,
    log_decay: Tensor | None,
    offsets: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """flash-linear-attention's kernel knows one strength β: the same states come of β = a and values v b / a."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore

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
    return o.squeeze(0), begin.index_copy(0, some, last).to(k.dtype)


def read_state(q: Tensor, offsets: Tensor, state: Tensor) -> Tensor:
    """S_rᵀ q for the queries of request r, in tiles of queries: no state is copied for each query.

    Args:
        q: `[N, h, dk]`, the queries of request r in rows ``offsets[r] : offsets[r + 1]``; state: `[R, h, dk, dv]`.

    Returns:
        `[N, h, dv]`.
    """
    count = offsets[1:] - offsets[:-1]
    width = int(torch.ceil(count.sum() / max(count.numel(), 1)).clamp(1, 128))
    tiles = (count + width - 1) // width
    rank, request = expand_windows(torch.zeros_like(tiles), tiles)
    row = (offsets[:-1][request] + rank * width).unsqueeze(1) + torch.arange(width, device=q.device)
    last = offsets[1:][request].unsqueeze(1) - 1
    tile = q.index_select(0, torch.minimum(row, last).flatten()).view(-1, width, q.size(1), q.size(2))
    return torch.einsum("twhk,thkv->twhv", tile, state.index_select(0, request))[row <= last]
