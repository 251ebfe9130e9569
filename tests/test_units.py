"""The native units through resfuse.functional: outputs, statistics and every gradient against a float64 reference."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from numerics import (
    DENSE,
    DTYPES,
    EVERY_DTYPE,
    EVERY_LAYOUT,
    FLOATS,
    LAYOUTS,
    RESIDUALS,
    TRAIN_EVAL,
    assert_all_as_exact,
    assert_as_exact,
    batch_norm,
    copy_of,
    gradient_for,
    image,
    laid_out,
    leaf,
    outcome,
    stock_bn_act,
)

from resfuse import functional, ops, reference

pytestmark = pytest.mark.skipif(ops.missing_native["cpu"] is not None, reason=str(ops.missing_native["cpu"]))

DOUBLE = torch.float64
SMALL = (3, 7, 5, 5)
CHANNELS = (1, 3, 7, 57, 65, 256)
MAPS = {"1x1": (6, 1, 1), "7x7": (2, 7, 7), "odd": (3, 1, 9)}
EVERY_RESIDUAL = pytest.mark.parametrize("residual", RESIDUALS)
ACTIVATIONS = pytest.mark.parametrize("activation", ["relu", "identity"])


def native_bn_act(*args, **options):
    return functional.bn_act(*args, **options, backend="native")


def as_stock_can(bn):
    """Stock wants weight, bias and statistics in one dtype; the casts stay differentiable."""
    if bn is None or bn.weight is None or bn.running_mean is None or bn.weight.dtype == bn.running_mean.dtype:
        return bn
    return bn._replace(weight=bn.weight.float(), bias=None if bn.bias is None else bn.bias.float())


def run_bn_act(function, x, bn, residual, residual_bn, grad_out, dtype=None, frozen=(), **options):
    """One path's outcome, on copies in `dtype`; `frozen` names the inputs that need no gradient."""
    x, residual, norms = leaf(x, dtype), leaf(residual, dtype), [copy_of(bn, dtype), copy_of(residual_bn, dtype)]
    inputs = {"x": x, "residual": residual}
    for name, parameters in zip(("", "residual_"), norms, strict=True):
        if parameters is not None:
            inputs |= {f"{name}weight": parameters.weight, f"{name}bias": parameters.bias}
    for name in frozen:
        inputs[name].requires_grad_(False)
    passed = [as_stock_can(p) for p in norms] if function is stock_bn_act else norms
    out = function(x, passed[0], residual, passed[1], **options)
    return outcome(out, inputs, grad_out, [p for p in norms if p is not None])


def check_bn_act(x, bn, residual=None, residual_bn=None, **options):
    """native against the float64 reference, by the rule of numerics; native's outcome."""
    with torch.no_grad():
        double = [None if t is None else t.double() for t in (x, residual)]
        z = reference.bn_act(double[0], copy_of(bn, DOUBLE), double[1], copy_of(residual_bn, DOUBLE), "identity")
    args = (x, bn, residual, residual_bn, gradient_for(z, x.dtype))
    ours = run_bn_act(native_bn_act, *args, **options)
    stock = run_bn_act(stock_bn_act, *args, **options)
    exact = run_bn_act(reference.bn_act, *args, dtype=DOUBLE, **options)
    assert_all_as_exact(ours, stock, exact)
    return ours


def bn_act_inputs(shape, dtype, layout="contiguous", residual="none", *, parameters=None, **options):
    """x, bn, residual, residual_bn; parameters are float32 beside 16-bit activations unless `parameters` says else."""
    parameters = parameters or ops.accumulate_dtype(dtype)
    bn = batch_norm(shape[1], parameters, statistics=ops.accumulate_dtype(dtype), **options)
    other = batch_norm(shape[1], parameters, statistics=ops.accumulate_dtype(dtype), **options)
    r = image(shape, dtype, layout) if residual != "none" else None
    return image(shape, dtype, layout), bn, r, other if residual == "raw" else None


@ACTIVATIONS
@TRAIN_EVAL
@EVERY_RESIDUAL
@EVERY_LAYOUT
@EVERY_DTYPE
def test_bn_act(dtype, layout, residual, training, activation):
    args = bn_act_inputs(SMALL, dtype, layout, residual, training=training)
    ours = check_bn_act(*args, activation=activation)
    x = args[0]
    dense = x.is_contiguous() or layout == "channels_last"
    expected = x.stride() if dense else torch.empty(x.shape).stride()
    assert ours["out"].stride() == ours["grad_x"].stride() == expected
    assert ours["grad_weight"].dtype == args[1].weight.dtype


