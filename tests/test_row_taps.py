"""Convolutions of few channels: a kernel's row of taps is read as one pixel, in the kernels and in whole stems."""

import pytest
import torch
import torch.nn.functional as F
from numerics import TRAIN_EVAL, assert_all_as_exact, batch_norm, copy_of, image, leaf, stock_batch_norm

from resfuse import Conv2dParameters, backends, functional, ops

pytestmark = pytest.mark.skipif(not ops.tile_dtypes, reason="this processor has no tile kernels (AVX-512 or AVX2)")

DTYPES = pytest.mark.parametrize("dtype", sorted(ops.tile_dtypes, key=str), ids=str)
# channels, out, kernel, stride, padding, vertical dilation, height, width
CONVS = {
    "stem": (3, 64, (7, 7), (2, 2), (3, 3), 1, 33, 37),
    "3x3": (3, 70, (3, 3), (1, 1), (1, 1), 1, 8, 9),
    "grey": (1, 64, (5, 5), (1, 2), (2, 2), 1, 12, 20),
    "seven-channels": (7, 33, (3, 5), (2, 3), (1, 2), 1, 11, 17),
    "no-padding": (4, 64, (3, 3), (1, 1), (0, 0), 1, 9, 10),
    "all-padding": (3, 16, (2, 3), (1, 1), (2, 5), 1, 4, 5),
    "narrow": (2, 40, (3, 9), (1, 1), (1, 4), 1, 6, 3),
    "dilated-down": (3, 64, (3, 3), (1, 1), (2, 1), 2, 9, 9),
    "wide-steps": (5, 24, (2, 2), (3, 4), (0, 1), 1, 13, 21),
    "one-pixel": (3, 64, (7, 7), (2, 2), (3, 3), 1, 1, 1),
}
EVERY_CONV = pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)
STEM = (3, 64, (7, 7), (2, 2), (3, 3), 1, 33, 37)


def operands(conv, dtype, layout, images=3):
    """x, weight and the geometry of a convolution."""
    channels, out, kernel, stride, padding, dilation, height, width = conv
    x = image((images, channels, height, width), dtype, "channels_last")
    weight = torch.randn(out, channels, *kernel) / (channels * kernel[0] * kernel[1]) ** 0.5
    return x, weight.to(dtype, memory_format=layout), (list(stride), list(padding), [dilation, 1], 1)


@EVERY_CONV
@DTYPES
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_the_output_its_moments_and_the_weights_gradient(conv, dtype, layout):
    x, weight, pairs = operands(conv, dtype, layout)
    y, mean, var = ops.conv_stats(x, None, None, weight, False, *pairs, True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(y)
    found = ops.conv_stats_backward(
        grad, *[None] * 5, False, x, None, None, weight, False, *pairs, None, False, True
    )[1]  # fmt: skip
    assert found.stride() == weight.stride()
    results = [{"y": y, "grad_weight": found}]
    for wide in (dtype, torch.float64):
        w = leaf(weight, wide)
        out = F.conv2d(x.to(wide), w, None, *pairs)
        (grad_weight,) = torch.autograd.grad(out, w, grad.to(wide))
        results.append({"y": out.detach(), "grad_weight": grad_weight})
    assert_all_as_exact(*results)
    torch.testing.assert_close(mean.double(), y.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), y.double().var((0, 2, 3), unbiased=False), rtol=1e-4, atol=1e-6)


@DTYPES
def test_what_is_not_finite_reaches_the_outputs_that_read_it(dtype):
    x, weight, pairs = operands(STEM, dtype, torch.channels_last)
    x[1, 2, 5, 36], x[2, 0, 0, 0] = torch.inf, torch.nan
    y = ops.conv_stats(x, None, None, weight, False, *pairs, False)[0]
    exact = F.conv2d(x.double(), weight.double(), None, *pairs)
    assert torch.equal(y.isfinite(), exact.isfinite())
    grad = torch.randn_like(y)
    grad[:, 1:] = 0
    found = ops.conv_stats_backward(
        grad, *[None] * 5, False, x, None, None, weight, False, *pairs, None, False, True
    )[1]  # fmt: skip
    assert not found[0, 0].isfinite().all() and found[0, 1].isfinite().all()


