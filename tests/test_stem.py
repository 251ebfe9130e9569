"""The stem's tail, maxpool(relu(BN(x))), in one pass: values, selection, derivatives, and what is kept."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from numerics import (
    CHAIN_MARGIN,
    DENSE,
    EVERY_DTYPE,
    EVERY_LAYOUT,
    FLOATS,
    GRADIENT_MARGIN,
    TRAIN_EVAL,
    assert_all_as_exact,
    batch_norm,
    copy_of,
    gradient_for,
    image,
    laid_out,
    leaf,
    outcome,
    stock_batch_norm,
)
from torch.autograd.graph import saved_tensors_hooks

from resfuse import Conv2dParameters, functional, ops, reference

pytestmark = pytest.mark.skipif(ops.missing_native["cpu"] is not None, reason=str(ops.missing_native["cpu"]))

DOUBLE = torch.float64
SMALL = (3, 7, 9, 8)
CHANNELS = (1, 3, 7, 16, 65)
MAPS = {"1x1": (6, 1, 1), "7x7": (2, 7, 7), "57x57": (1, 57, 57), "5x57": (2, 5, 57)}
WINDOWS = {  # kernel_size, stride, padding
    "stem": (3, 2, 1),
    "halves": (2, 2, 0),
    "overlapping": (3, 1, 1),
    "gaps": (2, 3, 1),
    "uneven": ((5, 2), (3, 4), (2, 1)),
    "one": (1, 1, 0),
    "row": ((1, 4), (1, 2), (0, 2)),
    "largest": (16, (3, 100), 8),
}
STEM = WINDOWS["stem"]
EVERY_WINDOW = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)

native = partial(functional.bn_relu_maxpool, backend="native")


def stock_stem(x, bn, kernel_size, stride, padding):
    return F.max_pool2d(F.relu(stock_batch_norm(x, bn)), kernel_size, stride, padding)


def stepped(shape, dtype=torch.float32, layout="contiguous"):
    """Values that are equal, or far enough apart for every dtype to order them: ties are exact, others are none."""
    return laid_out((torch.randint(-32, 33, shape) / 16).to(dtype), layout)


def inputs_of(shape, dtype, layout="contiguous", **options):
    vector = ops.accumulate_dtype(dtype)
    return stepped(shape, dtype, layout), batch_norm(shape[1], vector, statistics=vector, **options)


def run(function, x, bn, window, grad_out, dtype=None, frozen=()):
    """One path's outcome, on copies in `dtype`."""
    x, bn = leaf(x, dtype), copy_of(bn, dtype)
    inputs = {"x": x, "weight": bn.weight, "bias": bn.bias}
    for name in frozen:
        inputs[name].requires_grad_(False)
    return outcome(function(x, bn, *window), inputs, grad_out, [bn])


def check(x, bn, window=STEM, **options):
    """native against the float64 reference, by the rule of numerics; native's outcome."""
    with torch.no_grad():
        z = F.max_pool2d(stock_batch_norm(x.double(), copy_of(bn, DOUBLE)), *window)
    # of one sign, so that the sums over a single channel do not cancel
    args = (x, bn, window, gradient_for(z, x.dtype).abs())
    ours, stock = run(native, *args, **options), run(stock_stem, *args, **options)
    exact = run(reference.bn_relu_maxpool, *args, dtype=DOUBLE, **options)
    margin = CHAIN_MARGIN if x.dtype == torch.bfloat16 else GRADIENT_MARGIN  # stock's pool sums gradients in bfloat16
    assert_all_as_exact(ours, stock, exact, margin=margin)
    return ours


@TRAIN_EVAL
@EVERY_WINDOW
@EVERY_LAYOUT
@EVERY_DTYPE
def test_windows(dtype, layout, window, training):
    x, bn = inputs_of(SMALL, dtype, layout, training=training)
    ours = check(x, bn, window)
    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert ours["out"].is_contiguous(memory_format=order) and ours["grad_x"].is_contiguous(memory_format=order)