@TRAIN_EVAL
@EVERY_RESIDUAL
@DENSE
@FLOATS
@pytest.mark.parametrize("size", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_bn_act_shapes(channels, size, dtype, layout, residual, training):
    shape = (size[0], channels, *size[1:])
    check_bn_act(*bn_act_inputs(shape, dtype, layout, residual, training=training))


@FLOATS
@DENSE
def test_bn_act_large_map(layout, dtype):
    check_bn_act(*bn_act_inputs((2, 65, 112, 112), dtype, layout, "raw"))


@TRAIN_EVAL
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@EVERY_RESIDUAL
def test_parameters_have_their_own_dtype(residual, parameters, training):
    x, *rest = bn_act_inputs(SMALL, torch.bfloat16, "channels_last", residual, parameters=parameters, training=training)
    ours = check_bn_act(x, *rest)
    assert ours["grad_weight"].dtype == ours["grad_bias"].dtype == parameters
    assert ours["running_mean 0"].dtype == torch.float32


def test_low_precision_statistics():
    x = image(SMALL, torch.bfloat16)
    ours = check_bn_act(x, batch_norm(7, torch.bfloat16))
    assert ours["running_var 0"].dtype == torch.bfloat16


@TRAIN_EVAL
@pytest.mark.parametrize("affine", ["", "w", "b"], ids=lambda a: a or "none")
@EVERY_RESIDUAL
def test_weight_and_bias_are_independent(residual, affine, training):
    check_bn_act(*bn_act_inputs(SMALL, torch.float32, residual=residual, affine=affine, training=training))


@TRAIN_EVAL
@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("x",), ("x", "weight", "bias"), ("residual",)], ids=str)
def test_frozen_inputs_get_no_gradient(frozen, training):
    ours = check_bn_act(*bn_act_inputs(SMALL, torch.float32, residual="raw", training=training), frozen=frozen)
    assert not any(f"grad_{name}" in ours for name in frozen)


@pytest.mark.parametrize("tracked", ["tracked", "uncounted", "untracked"])
@pytest.mark.parametrize("momentum", [None, 0.0, 0.3, 1.0], ids=str)
def test_momentum_and_tracking(momentum, tracked):
    x, bn, *_ = bn_act_inputs(SMALL, torch.float32, momentum=momentum)
    if tracked == "untracked":
        bn = bn._replace(running_mean=None, running_var=None)
    if tracked != "tracked":
        bn = bn._replace(num_batches_tracked=None)
    ours = check_bn_act(x, bn)
    if tracked == "tracked":
        assert ours["num_batches_tracked 0"] == 4


@pytest.mark.parametrize("mean", [100.0, -1000.0])
@DENSE
def test_mean_much_larger_than_std(layout, mean):
    x = image((4, 65, 14, 14), torch.float32, layout, mean=mean)
    ours, running = functional.moments(x, backend="native"), (torch.zeros(65), torch.zeros(65))
    F.batch_norm(x, *running, training=True, momentum=1.0)
    count, (var, center) = x.numel() // 65, torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert ((ours[1] - var) / var).abs().max() < 1e-7 * abs(mean)
    assert_as_exact(ours[0], running[0], center, "mean", scale=var.sqrt().norm())
    assert_as_exact(ours[1], running[1] * ((count - 1) / count), var, "var")
    check_bn_act(x, batch_norm(65)._replace(running_mean=torch.full((65,), mean)), activation="identity")


