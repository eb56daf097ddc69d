# SPDX-License-Identifier: BSD-3-Clause
"""Every instruction set of the CPU backend that this machine runs, against float64."""

import pytest
import torch
from cases import BY_NAME
from inputs import make_inputs
from numerics import check_forward, check_grads, equal_bits, run, truth

import flash_attn

attention = torch.ops.flash_attn.attention
NAMES = ["square", "lengths_129_192", "head_dim_3", "head_dim_80", "head_dim_257", "gqa",
         "causal_bottom_right_tall", "window", "softcap_causal_gqa", "slopes_per_batch_causal",
         "bias_full", "bias_keys", "mask_empty_rows", "dropout_causal_gqa", "all_features",
         "packed_features", "huge_inputs", "subnormal", "one_of_everything"]  # fmt: skip
DTYPES = ("float32", "float64", "bfloat16", "float16")


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def isa(request):
    available = flash_attn._C.available_isas()
    if request.param not in available:
        pytest.skip(f"this machine or build has {available}")
    with flash_attn.use_cpu_isa(request.param):
        assert flash_attn._C.cpu_isa() == request.param
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_instruction_set(isa, poisoned, name, dtype):
    case = BY_NAME[name]
    if dtype not in case.dtypes:
        pytest.skip("outside the range of the dtype")
    true = truth(case, dtype, "cpu")
    with poisoned():
        ours = run(attention, true.inputs)
    check_forward(true, ours)
    check_grads(true, ours)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_and_repeats(isa, dtype):
    inputs, before = make_inputs(BY_NAME["all_features"], dtype, "cpu"), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(attention, inputs)
        torch.set_num_threads(3)
        several = run(attention, inputs)
    finally:
        torch.set_num_threads(before)
    assert equal_bits(alone.out, several.out)
    assert all(equal_bits(alone.grads[n], several.grads[n]) for n in alone.grads)


def test_the_best_comes_back():
    best = flash_attn._C.cpu_isa()
    with flash_attn.use_cpu_isa("portable"):
        assert flash_attn._C.cpu_isa() == "portable"
    assert flash_attn._C.cpu_isa() == best == flash_attn._C.available_isas()[-1]


def test_unknown_name():
    with pytest.raises((ValueError, RuntimeError), match="portable"), flash_attn.use_cpu_isa("mmx"):
        pass
