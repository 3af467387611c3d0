"""Small configs of every long-sequence block, for tests of the ranker around them."""

from __future__ import annotations

UXSID = "{type: uxsid, width: 8, anchors: 4, anchor_hidden: 8, gate_hidden: 8}"
HISAC = "{type: hisac, keep: [3, 2], head_dim: 4}"
HYTREC = "{type: hytrec, width: 8, layers: 2, ratio: 1, short_length: 10}"
NEXT = (
    "{type: hytrec, key: item.sid_1, slots: [item.sid_1], width: 12, layers: 2, ratio: 1, short_length: 10, "
    "next_item_weight: 0.1}"
)
SEARCHES = {
    "sim_hard": "{type: sim_hard, probe: item.sid_1, top: 5, head_dim: 4}",
    "sim_soft": "{type: sim_soft, search_dim: 4, top: 5, head_dim: 4}",
    "eta": "{type: eta, bits: 16, top: 5, head_dim: 4}",
    "twin": "{type: twin, top: 5, head_dim: 4}",
    "mirrn": "{type: mirrn, bits: 16, top: 5, head_dim: 4}",
}
GROUPS = {
    "sdim": "{type: sdim, hashes: 4, bits: 2}",
    "kmeans": "{type: kmeans, clusters: 6, head_dim: 4}",
    "lsh": "{type: lsh, bits: 3, head_dim: 4}",
    "patching": "{type: patching, patches: 6, head_dim: 4}",
    "vql": "{type: vql, codes: 6, head_dim: 4}",
    "cformer": "{type: cformer, width: 8, queries: 4, head_dim: 4}",
    "aggregator": "{type: aggregator, queries: 4, width: 8, head_dim: 4}",
    "poly_encoder": "{type: poly_encoder, codes: 4, width: 8}",
}
ENCODERS = {
    "longer": "{type: longer, width: 8, recent: 5, global_tokens: 2, layers: 1}",
    "elastic": "{type: elastic, width: 8, experts: 4, pool: 20, retrieve: 3}",
    "sasrec": "{type: sasrec, width: 8, layers: 1, length: 40}",
    "hstu": "{type: hstu, width: 8, layers: 1, length: 40}",
}
METHODS = {**SEARCHES, **GROUPS, **ENCODERS}
ALL = f"{UXSID}, {HISAC}, {HYTREC}"
BLOCKS = {
    "uxsid": UXSID,
    "hisac": HISAC,
    "hytrec": HYTREC,
    "all three": ALL,
    "searches": ", ".join(SEARCHES.values()),
    "groups": ", ".join(GROUPS.values()),
    "encoders": ", ".join(ENCODERS.values()),
}
WITH_LOSS = ("uxsid", "all three", "searches", "groups")
TOGETHER = ("all three", "searches", "groups", "encoders")
