"""Bottlenecks on a GPU whose every convolution is Triton's fused kernel: captured in a CUDA graph, compiled and under
autocast; and a convolution of more than 2^31 elements."""

import copy

import pytest
import torch
from numerics import GRADIENT_MARGIN, assert_all_as_exact, image, judged, step
from test_cuda_dispatch import Calls
from test_gpu_triton import two_billion_elements
from torch import nn

import resfuse
from resfuse import choices
from resfuse.models import Bottleneck

pytest.importorskip("triton", reason="needs Triton")

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu_with_triton", "every_convolution_is_ours")]
FOLDING = pytest.mark.parametrize("folding", [True, False], ids=["folded", "direct"])
LAST = torch.channels_last


@pytest.fixture
def every_convolution_is_ours(monkeypatch):
    """Whatever a table or the rule says of its shape."""
    monkeypatch.setattr(choices, "choose", lambda *asked: "fused")


def stock():
    """A projection, and an identity, whose last convolutions may fold."""
    projection = nn.Sequential(nn.Conv2d(64, 256, 1, bias=False), nn.BatchNorm2d(256))
    return nn.Sequential(Bottleneck(64, 64, 1, projection), Bottleneck(256, 64)).to(memory_format=LAST)


def fused(model, folding):
    return resfuse.fuse(model, backend="triton", folding=folding, strict=True)


def batch(size=12):
    return image((4, 64, size, size), layout="channels_last")


def training_step(model, x, dtype=torch.bfloat16):
    model.zero_grad()
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        out = model(x)
    out.float().square().mean().backward()


@FOLDING
def test_a_step_is_captured_in_a_cuda_graph(folding):
    """Nothing waits for the host, no convolution is torch's, and a replay gives the bits of the step."""
    model, x = fused(stock(), folding), batch()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        training_step(model, x)
        with Calls() as calls:
            training_step(model, x)
    torch.cuda.current_stream().wait_stream(stream)
    assert_convolutions_are_ours(calls, folding)
    expected = [p.grad.clone() for p in model.parameters()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        training_step(model, x)
    graph.replay()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


def assert_convolutions_are_ours(calls, folding):
    assert not {"aten::convolution", "aten::convolution_backward"} & calls.of.keys()
    folded = {"second_moments", "expand_bn_act_backward_weight", "expand_bn_act_backward_input"}
    assert {"conv_stats", "conv_stats_backward"} <= calls.ours().keys()
    assert folded & calls.ours().keys() == (folded if folding else set())


@FOLDING
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_and_eager_agree(dtype, folding):
    model, x = fused(stock(), folding), batch()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    training_step(compiled, x, dtype)
    training_step(model, x, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= tolerance * theirs.grad.norm()
    for ours, theirs in zip(twin.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@FOLDING
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_a_step_is_as_exact_as_stock(autocast, folding):
    model = stock()
    exact, ours, x = copy.deepcopy(model).double(), fused(copy.deepcopy(model), folding), batch()
    results = [step(m, x, autocast=autocast) for m in (ours, model)]
    wanted = step(exact, x.double())
    margin = 1 if autocast else GRADIENT_MARGIN  # six bfloat16 convolutions deep, gradients are off by a tenth
    assert_all_as_exact(*(judged(result, wanted) for result in (*results, wanted)), margin=margin)


def check_every_image_is_the_first(big):
    """A 1x1 convolution of equal images, with its backward: outputs bit for bit, sums as the images' count says."""
    from resfuse._triton.candidates import CANDIDATES

    kernels, first = CANDIDATES["fused"], big[:1].clone(memory_format=LAST)
    channels = big.shape[1]
    affine, weight = torch.rand(2, channels) + 0.5, torch.randn(channels, channels, 1, 1) / channels**0.5
    rest = affine, first.float().mean((0, 2, 3)), weight, True, [1, 1], [0, 0], [1, 1], 1
    once, *moments = kernels.conv_stats(first, *rest, True)
    y, *found = kernels.conv_stats(big, *rest, True)
    assert all(torch.equal(part, once.expand_as(part)) for part in y.split(64))
    torch.testing.assert_close(found, moments, rtol=1e-4, atol=1e-4)
    del y
    grad = (*[None] * 5, False)
    grad_x, *sums = kernels.conv_stats_backward(big, *grad, big, *rest, None, True, True)
    expected, *wanted = kernels.conv_stats_backward(first, *grad, first, *rest, None, True, True)
    assert all(torch.equal(part, expected.expand_as(part)) for part in grad_x.split(64))
    for ours, theirs in zip(sums, wanted, strict=True):
        torch.testing.assert_close(ours / len(big), theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_a_convolution_beyond_two_billion_elements():
    check_every_image_is_the_first(two_billion_elements()[1])
