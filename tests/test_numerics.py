# SPDX-License-Identifier: BSD-3-Clause
"""The tolerance notices what it is there for: a kernel that computes in float32 and rounds once
passes, and each mistake that a kernel can make does not."""

import dataclasses
import math

import pytest
import torch
from cases import BY_NAME
from numerics import Result, check_forward, check_grads, run, truth

from flash_attn import reference

DTYPES = ("float32", "bfloat16", "float16", "float64")


def good_kernel(inputs, **changes):
    """The formula in the accumulation type, rounded once, with some options or tensors changed."""
    wide = inputs.upcast(torch.promote_types(inputs.dtype, torch.float32))
    wide.tensors.update({n: x for n, x in changes.items() if isinstance(x, torch.Tensor)})
    options = {n: x for n, x in changes.items() if not isinstance(x, torch.Tensor)}
    result = run(reference.attention, dataclasses.replace(wide, options=wide.options | options))
    grads = {n: g.to(inputs.tensors[n].dtype) for n, g in result.grads.items()}
    return Result(result.out.to(inputs.dtype), result.lse, grads)


def check(true, ours):
    check_forward(true, ours)
    check_grads(true, ours)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["square", "all_features", "packed_features", "bias_lowest"])
def test_a_good_kernel_passes(name, dtype):
    true = truth(BY_NAME[name], dtype, "cpu")
    check(true, good_kernel(true.inputs))


MISTAKES = {
    "diagonal by one": ("causal_square", {"window_right": 1}),
    "top left for bottom right": ("causal_bottom_right_wide", {"bottom_right": False}),
    "window by one": ("window", {"window_left": 19}),
    "no prefix": ("prefix_causal", {"prefix": 0}),
    "prefix by one": ("prefix_causal", {"prefix": 38}),
    "no softcap": ("softcap", {"softcap": 0.0}),
    "another scale": ("square", {"scale": 0.126}),
    "another dropout scale": ("dropout", {"dropout_p": 0.11}),
    "another seed": ("dropout", {"rng_state": torch.tensor([1, 2])}),
    "no sink": ("sink", {"sink": torch.full((2,), -math.inf)}),
    "slopes of another sign": ("slopes", {"alibi_slopes": torch.full((2,), -0.1)}),
    "one key too few": ("square", {"seqused_k": torch.tensor([64, 64])}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake, dtype):
    name, changes = MISTAKES[mistake]
    true = truth(BY_NAME[name], dtype, "cpu")
    wrong = good_kernel(true.inputs, **changes)
    with pytest.raises(AssertionError, match=name):
        check_forward(true, wrong)


DAMAGE = {
    "one row of out": lambda r: r.out[0, 1, 7].mul_(1.3),
    "one number of out": lambda r: r.out[1, 0, 3, 4].add_(0.1),
    "NaN in out": lambda r: r.out[1, 0, 3, 4].fill_(math.nan),
    "lse": lambda r: r.lse.add_(1e-3),
    "one lse": lambda r: r.lse[1, 1, 64].add_(1e-3),
    "an empty row": lambda r: r.lse[0, 0, 0].fill_(-math.inf),
    "dq without scale": lambda r: r.grads["q"].mul_(8),
    "one row of dk": lambda r: r.grads["k"][0, 0, 5].zero_(),
    "one tile of dv": lambda r: r.grads["v"][1, 1, 48:64].mul_(1.1),
    "a little of all dv": lambda r: r.grads["v"].mul_(1.02),
    "transposed dq": lambda r: r.grads["q"].copy_(r.grads["q"].flip(-1)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed(damage, dtype):
    true = truth(BY_NAME["square"], dtype, "cpu")
    result = good_kernel(true.inputs)
    DAMAGE[damage](result)
    with pytest.raises(AssertionError, match="square"):
        check(true, result)


@pytest.mark.parametrize("name", ["bias_full", "bias_keys", "slopes_per_batch_causal", "sink"])
def test_a_wrong_gradient_of_a_feature_is_noticed(name):
    for dtype in DTYPES:
        true = truth(BY_NAME[name], dtype, "cpu")
        feature = true.inputs.differentiable()[3]
        for factor in (0.0, -1.0, 1.5):
            result = good_kernel(true.inputs)
            result.grads[feature].mul_(factor)
            with pytest.raises(AssertionError, match=f"d{feature}"):
                check_grads(true, result)