@EVERY_LAYOUT
@EVERY_DTYPE
@pytest.mark.parametrize("channels", [1, 57, 65, 256])
def test_moments(channels, dtype, layout):
    def run(function, x):
        x = leaf(x, x.dtype)
        mean, var = function(x)
        grads = torch.autograd.grad([mean, var], x, [g.to(mean.dtype) for g in grad_out])
        return {"mean": mean, "var": var, "grad_x": grads[0]}

    def stock(x):
        x = x if x.dtype == torch.float64 else x.float()
        return torch.var_mean(x, (0, 2, 3), correction=0)[::-1]

    x, grad_out = image((3, channels, 5, 7), dtype, layout), torch.randn(2, channels)
    ours = run(lambda x: functional.moments(x, backend="native"), x)
    assert_all_as_exact(ours, run(stock, x), run(reference.moments, x.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("affine", ["", "w", "b", "wb"], ids=lambda a: a or "none")
def test_finalize(affine, dtype):
    def run(function, dtype, **options):
        own = copy_of(bn, dtype)
        inputs = {"mean": leaf(mean, dtype), "var": leaf(var, dtype), "weight": own.weight, "bias": own.bias}
        out = function(
            *inputs.values(), 1e-5, count=20, running_mean=own.running_mean, running_var=own.running_var,
            num_batches_tracked=own.num_batches_tracked, momentum=None, **options,
        )  # fmt: skip
        found = outcome(torch.stack(out), inputs, grad_out, [own])
        return found

    bn = batch_norm(9, dtype, affine=affine)
    mean, var, grad_out = torch.randn(9), torch.rand(9) + 0.5, torch.randn(2, 9)
    stock = run(reference.finalize, dtype)
    assert_all_as_exact(
        run(functional.finalize, dtype, backend="native"), stock, run(reference.finalize, torch.float64)
    )


@ACTIVATIONS
@EVERY_RESIDUAL
@EVERY_LAYOUT
@EVERY_DTYPE
def test_scale_shift_act(dtype, layout, residual, activation):
    def run(function, dtype, vector_dtype, **options):
        names = ("x", "scale", "shift", "residual", "residual_scale", "residual_shift")[:count]
        inputs = {n: leaf(t, dtype if t.dim() == 4 else vector_dtype) for n, t in zip(names, tensors, strict=False)}
        out = function(*inputs.values(), activation=activation, **options)
        return outcome(out, inputs, grad_out)

    def stock(x, scale, shift, residual=None, residual_scale=None, residual_shift=None, activation="relu"):
        z = (x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)
        if residual is not None:
            raw = residual_scale is not None
            z = z + (residual * residual_scale[:, None, None] + residual_shift[:, None, None] if raw else residual)
        return (z if activation == "identity" else F.relu(z)).to(x.dtype)

    x, r = image(SMALL, dtype, layout), image(SMALL, dtype, layout)
    tensors = (x, torch.randn(7), torch.randn(7), r, torch.randn(7), torch.randn(7))
    count = {"none": 3, "identity": 4, "raw": 6}[residual]
    vector = ops.accumulate_dtype(dtype)
    z = reference.scale_shift_act(*(t.double() for t in tensors[:count]), activation="identity")
    grad_out = gradient_for(z, dtype)
    ours = run(functional.scale_shift_act, dtype, vector, backend="native")
    exact = run(reference.scale_shift_act, torch.float64, torch.float64)
    assert_all_as_exact(ours, run(stock, dtype, vector), exact)


@EVERY_DTYPE
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((), ""), ((5,), ""), ((3, 65), ""), ((2, 3, 4, 5, 3), ""), *(((2, 3, 7, 5), layout) for layout in LAYOUTS)],
    ids=lambda v: v if isinstance(v, str) else f"{len(v)}d",
)
def test_add_relu(shape, layout, dtype):
    x, r = torch.randn(shape).to(dtype).add(0.5), torch.randn(shape).to(dtype)
    if layout:
        x = laid_out(x, layout)
    grad_out = gradient_for(x.double() + r, dtype)

    def run(function, dtype):
        inputs = {"x": leaf(x, dtype), "residual": leaf(r, dtype)}
        return outcome(function(*inputs.values()), inputs, grad_out)

    ours = run(lambda *inputs: functional.add_relu(*inputs, backend="native"), dtype)
    stock = run(lambda x, r: F.relu(x + r), dtype)
    assert_all_as_exact(ours, stock, run(reference.add_relu, torch.float64))


@EVERY_RESIDUAL
@pytest.mark.parametrize("kind", ["expanded", "channels_last", "permuted", "sliced"])
@DENSE
def test_incoming_gradient_in_another_layout(layout, kind, residual):
    args = bn_act_inputs(SMALL, torch.float32, layout, residual)
    grad_out = torch.rand(1, 7, 1, 1).expand(SMALL) if kind == "expanded" else laid_out(torch.randn(SMALL), kind)
    before = grad_out.clone()
    ours = run_bn_act(native_bn_act, *args, grad_out)
    expected = run_bn_act(native_bn_act, *args, grad_out.contiguous())
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert torch.equal(grad_out, before)


def test_strided_vectors():
    x, bn, *_ = bn_act_inputs(SMALL, torch.float32)
    room = {f: torch.full((7, 3), torch.nan) for f in ("running_mean", "running_var", "weight", "bias")}
    for field, wide in room.items():
        wide[:, 1] = getattr(bn, field)
    strided = bn._replace(**{field: wide[:, 1] for field, wide in room.items()})
    expected, bn = native_bn_act(x, bn), bn
    assert torch.equal(native_bn_act(x, strided), expected)
    assert torch.equal(strided.running_mean, bn.running_mean) and torch.equal(strided.running_var, bn.running_var)
    assert all(wide[:, ::2].isnan().all() for wide in room.values())


