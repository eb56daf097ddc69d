# SPDX-License-Identifier: BSD-3-Clause
"""The one grid of cases: every backend runs each of them, forward and backward, in every dtype.

A case is a description; `inputs.make_inputs` turns it into tensors.
"""

import dataclasses
import os
import random

DTYPES = ("float32", "float64", "bfloat16", "float16")
SEED = int(os.environ.get("FLASH_ATTN_TEST_SEED", "0"))


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and features of one call. Letters of `bias` and `mask` name the dims that are not
    broadcast, out of "bhqk"; packed lengths stand in `lengths_q`, `lengths_k`."""

    name: str
    batch: int = 2
    heads: int = 2
    heads_k: int | None = None
    seqlen_q: int = 65
    seqlen_k: int = 65
    head_dim: int = 64
    head_dim_v: int | None = None
    causal: str | None = None  # "top_left", "bottom_right"
    window: tuple[int | None, int | None] = (None, None)
    prefix: int = 0
    scale: float | None = None
    softcap: float = 0.0
    bias: str | None = None
    bias_values: str = "normal"  # "minus_inf", "lowest", "large"
    bias_dtype: str = "same"
    mask: str | None = None
    mask_values: str = "random"  # "padding", "runs", "empty_rows", "nothing"
    alibi: str | None = None  # "h", "bh"
    sink: bool = False
    dropout_p: float = 0.0
    lengths_q: tuple[int, ...] | None = None
    lengths_k: tuple[int, ...] | None = None
    unowned: int = 0  # rows of the packed tensors behind the last sequence
    seqused_q: tuple[int, ...] | None = None
    seqused_k: tuple[int, ...] | None = None
    layout: str = "bhld"  # "blhd", "lbhd", "sliced", "expanded", "last_dim_strided"
    values: str = "normal"
    dtypes: tuple[str, ...] = DTYPES


_FLOATS_WITH_RANGE = ("float32", "float64", "bfloat16")
_16_BIT = ("bfloat16", "float16")

CASES = [
    # Sizes round the edges of tiles and vectors.
    Case("square"),
    Case("one_of_everything", 1, 1, 1, 1, 1, 1),
    Case("two_by_two", 2, 2, 2, 2, 2, 8),
    Case("one_query", seqlen_q=1, seqlen_k=130),
    Case("three_queries", heads=3, seqlen_q=3, seqlen_k=77, head_dim=40),
    Case("four_queries_causal_gqa", heads=4, heads_k=2, seqlen_q=4, seqlen_k=200,
         causal="bottom_right"),
    Case("one_key", seqlen_q=70, seqlen_k=1),
    Case("lengths_63_64", seqlen_q=63, seqlen_k=64),
    Case("lengths_128_127", seqlen_q=128, seqlen_k=127, head_dim=32),
    Case("lengths_129_192", seqlen_q=129, seqlen_k=192),
    Case("few_queries_many_keys", 1, 2, seqlen_q=5, seqlen_k=515),
    Case("many_queries_few_keys", 1, 2, seqlen_q=300, seqlen_k=37),
    Case("several_blocks_causal", 1, 2, seqlen_q=513, seqlen_k=513, causal="top_left"),
    Case("many_heads", 3, 13, seqlen_q=17, seqlen_k=33, head_dim=16),
    # Head dims.
    *(Case(f"head_dim_{d}", 1, 2, seqlen_q=50, seqlen_k=70, head_dim=d, causal="top_left")
      for d in (1, 3, 17, 40, 72, 80, 96, 128, 160, 192, 256, 257, 512)),
    Case("head_dim_192_v_128", head_dim=192, head_dim_v=128),
    Case("head_dim_64_v_96", head_dim=64, head_dim_v=96),
    Case("head_dim_64_v_1", head_dim=64, head_dim_v=1),
    Case("head_dim_5_v_130", head_dim=5, head_dim_v=130, causal="bottom_right"),
    # Grouped heads.
    Case("gqa", heads=6, heads_k=2),
    Case("mqa_causal", heads=5, heads_k=1, causal="top_left"),
    Case("gqa_bias_sink_slopes", heads=4, heads_k=2, bias="hqk", sink=True, alibi="bh"),
    # Masks that are intervals.
    Case("causal_square", causal="top_left"),
    Case("causal_top_left_tall", seqlen_q=100, seqlen_k=33, causal="top_left"),
    Case("causal_top_left_wide", seqlen_q=33, seqlen_k=140, causal="top_left"),
    Case("causal_bottom_right_tall", seqlen_q=140, seqlen_k=33, causal="bottom_right"),
    Case("causal_bottom_right_wide", seqlen_q=33, seqlen_k=140, causal="bottom_right"),
    Case("window", seqlen_q=150, seqlen_k=170, window=(20, 9)),
    Case("window_diagonal_only", window=(0, 0)),
    Case("window_bottom_right", seqlen_q=90, seqlen_k=200, window=(40, 0), causal="bottom_right"),
    Case("window_left_unbounded", seqlen_q=90, seqlen_k=120, window=(None, 7)),
    Case("window_right_unbounded_tall", seqlen_q=200, seqlen_k=60, window=(11, None)),
    Case("prefix_causal", seqlen_q=100, seqlen_k=100, causal="top_left", prefix=37),
    Case("prefix_window", seqlen_q=130, seqlen_k=130, window=(50, 0), prefix=70),
    # Modified scores.
    Case("softcap", softcap=2.0),
    Case("softcap_causal_gqa", heads=4, heads_k=2, softcap=15.0, causal="bottom_right"),
    Case("slopes", alibi="h"),
    Case("slopes_per_batch_causal", seqlen_q=40, seqlen_k=90, alibi="bh", causal="bottom_right"),
    Case("sink", sink=True),
    Case("sink_empty_rows", seqlen_q=80, seqlen_k=40, sink=True, causal="bottom_right"),
    # Bias: full, every kind of broadcast, -inf, very negative.
    Case("bias_full", bias="bhqk"),
    Case("bias_heads", bias="hqk", causal="top_left"),
    Case("bias_pairs", 3, 2, bias="qk"),
    Case("bias_keys", bias="bk"),
    Case("bias_queries", bias="hq", seqlen_q=33),
    Case("bias_scalar", bias=""),
    Case("bias_float32", bias="hqk", bias_dtype="float32", dtypes=_16_BIT),
    Case("bias_minus_inf", bias="bhqk", bias_values="minus_inf"),
    Case("bias_lowest", 1, 2, seqlen_q=64, seqlen_k=192, bias="bk", bias_values="lowest"),
    Case("bias_large_offset", bias="qk", bias_values="large"),
    # Boolean masks.
    Case("mask_full", mask="bhqk"),
    Case("mask_padding", 3, 2, mask="bk", mask_values="padding"),
    Case("mask_keys", seqlen_k=150, mask="bhk"),
    Case("mask_runs", 3, 4, 2, 140, 208, mask="bk", mask_values="runs", causal="bottom_right"),
    Case("mask_runs_of_heads", 2, 4, 2, 140, 333, mask="hk", mask_values="runs", prefix=90,
         causal="top_left"),
    Case("mask_runs_window", 2, 3, 3, 200, 160, mask="bhk", mask_values="runs", window=(60, 20)),
    Case("mask_runs_dropout", 2, 2, 2, 70, 208, mask="bk", mask_values="runs", dropout_p=0.2,
         alibi="h", causal="bottom_right"),
    Case("mask_pairs_gqa", heads=4, heads_k=1, mask="qk"),
    Case("mask_empty_rows", mask="bhqk", mask_values="empty_rows"),
    Case("mask_nothing", seqlen_q=20, mask="bk", mask_values="nothing"),
    # Rows of a bias or a mask at multiples of 16 bytes, which kernels may load as tiles.
    *(Case(f"{name}_in_tiles_{d}", 1, 2, seqlen_q=140, seqlen_k=208, head_dim=d, dtypes=_16_BIT,
           **features)
      for d in (64, 96, 128, 192, 256)
      for name, features in {
          "mask": {"mask": "bhqk", "causal": "top_left"},
          "mask_padding": {"mask": "bk", "mask_values": "padding"},
          "bias": {"bias": "bhqk", "causal": "bottom_right"},
          "bias_keys": {"bias": "hk", "dropout_p": 0.2},
      }.items()),
    # Dropout.
    Case("dropout", dropout_p=0.1),
    Case("dropout_causal_gqa", heads=4, heads_k=2, seqlen_q=70, seqlen_k=140,
         causal="bottom_right", dropout_p=0.5),
    Case("dropout_everything", dropout_p=1.0),
    # All at once.
    Case("all_features", heads=4, heads_k=2, seqlen_q=77, seqlen_k=140, head_dim=40,
         head_dim_v=72, causal="bottom_right", window=(90, 0), prefix=20, softcap=5.0,
         bias="bhqk", mask="bk", mask_values="padding", alibi="bh", sink=True, dropout_p=0.2),
    # Packed sequences.
    Case("packed", lengths_q=(5, 0, 64, 33), lengths_k=(5, 0, 64, 33)),
    Case("packed_causal", lengths_q=(70, 3, 129), lengths_k=(90, 70, 65), causal="bottom_right"),
    Case("packed_unowned_rows", heads=4, heads_k=2, lengths_q=(17, 40), lengths_k=(33, 12),
         unowned=21, window=(10, 5)),
    Case("packed_seqused", lengths_q=(30, 40, 7), lengths_k=(50, 20, 9), seqused_q=(30, 11, 7),
         seqused_k=(17, 20, 0), causal="bottom_right", sink=True),
    Case("packed_features", heads=4, heads_k=2, lengths_q=(31, 66, 1), lengths_k=(31, 66, 20),
         alibi="bh", softcap=4.0, dropout_p=0.3, sink=True, causal="bottom_right"),
    Case("dense_seqused", 3, seqused_k=(65, 17, 0)),
    Case("dense_seqused_bias", seqlen_q=136, seqlen_k=136, seqused_k=(100, 40), bias="bhqk"),
    # Strides.
    Case("layout_blhd", layout="blhd"),
    Case("layout_lbhd_causal", layout="lbhd", causal="top_left"),
    Case("layout_sliced", layout="sliced", head_dim=24),
    Case("layout_expanded", 3, 4, layout="expanded"),
    Case("layout_last_dim_strided", layout="last_dim_strided", head_dim=20),
    # Nothing there.
    Case("no_batch", batch=0),
    Case("no_heads", heads=0),
    Case("no_queries", seqlen_q=0),
    Case("no_keys", seqlen_k=0, bias="bhqk", sink=True),
    Case("no_head_dim", head_dim=0, head_dim_v=8, scale=1.0, causal="top_left"),
    Case("no_head_dim_v", head_dim_v=0),
    # Scales and magnitudes.
    Case("scale_zero", scale=0.0, causal="top_left"),
    Case("scale_negative", scale=-0.3),
    Case("magnitude_10", values="times_10"),
    Case("common_offset", values="offset", scale=1.0),
    Case("all_equal", values="equal", causal="top_left"),
    Case("values_with_an_offset", 1, 2, seqlen_q=64, seqlen_k=1024, values="value_offset"),
    Case("one_key_dominates", values="dominating"),
    Case("huge_inputs", values="huge", scale=2.0**-36, dtypes=_FLOATS_WITH_RANGE),
    Case("subnormal", values="subnormal"),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}
GRID = [(case, dtype) for case in CASES for dtype in case.dtypes]


def grid_id(pair):
    case, dtype = pair
    return f"{case.name}-{dtype}"


def random_case(seed):
    """A case drawn from all features: for long runs. Equal seeds give equal cases."""
    draw = random.Random(seed)

    def maybe(probability, value, otherwise=None):
        return value if draw.random() < probability else otherwise

    def length():
        return draw.choice((1, 2, 3, 4, 7, 16, 31, 33, 63, 64, 65, 100, 128, 129, 200, 208, 300))

    heads_k = draw.choice((1, 2, 3))
    packed = draw.random() < 0.3
    members = draw.randint(1, 3)
    pairs = None if packed else "".join(letter for letter in "bhqk" if draw.random() < 0.5)
    dim = draw.choice((1, 8, 15, 32, 33, 64, 80, 96, 128, 144, 192, 256))
    return Case(
        name=f"random_{seed}",
        batch=draw.randint(1, 3),
        heads=heads_k * draw.choice((1, 1, 2, 4)),
        heads_k=heads_k,
        seqlen_q=length(),
        seqlen_k=length(),
        head_dim=dim,
        head_dim_v=maybe(0.2, draw.choice((1, 16, 72, 128)), dim),
        causal=draw.choice((None, "top_left", "bottom_right")),
        window=(maybe(0.3, draw.randint(0, 80)), maybe(0.2, draw.randint(0, 80))),
        prefix=maybe(0.2, draw.randint(0, 150), 0),
        scale=maybe(0.1, draw.uniform(-0.3, 0.5)),
        softcap=maybe(0.2, draw.uniform(0.5, 30), 0.0),
        bias=maybe(0.3, pairs),
        mask=maybe(0.3, pairs),
        mask_values=draw.choice(("random", "runs", "empty_rows")),
        alibi=maybe(0.2, draw.choice(("h", "bh"))),
        sink=draw.random() < 0.2,
        dropout_p=maybe(0.2, draw.random(), 0.0),
        lengths_q=tuple(length() for _ in range(members)) if packed else None,
        lengths_k=tuple(length() for _ in range(members)) if packed else None,
        unowned=maybe(0.3, 13, 0),
        layout=draw.choice(("bhld", "bhld", "blhd", "lbhd", "sliced", "expanded")),
    )
