# SPDX-License-Identifier: BSD-3-Clause
"""The same bits: run to run, for every number of threads, in every batch and packing."""

import pytest
import torch
from cases import BY_NAME
from inputs import make_inputs
from numerics import equal_bits, run

NAMES = ["several_blocks_causal", "gqa", "all_features", "packed_features", "bias_heads",
         "head_dim_257", "gqa_bias_sink_slopes", "window"]  # fmt: skip
DTYPES = ["float32", "bfloat16"]


def assert_equal(a, b, what):
    assert equal_bits(a.out, b.out), what
    assert equal_bits(a.lse, b.lse), what
    for name in a.grads:
        assert equal_bits(a.grads[name], b.grads[name]), f"{what}: d{name}"


@pytest.fixture(params=DTYPES)
def inputs_of(request, backend):
    def inputs(name):
        made = make_inputs(BY_NAME[name], request.param, backend.device)
        return made

    return inputs


@pytest.mark.parametrize("name", NAMES)
def test_run_to_run(backend, inputs_of, name):
    inputs = inputs_of(name)
    repeats = 250 if backend.device == "cuda" else 3
    first = run(backend.attention, inputs, deterministic=True)
    for repeat in range(repeats):
        again = run(backend.attention, inputs, deterministic=True)
        assert_equal(first, again, f"repeat {repeat}")


@pytest.mark.parametrize("name", NAMES)
def test_number_of_threads(backend, inputs_of, name):
    if backend.name != "cpu":
        pytest.skip("threads of the CPU")
    inputs, before = inputs_of(name), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(backend.attention, inputs)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert_equal(alone, run(backend.attention, inputs), f"{threads} threads")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["several_blocks_causal", "gqa", "window", "slopes"])
def test_batch_does_not_matter(backend, inputs_of, name):
    """A sequence alone has the bits that it has among others, wherever it stands."""
    inputs = inputs_of(name)
    names = [n for n in ("q", "k", "v") if n in inputs.tensors]

    def copies(n, shift):
        """The inputs n times, turned by `shift`, with every other sequence replaced."""
        tensors = dict(inputs.tensors)
        for key in names:
            many = torch.cat([torch.randn_like(tensors[key])] * n)
            batch = tensors[key].shape[0]
            many[shift : shift + batch] = tensors[key]
            tensors[key] = many
        dout = torch.cat([torch.randn_like(inputs.dout)] * n)
        dout[shift : shift + inputs.dout.shape[0]] = inputs.dout
        dlse = torch.cat([torch.randn_like(inputs.dlse)] * n)
        dlse[shift : shift + inputs.dlse.shape[0]] = inputs.dlse
        return type(inputs)(inputs.case, inputs.dtype, tensors, inputs.options, dout, dlse)

    alone = run(backend.attention, inputs, deterministic=True)
    for n, shift in ((3, 0), (3, inputs.dout.shape[0]), (5, 1)):
        among = run(backend.attention, copies(n, shift), deterministic=True)
        rows = slice(shift, shift + inputs.dout.shape[0])
        assert equal_bits(alone.out, among.out[rows])
        assert equal_bits(alone.lse, among.lse[rows])
        for key in names:
            assert equal_bits(alone.grads[key], among.grads[key][rows]), key


def test_heads_do_not_matter(backend, inputs_of):
    inputs = inputs_of("square")
    both = run(backend.attention, inputs, deterministic=True)
    for head in range(2):
        tensors = {n: t[:, head : head + 1] for n, t in inputs.tensors.items()}
        one = type(inputs)(inputs.case, inputs.dtype, tensors, inputs.options,
                           inputs.dout[:, head : head + 1],
                           inputs.dlse[:, head : head + 1])  # fmt: skip
        got = run(backend.attention, one, deterministic=True)
        assert equal_bits(both.out[:, head : head + 1], got.out)
        for key, grad in got.grads.items():
            assert equal_bits(both.grads[key][:, head : head + 1], grad), key


@pytest.mark.parametrize("queries", [20, 150])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grouped_heads_do_not_matter(backend, dtype, queries):
    """A query head has the bits that it has on a key head of its own, also beside heads of huge
    scores, which some kernels treat apart, and of infinite ones."""
    q, k, v = (
        torch.randn(2, heads, rows, 64, dtype=torch.float32).to(backend.device, dtype)
        for heads, rows in ((8, queries), (2, 300), (2, 300))
    )
    grouped = run_forward(backend, q, k, v)
    own = run_forward(backend, q, *(t.repeat_interleave(4, dim=1) for t in (k, v)))
    strange = q.clone()
    strange[:, 3] *= 5000
    strange[:, 6] = torch.inf
    among = run_forward(backend, strange, k, v)
    for a, b, c in zip(grouped, own, among, strict=True):
        assert equal_bits(a, b)
        for head in (0, 1, 2, 4, 5, 7):
            assert equal_bits(a[:, head], c[:, head]), head


def run_forward(backend, q, k, v):
    return backend.attention(q, k, v, bottom_right=True, window_right=0, scale=0.125)


def test_torch_asks_for_determinism(backend, poisoned, inputs_of):
    """torch.use_deterministic_algorithms(True) implies deterministic=True."""
    inputs = inputs_of("several_blocks_causal")
    asked = run(backend.attention, inputs, deterministic=True)
    with poisoned():
        implied = run(backend.attention, inputs)
    assert_equal(asked, implied, "implied")
