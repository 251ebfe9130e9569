"""Derivatives of the native units: both orders, forward mode, torch.func, and what is kept for backward."""

from functools import partial

import pytest
import torch
from numerics import RESIDUALS, TRAIN_EVAL, batch_norm, copy_of, image, leaf, stock_bn_act
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from resfuse import functional, ops, reference

pytestmark = pytest.mark.skipif(ops.missing_native["cpu"] is not None, reason=str(ops.missing_native["cpu"]))

DOUBLE = torch.float64
SHAPE = (2, 2, 2, 2)
EVERY_RESIDUAL = pytest.mark.parametrize("residual", RESIDUALS)
ACTIVATIONS = pytest.mark.parametrize("activation", ["relu", "identity"])


def assert_differentiable(function, inputs):
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def bn_act_of(residual, training, *, tracked=True):
    """(call, inputs): call(bn_act, *inputs, **options) is one bn_act, of everything that can have a gradient."""
    bn, other = (batch_norm(2, DOUBLE, training=training, eps=1e-2) for _ in range(2))
    if training and not tracked:
        bn, other = (p._replace(running_mean=None, running_var=None, num_batches_tracked=None) for p in (bn, other))
    x, r = image(SHAPE, DOUBLE), image(SHAPE, DOUBLE, "channels_last")
    inputs = (x, bn.weight, bn.bias, *{"none": (), "identity": (r,), "raw": (r, other.weight, other.bias)}[residual])

    def call(bn_act, x, weight, bias, r=None, weight_r=None, bias_r=None, **options):
        raw = None if weight_r is None else other._replace(weight=weight_r, bias=bias_r)
        return bn_act(x, bn._replace(weight=weight, bias=bias), r, raw, **options)

    return call, inputs


native = partial(functional.bn_act, backend="native")


@TRAIN_EVAL
@ACTIVATIONS
@EVERY_RESIDUAL
def test_bn_act(residual, activation, training):
    call, inputs = bn_act_of(residual, training)
    assert_differentiable(partial(call, native, activation=activation), inputs)


@ACTIVATIONS
@EVERY_RESIDUAL
def test_scale_shift_act(residual, activation):
    x, r, v = image(SHAPE, DOUBLE), image(SHAPE, DOUBLE), torch.randn(4, 2, dtype=DOUBLE)
    inputs = {"none": (), "identity": (r,), "raw": (r, v[2], v[3])}[residual]

    def function(*inputs):
        return functional.scale_shift_act(*inputs, activation=activation, backend="native")

    assert_differentiable(function, (x, v[0], v[1], *inputs))


def test_add_relu():
    inputs = image(SHAPE, DOUBLE, "channels_last", mean=0), image(SHAPE, DOUBLE, mean=0)
    assert_differentiable(lambda *inputs: functional.add_relu(*inputs, backend="native"), inputs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_moments(layout):
    assert_differentiable(lambda x: functional.moments(x, backend="native"), [image(SHAPE, DOUBLE, layout)])


@pytest.mark.parametrize("wanted", ["mean", "var", "weight", "bias", "mean var weight bias"])
def test_finalize(wanted):
    values = dict(zip(("mean", "var", "weight", "bias"), torch.rand(4, 3, dtype=DOUBLE) + 0.5, strict=True))
    wanted = wanted.split()

    def function(*inputs):
        return functional.finalize(**{**values, **dict(zip(wanted, inputs, strict=True))}, eps=1e-2, backend="native")

    assert_differentiable(function, [values[name] for name in wanted])


@TRAIN_EVAL
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
def test_second_derivatives_with_everything_else_frozen(wanted, training):
    call, inputs = bn_act_of("identity", training)
    index = ("x", "weight", "bias", "residual").index(wanted)
    assert_differentiable(lambda t: call(native, *inputs[:index], t, *inputs[index + 1 :]), [inputs[index]])


def hessian_product(function, inputs, tangents):
    leaves = [leaf(t, DOUBLE) for t in inputs]
    grads = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum((g * t).sum() for g, t in zip(grads, tangents, strict=True)), leaves)


@TRAIN_EVAL
@EVERY_RESIDUAL
def test_hessian_products_are_stocks(residual, training):
    call, inputs = bn_act_of(residual, training)
    tangents = [torch.randn_like(t) for t in inputs]
    ours = hessian_product(partial(call, native), inputs, tangents)
    stock = hessian_product(partial(call, stock_bn_act), inputs, tangents)
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert a.norm() > 1e-3