def test_results_do_not_depend_on_the_number_of_threads():
    x, weight, pairs = operands(
        (3, 64, (7, 7), (2, 2), (3, 3), 1, 96, 64), torch.float32, torch.channels_last, images=6
    )
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        y, mean, var = ops.conv_stats(x, None, None, weight, False, *pairs, True)
        backward = ops.conv_stats_backward(
            y, *[None] * 5, False, x, None, None, weight, False, *pairs, None, False, True
        )  # fmt: skip
        found.append((y, mean, var, backward[1]))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@TRAIN_EVAL
@DTYPES
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_a_stem_is_one_node(dtype, training, bias):
    """Against stock in the same dtype: outputs, running statistics, and the gradients of every parameter and of x."""
    x, weight, pairs = operands(STEM, dtype, torch.channels_last, images=24)  # enough that single ReLUs do not decide
    own_bias, norm = torch.randn(64) if bias else None, batch_norm(64, training=training)
    grad, results = None, []
    for ours, wide in ((True, dtype), (False, dtype), (False, torch.float64)):
        vector = torch.float32 if wide == torch.bfloat16 else wide
        inputs = {"x": leaf(x, wide), "weight": leaf(weight, wide)}
        if own_bias is not None:
            inputs["bias"] = leaf(own_bias, wide)
        bn = copy_of(norm, vector)
        conv = Conv2dParameters(inputs["weight"], inputs.get("bias"), *pairs)
        if ours:
            out = functional.conv_bn_relu_maxpool(inputs["x"], conv, bn)
            assert out.grad_fn.name() == "ConvBNReLUMaxPoolFunctionBackward"
        else:
            y = F.conv2d(inputs["x"], conv.weight, conv.bias, *pairs)
            out = F.max_pool2d(F.relu(stock_batch_norm(y, bn)), 3, 2, 1)
        grad = torch.rand_like(out.detach()) if grad is None else grad
        wanted = {**inputs, "bn_weight": bn.weight, "bn_bias": bn.bias}
        grads = torch.autograd.grad(out, list(wanted.values()), grad.to(wide))
        found = {f"grad_{name}": g for name, g in zip(wanted, grads, strict=True)}
        if training and bias:
            assert not ours or found["grad_bias"].count_nonzero() == 0
            del found["grad_bias"]  # zero; stock's is a sum's rounding errors
        results.append({"out": out.detach(), **found, "mean": bn.running_mean, "var": bn.running_var})
    assert_all_as_exact(*results, margin=10 if dtype == torch.float32 else 2)


@TRAIN_EVAL
def test_a_stem_is_differentiable_twice(training):
    x, weight, pairs = operands(STEM, torch.float32, torch.channels_last)
    norm, own_bias, results = batch_norm(64, training=training), torch.randn(64), []
    for ours, wide in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        inputs, bn = [leaf(t, wide) for t in (x, weight, own_bias)], copy_of(norm, wide)
        if ours:
            out = functional.conv_bn_relu_maxpool(inputs[0], Conv2dParameters(*inputs[1:], *pairs), bn)
        else:
            out = F.max_pool2d(F.relu(stock_batch_norm(F.conv2d(*inputs, *pairs), bn)), 3, 2, 1)
        inputs += [bn.weight, bn.bias]
        grads = torch.autograd.grad(out.square().mean(), inputs, create_graph=True)
        twice = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)
        names = ("grad_x", "grad_weight", "grad_conv_bias", "grad_bn_weight", "grad_bn_bias")
        results.append(dict(zip(names, twice, strict=True)))
    if training:  # the batch's mean cancels a convolution's bias
        biases = [found.pop("grad_conv_bias") for found in results]
        assert biases[0].count_nonzero() == 0
    assert_all_as_exact(*results, margin=10)


def test_few_channels_are_served_where_that_was_measured(monkeypatch):
    monkeypatch.setattr(backends, "_TILE_CHANNELS", dict.fromkeys(ops.tile_dtypes, 64))
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)

    def node(channels, out, kernel, dilation=1):
        conv = Conv2dParameters(torch.randn(out, channels, *kernel, requires_grad=True), padding=2, dilation=dilation)
        return functional.conv_bn_relu_maxpool(x[:, :channels], conv, batch_norm(out)).grad_fn.name()

    ours, torchs = "ConvBNReLUMaxPoolFunctionBackward", "BNReLUMaxPoolFunctionBackward"
    assert node(3, 64, (7, 7)) == ours and node(3, 64, (3, 5)) == ours
    for refused in ((3, 63, (7, 7)), (3, 64, (1, 7)), (3, 64, (7, 1)), (3, 64, (3, 3), 2)):
        assert node(*refused) == torchs
