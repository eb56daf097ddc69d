# SPDX-License-Identifier: BSD-3-Clause
"""CUDA: graphs, streams, devices; no call waits for the device."""

import pytest
import torch
from cases import BY_NAME
from numerics import check_forward, check_grads, equal_bits, run, truth

pytestmark = pytest.mark.cuda
NAMES = ["several_blocks_causal", "gqa_bias_sink_slopes", "all_features", "packed_features",
         "mask_padding", "head_dim_80"]  # fmt: skip


@pytest.fixture
def cuda_backend(backend):
    if backend.device == "cpu":
        pytest.skip("streams of CUDA")
    return backend


@pytest.fixture(params=NAMES)
def true(request, cuda_backend):
    return truth(BY_NAME[request.param], "float16", "cuda")


def test_capture_and_replay(cuda_backend, true):
    """Forward and backward in one graph; a replay computes from what its inputs hold then."""
    inputs = true.inputs
    expected = run(cuda_backend.attention, inputs, deterministic=True)
    static = {n: t.clone() for n, t in inputs.tensors.items()}
    leaves = {n: static[n].requires_grad_() for n in inputs.differentiable()}

    def step():
        out, lse = cuda_backend.attention(**static, **inputs.options, deterministic=True)
        grads = torch.autograd.grad((out, lse), tuple(leaves.values()), (inputs.dout, inputs.dlse))
        return out, lse, grads

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        for name in ("q", "k", "v"):
            static[name].zero_()
    with torch.cuda.graph(graph):
        out, lse, grads = step()
    with torch.no_grad():
        for name in ("q", "k", "v"):
            static[name].copy_(inputs.tensors[name])
    for _ in range(2):
        graph.replay()
        assert equal_bits(out, expected.out) and equal_bits(lse, expected.lse)
        for name, grad in zip(leaves, grads, strict=True):
            assert equal_bits(grad, expected.grads[name]), name


def test_replays_draw_fresh_dropout(cuda_backend):
    q, k, v = (torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.float16) for _ in range(3))

    def step():
        state = torch.ops.flash_attn.rng_state(q, 4)
        return cuda_backend.attention(q, k, v, rng_state=state, dropout_p=0.5)[0], state

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, state = step()
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append((out.clone(), state.clone()))
        torch.testing.assert_close(
            seen[-1][0], cuda_backend.attention(q, k, v, rng_state=seen[-1][1], dropout_p=0.5)[0],
            rtol=0, atol=0,
        )  # fmt: skip
    assert not torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[1][0], seen[2][0])


def test_current_stream(cuda_backend, true):
    """Work is queued behind what its own stream produces, on no other stream."""
    inputs = true.inputs
    late = {n: torch.zeros_like(inputs.tensors[n]) for n in ("q", "k", "v")}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for name, t in late.items():
            t.copy_(inputs.tensors[name])
        delayed = type(inputs)(inputs.case, inputs.dtype, inputs.tensors | late, inputs.options,
                               inputs.dout, inputs.dlse)  # fmt: skip
        ours = run(cuda_backend.attention, delayed)
    torch.cuda.synchronize()
    check_forward(true, ours)
    check_grads(true, ours)


def test_no_call_waits(cuda_backend, true):
    """Any synchronisation that torch can see is an error here."""
    before = torch.cuda.get_sync_debug_mode()
    run(cuda_backend.attention, true.inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(50_000_000)
        busy = torch.cuda.Event()
        ours = run(cuda_backend.attention, true.inputs)
        busy.record()
        waited = busy.query()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert not waited, "the call returned after its work was done"
    check_forward(true, ours)
