# SPDX-License-Identifier: BSD-3-Clause
"""More tiles than a GPU has cores, more blocks than a kernel has stages: rings wrap, CTAs go on."""

import pytest
from cases import Case
from numerics import check_forward, check_grads, run, truth

FEATURES = {
    "full": {},
    "causal": {"causal": "top_left"},
    "window": {"window": (300, 40)},
    "gqa": {"heads_k": 4, "causal": "bottom_right"},
    "packed": {"lengths_q": (700, 3, 330), "lengths_k": (650, 90, 400), "causal": "bottom_right"},
    "mask": {"mask": "hqk"},
    "padding": {"mask": "k", "mask_values": "padding", "causal": "top_left"},
    "runs": {"mask": "hk", "mask_values": "runs", "heads_k": 5, "causal": "bottom_right"},
    "runs_blhd": {"batch": 3, "heads": 8, "mask": "bk", "mask_values": "runs", "layout": "blhd"},
    "holes": {"mask": "hk"},
    "bias": {"bias": "bhqk", "causal": "top_left"},
    "bias_heads": {"bias": "qk"},
    "bias_window": {"batch": 2, "heads": 8, "bias": "hqk", "window": (90, 20)},  # tiles of zeros
    "bias_few": {"seqlen_q": 300, "seqlen_k": 264, "bias": "qk", "window": (90, 20)},  # clusters
    "dropout": {"dropout_p": 0.2, "heads_k": 5},
    "chunk": {"batch": 2, "seqlen_q": 1040, "seqlen_k": 1060, "causal": "bottom_right"},
    "end_of_window": {"batch": 2, "seqlen_q": 1069, "seqlen_k": 1069, "window": (16, 0)},
    "softcap": {"softcap": 5.0, "alibi": "h", "sink": True},
    "long_packed": {"heads": 6, "lengths_q": (900, 3, 330), "lengths_k": (1050, 90, 400)},
    # Sequences sorted by their lengths; rows of several heads in one tile.
    "many_packed": {
        "heads": 2,
        "lengths_q": tuple(i % 5 for i in range(1100)),
        "lengths_k": tuple(i % 7 for i in range(1100)),
    },
    "few_queries": {
        "batch": 2,
        "heads": 24,
        "heads_k": 2,
        "seqlen_q": 60,
        "causal": "bottom_right",
    },
    "few_queries_packed": {
        "heads": 16,
        "heads_k": 2,
        "lengths_q": (60, 1, 0, 33),
        "lengths_k": (700, 90, 40, 333),
        "window": (300, 5),
    },
    "few_queries_long": {
        "heads": 64,
        "heads_k": 1,
        "seqlen_q": 5,
        "seqlen_k": 4200,
        "causal": "bottom_right",
    },
    "one_query": {"batch": 10, "heads": 64, "heads_k": 1, "seqlen_q": 1, "seqlen_k": 400},
    "long_causal": {"heads": 4, "seqlen_q": 700, "seqlen_k": 2060, "causal": "bottom_right"},
}
RINGS = {  # of sums of dQ, up to head dim 128: more heads than have them at a time
    # sm90 prepares lse and delta inside its backward at 1024 to 8192 keys, causal 2048
    "ring": {"batch": 2},
    "ring_window": {"batch": 2, "seqlen_q": 1300, "window": (100, None)},  # and blocks without keys
    "ring_causal": {"batch": 4, "seqlen_q": 1300, "causal": "bottom_right"},
    # Sections of heads, and the ring turns more than once even if dQ is added up in order.
    "ring_sections": {"batch": 13, "seqlen_q": 560, "seqlen_k": 560},
    "ring_sections_causal": {"batch": 13, "seqlen_q": 560, "seqlen_k": 560, "causal": "top_left"},
}
SIZES = {"batch": 1, "heads": 20, "seqlen_q": 1000, "seqlen_k": 1040}
CASES = [
    Case(f"many_tiles_{name}_{d}_{d_v}", **SIZES | features, head_dim=d, head_dim_v=d_v)
    for d, d_v in ((64, 64), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256))
    for name, features in (FEATURES | (RINGS if d <= 128 else {})).items()
]


@pytest.mark.cuda
@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: CASES[index].name)
def test_many_tiles(backend, poisoned, index):
    if backend.name not in ("sm80", "sm90"):
        pytest.skip("kernels whose CTAs share tiles or stages")
    dtype = ("bfloat16", "float16")[index % 2]
    true = truth.__wrapped__(CASES[index], dtype, backend.device)  # not kept: these are large
    with poisoned():
        ours = run(backend.attention, true.inputs)
    check_forward(true, ours)
    check_grads(true, ours)
    check_grads(true, run(backend.attention, true.inputs))
