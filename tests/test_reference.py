"""The mathematics of resfuse.reference against torch.nn.functional in float64, and its derivatives of both orders."""

import pytest
import torch
import torch.nn.functional as F
from numerics import LAYOUTS, RESIDUALS, batch_norm, copy_of, image, stock_batch_norm, stock_bn_act
from torch import nn

from resfuse import Conv2dParameters, reference

DOUBLE = torch.float64


def assert_same(ours, expected):
    if isinstance(ours, torch.Tensor):
        ours, expected = [ours], [expected]
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def double_norm(channels, **options):
    return batch_norm(channels, DOUBLE, **options)


def conv_of(out, into, size=1, **options):
    weight = torch.randn(out, into // options.get("groups", 1), size, size, dtype=DOUBLE)
    return Conv2dParameters(weight, **options)


def stock_conv(x, conv):
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def assert_differentiable(function, *inputs):
    """gradcheck and gradgradcheck with respect to every input."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_add_relu(layout):
    x, residual = image((2, 3, 4, 5), DOUBLE, layout, mean=0), image((2, 3, 4, 5), DOUBLE)
    assert_same(reference.add_relu(x, residual), F.relu(x + residual))
    assert_differentiable(reference.add_relu, x, residual)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments(layout):
    x = image((3, 4, 3, 2), DOUBLE, layout)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    assert_same(reference.moments(x), (mean, var))
    assert_differentiable(reference.moments, x)


@pytest.mark.parametrize("affine", ["", "w", "b", "wb"], ids=lambda a: a or "none")
def test_finalize_normalises(affine):
    x, bn = image((3, 4, 3, 2), DOUBLE), double_norm(4, affine=affine)
    scale, shift = reference.finalize(*reference.moments(x), bn.weight, bn.bias, bn.eps)
    expected = F.batch_norm(x, None, None, bn.weight, bn.bias, True, 0.1, bn.eps)
    assert_same(x * scale[:, None, None] + shift[:, None, None], expected)


def test_finalize_is_differentiable():
    def function(*inputs):
        return reference.finalize(*inputs, 1e-3)

    assert_differentiable(function, *torch.rand(4, 3, dtype=DOUBLE).add(0.5))


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None], ids=str)
def test_running_statistics_are_batch_norms(momentum):
    stock = nn.BatchNorm2d(4, momentum=momentum, dtype=DOUBLE)
    running_mean, running_var, batches = torch.zeros(4, dtype=DOUBLE), torch.ones(4, dtype=DOUBLE), torch.tensor(0)
    for step in range(1, 4):
        x = image((2, 4, 3, 3), DOUBLE)
        stock(x)
        reference.finalize(
            *reference.moments(x), None, None, 1e-5, count=18, running_mean=running_mean, running_var=running_var,
            num_batches_tracked=batches, momentum=momentum,
        )  # fmt: skip
        assert_same((running_mean, running_var, batches), (stock.running_mean, stock.running_var, torch.tensor(step)))


def test_finalize_of_an_empty_batch_only_counts_it():
    bn = double_norm(3)
    before = copy_of(bn)
    reference.finalize(
        torch.rand(3), torch.rand(3), None, None, 1e-5, running_mean=bn.running_mean, running_var=bn.running_var,
        num_batches_tracked=bn.num_batches_tracked, momentum=0.5,
    )  # fmt: skip
    assert_same((bn.running_mean, bn.running_var), (before.running_mean, before.running_var))
    assert bn.num_batches_tracked == before.num_batches_tracked + 1


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_scale_shift_act(residual, activation):
    x, r = image((2, 3, 3, 2), DOUBLE), image((2, 3, 3, 2), DOUBLE)
    scale, shift, scale_r, shift_r = torch.randn(4, 3, dtype=DOUBLE)
    inputs = {"none": (), "identity": (r,), "raw": (r, scale_r, shift_r)}[residual]

    def function(*inputs):
        return reference.scale_shift_act(*inputs, activation=activation)

    z = torch.einsum("nchw,c->nchw", x, scale) + shift.view(1, 3, 1, 1)
    if residual == "identity":
        z = z + r
    if residual == "raw":
        z = z + torch.einsum("nchw,c->nchw", r, scale_r) + shift_r.view(1, 3, 1, 1)
    assert_same(function(x, scale, shift, *inputs), F.relu(z) if activation == "relu" else z)
    assert_differentiable(function, x, scale, shift, *inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32_and_rounded_once(dtype):
    x, r = image((2, 3, 4, 4), dtype), image((2, 3, 4, 4), dtype)
    scale, shift = torch.randn(2, 3)
    z = F.relu(x.float() * scale.view(3, 1, 1) + shift.view(3, 1, 1) + r.float())
    assert torch.equal(reference.scale_shift_act(x, scale, shift, r), z.to(dtype))
    assert torch.equal(reference.add_relu(x, r), F.relu(x.float() + r.float()).to(dtype))
    assert all(vector.dtype == torch.float32 for vector in reference.moments(x))
    assert reference.bn_act(x, batch_norm(3)).dtype == dtype


def test_scale_shift_relu_maxpool():
    x = image((1, 2, 5, 5), DOUBLE)
    scale, shift = torch.randn(2, 2, dtype=DOUBLE)

    def function(*inputs):
        return reference.scale_shift_relu_maxpool(*inputs, 3, 2, 1)

    z = F.relu(x * scale.view(2, 1, 1) + shift.view(2, 1, 1))
    assert_same(function(x, scale, shift), nn.MaxPool2d(3, 2, 1)(z))
    assert_differentiable(function, x[..., :3, :3], scale, shift)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bn_relu_maxpool(training):
    x, bn = image((2, 2, 4, 3), DOUBLE), double_norm(2, training=training, eps=1e-2)

    def ours(x, weight, bias):
        return reference.bn_relu_maxpool(x, copy_of(bn)._replace(weight=weight, bias=bias), 3, (2, 1), 1)

    def stock(x, weight, bias):
        return F.max_pool2d(stock_bn_act(x, copy_of(bn)._replace(weight=weight, bias=bias)), 3, (2, 1), 1)

    assert_same(gradients(ours, (x, bn.weight, bn.bias)), gradients(stock, (x, bn.weight, bn.bias)))
    assert_differentiable(ours, x, bn.weight, bn.bias)


CONVS = pytest.mark.parametrize(
    "options",
    [
        pytest.param({"size": 1}, id="1x1"),
        pytest.param({"size": 3, "padding": 1}, id="3x3"),
        pytest.param({"size": 3, "padding": (1, 2), "stride": (2, 1)}, id="strided"),
        pytest.param({"size": 3, "padding": "same", "dilation": 2}, id="dilated"),
        pytest.param({"size": 3, "padding": 1, "groups": 2}, id="grouped"),
    ],
)


@CONVS
def test_conv_stats_pads_the_activated_input(options):
    x, conv = image((2, 4, 5, 5), DOUBLE), conv_of(6, 4, **options)
    scale, shift = torch.randn(2, 4, dtype=DOUBLE)
    shift = shift.abs() + 0.1  # padding x instead would give act(shift) != 0 in the border
    for affine in ((), (scale, shift)):
        a = F.relu(x * scale.view(4, 1, 1) + shift.view(4, 1, 1)) if affine else x
        y = stock_conv(a, conv)
        var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
        assert_same(reference.conv_stats(x, conv, *affine), (y, mean, var))


def test_conv_stats_is_differentiable():
    conv = conv_of(2, 2, 3, padding=1)

    def function(x, weight, scale, shift):
        return reference.conv_stats(x, conv._replace(weight=weight), scale, shift)

    scale, shift = torch.randn(2, 2, dtype=DOUBLE)
    assert_differentiable(function, image((2, 2, 2, 2), DOUBLE), conv.weight, scale, shift)


def gradients(function, inputs):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    out = out[0] if isinstance(out, tuple) else out
    torch.manual_seed(1)
    return [out, *torch.autograd.grad(out, leaves, torch.randn_like(out))]


def test_folded_weight_is_batch_norm_of_a_convolution():
    a, weight, bn = image((3, 3, 2, 2), DOUBLE), conv_of(5, 3).weight, double_norm(5)

    def folded(a, weight, gamma, beta):
        matrix, bias, *_ = reference.folded_weight(a, weight, gamma, beta, bn.eps)
        return F.conv2d(a, matrix, bias)

    def stock(a, weight, gamma, beta):
        return F.batch_norm(F.conv2d(a, weight), None, None, gamma, beta, True, 0.1, bn.eps)

    inputs = (a, weight, bn.weight, bn.bias)
    assert_same(gradients(folded, inputs), gradients(stock, inputs))
    var, mean = torch.var_mean(F.conv2d(a, weight), (0, 2, 3), correction=0)
    assert_same(reference.folded_weight(*inputs, bn.eps)[2:], (mean, var))


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("residual", ["none", "identity"])
def test_expand_bn_act(residual, activation):
    a, weight, bn = image((3, 3, 2, 2), DOUBLE), conv_of(4, 3).weight, double_norm(4)
    r = () if residual == "none" else (image((3, 4, 2, 2), DOUBLE),)

    def expand(a, weight, gamma, beta, *r):
        return reference.expand_bn_act(a, weight, gamma, beta, bn.eps, *r, activation=activation)

    def stock(a, weight, gamma, beta, *r):
        parameters = bn._replace(weight=gamma, bias=beta, running_mean=None, running_var=None)
        return stock_bn_act(F.conv2d(a, weight), parameters, *r, activation=activation)

    inputs = (a, weight, bn.weight, bn.bias, *r)
    assert_same(gradients(expand, inputs), gradients(stock, inputs))
    assert_differentiable(lambda *inputs: expand(*inputs)[0], *inputs)


def test_two_expansions_are_one_over_concatenated_channels():
    a, x = image((3, 3, 2, 2), DOUBLE), image((3, 2, 2, 2), DOUBLE)
    w1, w2 = conv_of(4, 3).weight, conv_of(4, 2).weight
    bn1, bn2 = double_norm(4), double_norm(4)

    def concatenated(a, x, w1, w2, g1, b1, g2, b2):
        left, bias1, *_ = reference.folded_weight(a, w1, g1, b1, bn1.eps)
        right, bias2, *_ = reference.folded_weight(x, w2, g2, b2, bn2.eps)
        return F.relu(F.conv2d(torch.cat((a, x), 1), torch.cat((left, right), 1), bias1 + bias2))

    def stock(a, x, w1, w2, g1, b1, g2, b2):
        left = F.batch_norm(F.conv2d(a, w1), None, None, g1, b1, True, 0.1, bn1.eps)
        return F.relu(left + F.batch_norm(F.conv2d(x, w2), None, None, g2, b2, True, 0.1, bn2.eps))

    inputs = (a, x, w1, w2, bn1.weight, bn1.bias, bn2.weight, bn2.bias)
    assert_same(gradients(concatenated, inputs), gradients(stock, inputs))


@CONVS
def test_conv_bias_act(options):
    conv = conv_of(6, 4, **options)._replace(bias=torch.randn(6, dtype=DOUBLE))
    x = image((2, 4, 5, 5), DOUBLE)
    z = stock_conv(x, conv)
    r = image(z.shape, DOUBLE)
    assert_same(reference.conv_bias_act(x, conv), F.relu(z))
    assert_same(reference.conv_bias_act(x, conv, r), F.relu(z + r))
    assert_same(reference.conv_bias_act(x, conv, r, "identity"), z + r)


def norm_inputs(residual, **options):
    """(inputs, function of inputs to BatchNorm2dParameters twice) for a bn_act of two channels."""
    bn, other = double_norm(2, **options), double_norm(2, **options)
    x, r = image((2, 2, 2, 2), DOUBLE), image((2, 2, 2, 2), DOUBLE)
    inputs = {"none": (), "identity": (r,), "raw": (r, other.weight, other.bias)}[residual]

    def call(function, x, weight, bias, r=None, weight_r=None, bias_r=None, **rest):
        raw = None if weight_r is None else copy_of(other)._replace(weight=weight_r, bias=bias_r)
        return function(x, copy_of(bn)._replace(weight=weight, bias=bias), r, raw, **rest)

    return (x, bn.weight, bn.bias, *inputs), call


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_bn_act(residual, activation, training):
    inputs, call = norm_inputs(residual, training=training, eps=1e-2)

    def ours(*inputs):
        return call(reference.bn_act, *inputs, activation=activation)

    def stock(*inputs):
        return call(stock_bn_act, *inputs, activation=activation)

    assert_same(gradients(ours, inputs), gradients(stock, inputs))
    assert_differentiable(ours, *inputs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batch_norm_affine_tracks_like_batch_norm(training):
    bn, x = double_norm(3, training=training), image((2, 3, 2, 2), DOUBLE)
    ours, stock = copy_of(bn), copy_of(bn)
    scale, shift = reference.batch_norm_affine(x, ours)
    assert_same(x * scale[:, None, None] + shift[:, None, None], stock_batch_norm(x, stock))
    assert_same(
        (ours.running_mean, ours.running_var, ours.num_batches_tracked),
        (stock.running_mean, stock.running_var, stock.num_batches_tracked),
    )


@CONVS
def test_conv_bn_act(options):
    x, conv, bn = image((2, 4, 5, 5), DOUBLE), conv_of(6, 4, **options), double_norm(6)
    y = stock_conv(x, conv)
    r, other = image(y.shape, DOUBLE), double_norm(6)
    for rest in ((), (r,), (r, other)):
        expected = stock_bn_act(y, copy_of(bn), *rest)
        assert_same(reference.conv_bn_act(x, conv, copy_of(bn), *rest), expected)


@pytest.mark.parametrize("shortcut", ["identity", "tensor", "projection"])
@pytest.mark.parametrize("depth", [2, 3], ids=["basic_block", "bottleneck"])
def test_residual_units(depth, shortcut):
    x, r = image((2, 4, 4, 4), DOUBLE), image((2, 4, 4, 4), DOUBLE)
    convs = [conv_of(4, 4, 3, padding=1) for _ in range(depth)]
    norms = [double_norm(4) for _ in range(depth)]
    projection, last = conv_of(4, 4), double_norm(4)
    function = reference.basic_block if depth == 2 else reference.bottleneck

    def ours(x, r, *weights):
        layers = [p for c, w, b in zip(convs, weights, norms, strict=True) for p in (c._replace(weight=w), copy_of(b))]
        kinds = {"identity": None, "tensor": r, "projection": (projection, copy_of(last))}
        return function(x, *layers, kinds[shortcut]) + 0 * r

    def stock(x, r, *weights):
        y = x
        for conv, weight, bn in zip(convs, weights, norms, strict=True):
            branch = stock_batch_norm(stock_conv(y, conv._replace(weight=weight)), copy_of(bn))
            y = F.relu(branch)
        kinds = {"identity": lambda: x, "tensor": lambda: r}
        kinds["projection"] = lambda: stock_batch_norm(stock_conv(x, projection), copy_of(last))
        return F.relu(branch + kinds[shortcut]()) + 0 * r

    inputs = (x, r, *[conv.weight for conv in convs])
    assert_same(gradients(ours, inputs), gradients(stock, inputs))