@TRAIN_EVAL
def test_zero_and_negative_gamma_and_tiny_variance(training):
    x, bn, *_ = bn_act_inputs(SMALL, torch.float32, training=training)
    bn = bn._replace(weight=torch.tensor([-1.5, 0.0, 1.0, -0.0, 2.0, -0.1, 1e-3]), running_var=torch.full((7,), 5e-45))
    ours = check_bn_act(x, bn)
    assert not ours["grad_x"][:, 1].any()


def specials(dtype):
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1.5, -1.5, 1e-30])
    return values.to(dtype).repeat(4).view(8, 2, 2, 1)


@TRAIN_EVAL
@EVERY_DTYPE
@DENSE
def test_special_values_propagate_as_stock(layout, dtype, training):
    x = torch.ones(9, 9, 1, 1, dtype=dtype) + torch.arange(9, dtype=dtype).view(9, 1, 1, 1)
    x[0, :8, 0, 0] = specials(dtype).flatten()[:8]
    bn = batch_norm(9, ops.accumulate_dtype(dtype), training=training)
    results = []
    for function in (native_bn_act, stock_bn_act):
        results.append(run_bn_act(function, laid_out(x, layout), bn, None, None, torch.ones_like(x)))
    for name, ours in results[0].items():
        stock = results[1][name]
        torch.testing.assert_close(ours, stock, equal_nan=True, rtol=2e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-4)


@EVERY_DTYPE
def test_relu_of_special_values(dtype):
    x = leaf(specials(dtype))
    for out in (
        functional.add_relu(x, torch.full_like(x, -0.0), backend="native"),
        functional.scale_shift_act(x, *ops_vectors(dtype), backend="native"),
    ):
        stock = F.relu(x)
        torch.testing.assert_close(out, stock, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(out.signbit() & (out == 0), stock.signbit() & (stock == 0))
        for create_graph in (False, True):
            grads = [torch.autograd.grad(o, x, x.detach(), True, create_graph)[0] for o in (out, stock)]
            torch.testing.assert_close(*grads, rtol=0, atol=0, equal_nan=True)


def ops_vectors(dtype):
    """The scale and shift that leave every value, and the sign of zero, as it is."""
    return torch.ones(2, dtype=ops.accumulate_dtype(dtype)), torch.full((2,), -0.0, dtype=ops.accumulate_dtype(dtype))


@TRAIN_EVAL
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
@EVERY_RESIDUAL
def test_empty_activations_as_stock(residual, shape, training):
    args = bn_act_inputs(shape, torch.float32, "contiguous", residual, training=training, momentum=None)
    results = [run_bn_act(f, *args, torch.empty(shape)) for f in (native_bn_act, stock_bn_act)]
    for name, ours in results[0].items():
        torch.testing.assert_close(
            ours, results[1][name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def everything(layout, dtype=torch.float32, shape=(4, 65, 40, 40)):
    """A call that reaches every kernel, and what it left behind."""
    torch.manual_seed(5)
    args = bn_act_inputs(shape, dtype, layout, "raw")
    identity = bn_act_inputs(shape, dtype, layout, "identity")
    grad_out = torch.randn(shape).to(dtype)
    first, second = run_bn_act(native_bn_act, *args, grad_out), run_bn_act(native_bn_act, *identity, grad_out)
    mean, var = functional.moments(args[0], backend="native")
    summed = functional.add_relu(args[0], args[2], backend="native")
    return [*first.values(), *second.values(), mean, var, summed]


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
    for ours, other in zip(everything(layout, dtype, SMALL), expected, strict=True):
        assert torch.equal(ours, other)


SIZES = st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9))


@hypothesis.settings(deadline=None, max_examples=40, derandomize=True)
@hypothesis.given(
    SIZES.filter(lambda s: s[0] * s[2] * s[3] > 3),
    st.sampled_from(list(DTYPES.values())),
    st.sampled_from(LAYOUTS),
    st.sampled_from(RESIDUALS),
    st.booleans(),
)
def test_any_shape(shape, dtype, layout, residual, training):
    torch.manual_seed(0)
    check_bn_act(*bn_act_inputs(shape, dtype, layout, residual, training=training))