@TRAIN_EVAL
@EVERY_RESIDUAL
def test_torch_func_and_forward_mode_give_the_references_values(residual, training):
    """Without tracked statistics in training: torch.func refuses to write what it captured, stock's too."""
    call, inputs = bn_act_of(residual, training, tracked=False)
    ours, exact = partial(call, native), partial(call, reference.bn_act)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    expected = torch.func.jvp(exact, inputs, tangents)
    torch.testing.assert_close(torch.func.jvp(ours, inputs, tangents), expected)
    every = tuple(range(len(inputs)))
    gradients = torch.func.grad(lambda *args: ours(*args).square().sum(), every)(*inputs)
    plain = torch.autograd.functional.vjp(lambda *args: exact(*args).square().sum(), inputs)[1]
    torch.testing.assert_close(gradients, plain)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, v) for t, v in zip(inputs, tangents, strict=True)]
        tangent = forward_ad.unpack_dual(ours(*duals)).tangent
    torch.testing.assert_close(tangent, expected[1])


@pytest.mark.parametrize("unit", ["add_relu", "moments", "scale_shift_act"])
def test_other_units_in_forward_mode(unit):
    vectors = torch.rand(2, 2, dtype=DOUBLE)
    rest = {"add_relu": (image(SHAPE, DOUBLE),), "moments": (), "scale_shift_act": tuple(vectors)}[unit]
    x, tangent = image(SHAPE, DOUBLE, mean=0), image(SHAPE, DOUBLE)
    ours, exact = (
        torch.func.jvp(lambda x, f=f, o=options: f(x, *rest, **o), (x,), (tangent,))
        for f, options in ((getattr(functional, unit), {"backend": "native"}), (getattr(reference, unit), {}))
    )
    torch.testing.assert_close(ours, exact)


def kept_for_backward(call):
    """The distinct tensors that a call saves, by address and size."""
    found = {}

    def pack(tensor):
        found[tensor.data_ptr(), tensor.numel()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    return list(found.values()), out


@TRAIN_EVAL
@ACTIVATIONS
@EVERY_RESIDUAL
def test_kept_are_raw_activations_and_vectors(residual, activation, training):
    shape = (3, 5, 6, 6)
    x, r = leaf(image(shape, layout="channels_last")), leaf(image(shape, layout="channels_last"))
    bn, other = copy_of(batch_norm(5, training=training)), copy_of(batch_norm(5, training=training))
    rest = {"none": (), "identity": (r,), "raw": (r, other)}[residual]
    kept, out = kept_for_backward(lambda: functional.bn_act(x, bn, *rest, activation=activation, backend="native"))
    large = {t.data_ptr() for t in kept if t.numel() > 5}
    expected = {x.data_ptr()} | ({r.data_ptr()} if residual == "raw" else set())
    if residual == "identity" and activation == "relu":
        expected.add(out.data_ptr())
    assert large == expected
    statistics = {t.data_ptr() for p in (bn, other) for t in (p.running_mean, p.running_var)}
    assert not statistics & {t.data_ptr() for t in kept}


def test_add_relu_keeps_its_output():
    x, r = leaf(image((3, 5, 6, 6))), leaf(image((3, 5, 6, 6)))
    kept, out = kept_for_backward(lambda: functional.add_relu(x, r, backend="native"))
    assert [t.data_ptr() for t in kept] == [out.data_ptr()]


@TRAIN_EVAL
def test_statistics_may_change_between_forward_and_backward(training):
    x, bn = leaf(image((3, 5, 6, 6))), copy_of(batch_norm(5, training=training))
    expected = torch.autograd.grad(functional.bn_act(x, copy_of(bn), backend="native").sum(), x)[0]
    out = functional.bn_act(x, bn, backend="native")
    bn.running_mean.add_(1)
    bn.running_var.mul_(2)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected)


@pytest.mark.parametrize("changed", ["x", "out", "weight"])
def test_changing_what_is_kept_raises(changed):
    x, r, bn = image((3, 5, 6, 6)), image((3, 5, 6, 6)), copy_of(batch_norm(5))
    out = functional.bn_act(x, bn, r, backend="native")
    with torch.no_grad():
        {"x": x, "out": out, "weight": bn.weight}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_updates_of_statistics_are_seen_by_autograd(backend):
    bn = batch_norm(5)
    tensors = (bn.running_mean, bn.running_var, bn.num_batches_tracked)
    before = [t._version for t in tensors]
    functional.bn_act(image((3, 5, 6, 6)), bn, backend=backend)
    assert all(t._version > version for t, version in zip(tensors, before, strict=True))
    before = [t._version for t in tensors]
    functional.bn_act(image((3, 5, 6, 6)), bn._replace(training=False), backend=backend)
    assert [t._version for t in tensors] == before