@TRAIN_EVAL
@DENSE
@FLOATS
@pytest.mark.parametrize("size", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_shapes(channels, size, dtype, layout, training):
    check(*inputs_of((size[0], channels, *size[1:]), dtype, layout, training=training))


@TRAIN_EVAL
@pytest.mark.parametrize("affine", ["", "w", "b"], ids=lambda a: a or "none")
def test_weight_and_bias_are_independent(affine, training):
    check(*inputs_of(SMALL, torch.float32, affine=affine, training=training))


@TRAIN_EVAL
@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("x",), ("weight", "bias")], ids=str)
def test_frozen_inputs_get_no_gradient(frozen, training):
    ours = check(*inputs_of(SMALL, torch.float32, "channels_last", training=training), frozen=frozen)
    assert not any(f"grad_{name}" in ours for name in frozen)


@TRAIN_EVAL
@DENSE
def test_zero_and_negative_gamma(layout, training):
    x, bn = inputs_of(SMALL, torch.float32, layout, training=training)
    ours = check(x, bn._replace(weight=torch.tensor([-1.5, 0.0, 1.0, -0.0, 2.0, -0.1, 1e-3])))
    assert not ours["grad_x"][:, 1].any()


def positions(indices, width, kernel_size, stride, padding):
    """The arg-max of each window as stock gives it: a pixel's number in its plane."""
    kernel, step, pad = ((v, v) if isinstance(v, int) else v for v in (kernel_size, stride, padding))
    assert indices.dtype == torch.uint8
    rows = torch.arange(indices.shape[2])[:, None] * step[0] - pad[0] + indices.long() // kernel[1]
    return rows * width + torch.arange(indices.shape[3]) * step[1] - pad[1] + indices.long() % kernel[1]


@EVERY_WINDOW
@DENSE
@EVERY_DTYPE
@pytest.mark.parametrize("channels", [1, 7, 16, 65])
def test_the_selection_is_stocks(channels, dtype, layout, window):
    """Ties, NaN, infinities, zeros of both signs, and a scale of 0: the same bits from the same pixel."""
    x = stepped((2, channels, 9, 11), dtype, layout)
    specials = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0], dtype=dtype)
    x[:, :, 2:8:2, 1:10] = specials[torch.randint(5, (2, channels, 3, 9))]
    x[:, 0, :4, :4] = torch.nan
    scale, shift = torch.randn(2, channels, dtype=ops.accumulate_dtype(dtype))
    scale[0], shift[-1] = 0, -0.0
    out, indices = ops.scale_shift_relu_maxpool(x, scale, shift, *window)
    activated = ops.scale_shift_act(x, scale, shift, None, None, None, True)
    expected, pixels = F.max_pool2d(activated, *window, return_indices=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit() & (out == 0), expected.signbit() & (expected == 0))
    assert torch.equal(positions(indices, 11, *window), pixels)
    assert indices.stride() == out.stride() == expected.stride()


