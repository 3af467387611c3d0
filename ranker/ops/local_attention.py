"""Causal softmax attention of the tokens of jagged sequences to the latest tokens, themselves included.

With a window of w tokens work is T · w, whatever the lengths: chunks of queries attend to their own chunk of keys and
the few before it. w = 0 looks at the whole past, at a cost of Σ L², sequences of similar length side by side.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ranker.ops.chunks import chunks_of, rows_back, rows_of
from ranker.ops.length_groups import in_group, length_groups, out_of_groups
from ranker.ops.padded import exporting, in_places, out_of_places, padded_rows, widest


def naive_local_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, window: int) -> Tensor:
    """The definition, token by token: see :func:`local_attention`."""
    out: list[Tensor] = []
    for r in range(offsets.numel() - 1):
        first = int(offsets[r])
        for t in range(first, int(offsets[r + 1])):
            seen = slice(max(first, t + 1 - window) if window else first, t + 1)
            logits = torch.einsum("hd,lhd->hl", q[t], k[seen]) / math.sqrt(q.size(2))
            out.append(torch.einsum("hl,lhd->hd", torch.softmax(logits, -1), v[seen]))
    return torch.stack(out) if out else v


def local_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, window: int) -> Tensor:
    """Each token attends to the `window` latest tokens of its sequence (0: all), itself the last of them.

    Args:
        q, k: `[T, h, d]`; v: `[T, h, dv]`; offsets: `[R + 1]`, sequences that have all tokens.

    Returns:
        `[T, h, dv]`.
    """
    tokens, heads = q.size(0), q.size(1)
    if not torch.jit.is_scripting() and exporting():
        return _padded(q, k, v, offsets, window)
    if tokens == 0:
        return v + 0 * (q.sum() + k.sum())
    if window == 0:
        groups = length_groups(offsets)
        whole: list[Tensor] = []
        for group in groups:  # padding comes after a sequence's tokens: they do not see it
            parts = [in_group(x, group) for x in (q, k, v)]
            whole.append(scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True))
        return out_of_groups(whole, groups)
    size = 16  # of a chunk: half the window, or less where sequences are short
    while size < 128 and size * 2 < window and size * (offsets.numel() - 1) < tokens:
        size *= 2
    reach = (window + size - 2) // size  # chunks before its own that a chunk's first query sees something of
    chunks = chunks_of(offsets, size)
    rows = rows_of(chunks, 0, chunks.token.size(0), heads)
    # [M, h, C, d]
    qs, ks, vs = [x.flatten(0, 1).index_select(0, rows).view(-1, heads, size, x.size(2)) for x in (q, k, v)]
    back = _back(chunks.active, q.device)
    out: list[Tensor] = []
    first = 0
    for before in range(min(reach + 1, len(chunks.active))):
        # Chunks with as many chunks before them in sight: of rank `before`, and at full reach all later ones.
        count = chunks.active[before] if before < reach else chunks.token.size(0) - first
        own = torch.arange(first, first + count, device=q.device)
        sight = [own]
        for _ in range(before):
            sight.insert(0, sight[0] - back[sight[0]])
        key = torch.cat([ks.index_select(0, chunk) for chunk in sight], 2)
        value = torch.cat([vs.index_select(0, chunk) for chunk in sight], 2)
        behind = torch.arange(size, device=q.device).unsqueeze(1) + before * size
        behind = behind - torch.arange(key.size(2), device=q.device)
        mask = (behind >= 0) & (behind < window)
        out.append(scaled_dot_product_attention(qs[first : first + count], key, value, attn_mask=mask))
        first += count
    o = torch.cat(out).flatten(0, 2)
    return o.index_select(0, rows_back(chunks, heads)).view(tokens, heads, v.size(2))


def _back(active: list[int], device: torch.device) -> Tensor:
    """How many places before each chunk its sequence's chunk before it is, of use from rank 1 on: `[M]`. They are as
    many as the rank before has chunks."""
    counts = torch.tensor(active, device=device)
    return torch.repeat_interleave(torch.nn.functional.pad(counts[:-1], [1, 0]), counts)


@torch.jit.unused
def _padded(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, window: int) -> Tensor:
    """Every sequence with as many chunks as the longest; chunks of the half window attend to their own and those before
    it that they see."""
    start, end, tokens = offsets[:-1], offsets[1:], q.size(0)
    if window == 0:
        row = padded_rows(start, end, widest(end - start), tokens)
        parts = [in_places(x, row).transpose(1, 2) for x in (q, k, v)]
        found = scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        return out_of_places(found.transpose(1, 2), offsets, tokens)
    size = 16
    while size < 128 and size * 2 < window:
        size *= 2
    reach = (window + size - 2) // size
    chunks = widest(torch.div(end - start + (size - 1), size, rounding_mode="floor"))
    row = padded_rows(start, end, chunks * size, tokens)
    queries = in_places(q, row).unflatten(1, [chunks, size]).flatten(0, 1).transpose(1, 2)
    # the places of a chunk's keys in its sequence: those before it are of a chunk before the first, too
    first = torch.arange(chunks, device=q.device).unsqueeze(1) * size
    place = first + torch.arange(-reach * size, size, device=q.device)  # [chunks, (reach + 1) · size]
    of_keys = row.index_select(1, place.clamp(min=0).flatten())
    keys = in_places(k, of_keys).unflatten(1, place.shape).flatten(0, 1).transpose(1, 2)
    values = in_places(v, of_keys).unflatten(1, place.shape).flatten(0, 1).transpose(1, 2)
    behind = (first + torch.arange(size, device=q.device)).unsqueeze(2) - place.unsqueeze(1)
    seen = (behind >= 0) & (behind < window) & (place >= 0).unsqueeze(1)  # [chunks, size, (reach + 1) · size]
    seen = seen.repeat(start.numel(), 1, 1).unsqueeze(1)
    found = scaled_dot_product_attention(queries, keys, values, attn_mask=seen).transpose(1, 2)
    return out_of_places(found.unflatten(0, [-1, chunks]).flatten(1, 2), offsets, tokens)