@DENSE
def test_values_are_rounded_to_float16_as_a_store_rounds(layout):
    """Every half, times scales that make ties, subnormals and overflows: the pool sees what scale_shift_act writes."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).view(1, 1, 256, 256)
    scale = torch.tensor([1.0, 0.5, 2**-10, 2**-13, 1 + 2**-11, 2 - 2**-12, 0.3, 97.0, -1.0, 3e-7])
    x = laid_out(x.expand(1, len(scale), 256, 256), layout)
    out, _ = ops.scale_shift_relu_maxpool(x, scale, torch.zeros_like(scale), [1, 1], [1, 1], [0, 0])
    expected = F.relu(x.float() * scale[:, None, None]).half()
    assert expected.isinf().any() and ((expected > 0) & (expected < 2**-14)).any()
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@TRAIN_EVAL
@EVERY_DTYPE
@DENSE
def test_special_values_propagate_as_stock(layout, dtype, training):
    x, bn = inputs_of((2, 9, 6, 5), dtype, layout, training=training)
    x[0, :2, 2, 2] = torch.tensor([torch.nan, -0.0], dtype=dtype)
    if not training:  # in training an infinity makes its channel NaN
        x[0, 2:4, 2, 2] = torch.tensor([torch.inf, -torch.inf], dtype=dtype)
    results = [run(f, x, bn, STEM, torch.ones(2, 9, 3, 3, dtype=dtype)) for f in (native, stock_stem)]
    for name, ours in results[0].items():
        rtol = 2e-2 if dtype.itemsize == 2 else 1e-4
        torch.testing.assert_close(ours, results[1][name], equal_nan=True, rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_values_are_compared_after_rounding(dtype):
    """The second value is larger before it is rounded, and equal after: the first is selected, as by stock."""
    x = torch.tensor([1.0, 1.0], dtype=dtype).view(1, 1, 1, 2)
    x[..., 1] = torch.nextafter(x[..., 0], torch.tensor(2.0, dtype=dtype))
    scale, shift = torch.tensor([1e-4]), torch.tensor([1.0])
    assert scale * x[..., 1] > scale * x[..., 0]
    out, indices = ops.scale_shift_relu_maxpool(x, scale, shift, (1, 2), 1, 0)
    assert out.item() == torch.tensor(1.0001).to(dtype) and indices.item() == 0


@TRAIN_EVAL
def test_an_empty_batch_as_stock(training):
    bn = batch_norm(3, training=training, momentum=None)
    results = [run(f, torch.empty(0, 3, 4, 4), bn, STEM, torch.empty(0, 3, 2, 2)) for f in (native, stock_stem)]
    for name, ours in results[0].items():
        torch.testing.assert_close(ours, results[1][name], rtol=0, atol=0, msg=lambda text, name=name: name + text)


def everything(layout, dtype, shape=(4, 65, 40, 40)):
    torch.manual_seed(5)
    x, bn = inputs_of(shape, dtype, layout)
    grad_out = torch.randn(*shape[:2], *((s + 1) // 2 for s in shape[2:])).to(dtype)
    return list(run(native, x, bn, STEM, grad_out).values())


@FLOATS
@DENSE
def test_bits_are_the_same_for_any_run_and_thread_count(layout, dtype, threads):
    threads(2)
    expected = everything(layout, dtype)
    for count in (2, 1, 3):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(everything(layout, dtype), expected, strict=True))


@EVERY_LAYOUT
@EVERY_DTYPE
def test_nothing_depends_on_fresh_memory(dtype, layout, request):
    expected = everything(layout, dtype, SMALL)
    request.getfixturevalue("poisoned")
    assert all(torch.equal(a, b) for a, b in zip(everything(layout, dtype, SMALL), expected, strict=True))


@pytest.mark.parametrize("kind", ["expanded", "channels_last", "permuted", "sliced"])
@DENSE
def test_incoming_gradient_in_another_layout(layout, kind):
    x, bn = inputs_of(SMALL, torch.float32, layout)
    grad_out = (
        torch.rand(1, 7, 1, 1).expand(3, 7, 5, 4) if kind == "expanded" else laid_out(torch.randn(3, 7, 5, 4), kind)
    )
    ours, expected = (run(native, x, bn, STEM, g) for g in (grad_out, grad_out.contiguous()))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def derivable(training):
    """(function of x, weight, bias and options, their values): a stem without tracked statistics in training."""
    bn = batch_norm(2, DOUBLE, training=training, eps=1e-2)
    if training:
        bn = bn._replace(running_mean=None, running_var=None, num_batches_tracked=None)

    def call(function, x, weight, bias):
        return function(x, bn._replace(weight=weight, bias=bias), 3, 2, 1)

    return call, (image((2, 2, 4, 3), DOUBLE, "channels_last"), bn.weight, bn.bias)


@TRAIN_EVAL
def test_both_derivatives(training):
    call, inputs = derivable(training)
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(partial(call, native), leaves)
    assert torch.autograd.gradgradcheck(partial(call, native), leaves)


@TRAIN_EVAL
def test_hessian_products_are_stocks(training):
    call, inputs = derivable(training)
    tangents, products = [torch.randn_like(t) for t in inputs], []
    for function in (native, stock_stem):
        leaves = [leaf(t, DOUBLE) for t in inputs]
        grads = torch.autograd.grad(call(function, *leaves).pow(3).sum(), leaves, create_graph=True)
        products.append(torch.autograd.grad(sum((g * t).sum() for g, t in zip(grads, tangents, strict=True)), leaves))
    for a, b in zip(*products, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert a.norm() > 1e-3


@TRAIN_EVAL
def test_torch_func_and_forward_mode_give_the_references_values(training):
    call, inputs = derivable(training)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    ours, exact = partial(call, native), partial(call, reference.bn_relu_maxpool)
    torch.testing.assert_close(torch.func.jvp(ours, inputs, tangents), torch.func.jvp(exact, inputs, tangents))
    gradients = torch.func.grad(lambda *args: ours(*args).square().sum(), (0, 1, 2))(*inputs)
    plain = torch.autograd.functional.vjp(lambda *args: exact(*args).square().sum(), inputs)[1]
    torch.testing.assert_close(gradients, plain)


@TRAIN_EVAL
def test_kept_are_x_and_one_byte_for_each_output(training):
    x, bn, kept = leaf(image((3, 5, 6, 6), layout="channels_last")), copy_of(batch_norm(5, training=training)), []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = native(x, bn)
    large = [t for t in kept if t.numel() > 5]
    assert [t.data_ptr() for t in large if t.dtype == torch.float32] == [x.data_ptr()]
    assert [t.shape for t in large if t.dtype == torch.uint8] == [out.shape] and len(large) == 2
    assert not {t.data_ptr() for t in kept} & {bn.running_mean.data_ptr(), bn.running_var.data_ptr()}


@DENSE
def test_moments_may_be_given(layout):
    """They are used, their gradients reach x, and running statistics are those of the moments; double backward too."""
    x, own, results = leaf(stepped((3, 5, 9, 8), layout=layout), DOUBLE), batch_norm(5), []
    for function in (native, partial(functional.bn_relu_maxpool, backend="reference"), None):
        bn = copy_of(own, DOUBLE)
        if function is None:
            moments, out = (), native(x, bn)
        else:
            moments = functional.moments(x)
            out = function(x, bn, moments=moments)
        inputs = [x, bn.weight, bn.bias]
        grads = torch.autograd.grad(out.pow(3).sum(), inputs, create_graph=True)
        twice = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs, retain_graph=True)
        results.append([out, *grads, *twice, bn.running_mean, bn.running_var])
        if moments:
            assert all(grad.norm() > 1e-3 for grad in torch.autograd.grad(out.sum(), moments))
    for found in results[:2]:
        for ours, expected in zip(found, results[2], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
            assert ours.norm() > 1e-3
    shifted = functional.moments(x.detach() + 1)
    assert not torch.equal(native(x, bn, moments=shifted), native(x, bn))
    with pytest.raises(ValueError, match="moments must be"):
        native(x, bn, moments=shifted[:1])


@pytest.mark.parametrize("retain", [False, True], ids=["freed", "retained"])
@DENSE
def test_a_stem_may_reuse_the_convolutions_memory(layout, retain):
    """With retain_graph the convolution's output is kept, and a second backward gives the same gradients."""
    x, weight = image((2, 3, 9, 9), torch.float32, layout), torch.randn(4, 3, 3, 3)
    results = []
    for function in (functional.conv_bn_relu_maxpool, None):
        torch.manual_seed(3)
        bn, leaves = copy_of(batch_norm(4)), [leaf(x, x.dtype), leaf(weight, weight.dtype)]
        conv = Conv2dParameters(leaves[1], padding=1)
        out = function(leaves[0], conv, bn) if function else native(F.conv2d(leaves[0], leaves[1], padding=1), bn)
        wanted = [*leaves, bn.weight, bn.bias]
        first = torch.autograd.grad(out.square().sum(), wanted, retain_graph=retain)
        results.append(first)
        if retain:
            again = torch.autograd.grad(out.square().sum(), wanted)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_compiles_to_one_graph_with_the_numbers_of_eager():
    results = []
    for wrap in (lambda f: f, partial(torch.compile, fullgraph=True, backend="aot_eager", dynamic=True)):
        torch.manual_seed(0)
        call, found = wrap(native), []
        for batch in (2, 3):
            x, bn = leaf(stepped((batch, 5, 9, 8), layout="channels_last")), copy_of(batch_norm(5))
            out = call(x, bn)
            found += [out.detach(), *torch.autograd.grad(out.square().sum(), [x, bn.weight, bn.bias]), bn.running_var]
        results.append(found)
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
