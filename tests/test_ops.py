"""The private operators of resfuse.ops: schemas, fakes, what they write, and nothing left unwritten."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from numerics import DENSE, FLOATS, image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from resfuse import ops

SHAPE = (2, 5, 3, 4)
# those of the convolutions serve channels_last float32 and bfloat16 on some processors: test_tiles and
# test_tile_engine have their cases
TILE_OPS = {
    "tile_kernels", "conv_stats", "conv_stats_backward", "conv_stats_backward_", "conv_act", "second_moments",
    "expand_bn_act_backward_weight", "expand_bn_act_backward_weight_", "expand_bn_act_backward_input",
    "folded_moments", "folded_weight", "folded_weight_backward", "pack_weight", "run_plan",
}  # fmt: skip
NAMES = [name for schema in ops.SCHEMAS if (name := schema.split("(")[0]) not in TILE_OPS]

pytestmark = pytest.mark.skipif(ops.missing_native["cpu"] is not None, reason=str(ops.missing_native["cpu"]))


class Case(NamedTuple):
    """One form of a call: the operator and its arguments, built for a dtype and a memory layout."""

    op: str
    form: str
    build: Callable


def vectors(dtype, count):
    return list(torch.rand(count, SHAPE[1], dtype=ops.accumulate_dtype(dtype)) + 0.5)


def images(dtype, layout, count):
    return [image(SHAPE, dtype, layout, mean=0) for _ in range(count)]


def residual_of(kind, dtype, layout):
    """residual, residual_scale, residual_shift"""
    if kind == "none":
        return [None] * 3
    return [*images(dtype, layout, 1), *(vectors(dtype, 2) if kind == "raw" else [None] * 2)]


def forward_case(op, kind, relu):
    return Case(
        op,
        f"{kind}-{'relu' if relu else 'identity'}",
        lambda d, m: [*images(d, m, 1), *vectors(d, 2), *residual_of(kind, d, m), relu],
    )


def reduce_case(form, raw, out, relu):
    def build(dtype, layout):
        others = [*images(dtype, layout, 1), *vectors(dtype, 3)] if raw else [None] * 4
        kept = images(dtype, layout, 1)[0].relu() if out else None
        return [*images(dtype, layout, 2), *vectors(dtype, 3), *others, kept, relu]

    return Case("scale_shift_act_backward_reduce", form, build)


def apply_cases(form, through, raw, raw_through, relu):
    def build(dtype, layout):
        own = vectors(dtype, 2) if through else [None] * 2
        others = [*images(dtype, layout, 1), *vectors(dtype, 3)] if raw else [None] * 4
        other_through = vectors(dtype, 2) if raw_through else [None] * 2
        return [*images(dtype, layout, 2), *vectors(dtype, 3), *own, *others, *other_through, relu]

    return [Case(f"scale_shift_act_backward_apply{suffix}", form, build) for suffix in ("", "_")]


def finalize_case(form, affine, tracked, momentum, count=24):
    def build(dtype, layout):
        statistics = [*(v.to(dtype) for v in vectors(dtype, 2)), torch.tensor(2)] if tracked else [None] * 3
        parameters = [v.to(dtype) if name in affine else None for name, v in zip("wb", vectors(dtype, 2), strict=True)]
        return [*vectors(dtype, 2), count, *parameters, *statistics, momentum, 1e-5]

    return Case("finalize", form, build)


WINDOW = ((3, 2), (2, 1), (1, 0))


def pooled(dtype, layout):
    """grad_out and indices beside an x of SHAPE."""
    x, v = images(dtype, layout, 1)[0], vectors(dtype, 2)
    out, indices = ops.scale_shift_relu_maxpool(x, *v, *WINDOW)
    return [torch.randn_like(out), indices]


def pool_cases(form, through):
    def build(dtype, layout):
        own = vectors(dtype, 2) if through else [None] * 2
        return [*pooled(dtype, layout), *images(dtype, layout, 1), *vectors(dtype, 3), *own, *WINDOW]

    return [Case(f"scale_shift_relu_maxpool_backward_apply{suffix}", form, build) for suffix in ("", "_")]


CASES = [
    Case("add_relu", "4d", lambda d, m: images(d, m, 2)),
    Case("add_relu", "2d", lambda d, m: [torch.randn(6, 7).to(d).T for _ in range(2)]),
    Case("add_relu_backward", "4d", lambda d, m: images(d, m, 2)),
    Case("moments", "4d", lambda d, m: images(d, m, 1)),
    Case("moments_backward", "4d", lambda d, m: [*vectors(d, 2), *images(d, m, 1), *vectors(d, 1)]),
    finalize_case("bare", "", False, None, 0),
    finalize_case("affine", "wb", False, 0.1),
    finalize_case("tracked", "wb", True, 0.1),
    finalize_case("cumulative", "w", True, None),
    finalize_case("tracked-empty", "b", True, 0.1, 0),
    Case("finalize_backward", "affine", lambda d, m: [*vectors(d, 3), vectors(d, 1)[0].to(d), 1e-5]),
    Case("finalize_backward", "bare", lambda d, m: [*vectors(d, 3), None, 1e-5]),
    *(
        forward_case(op, kind, relu)
        for op in ("scale_shift_act", "scale_shift_act_", "scale_shift_act_moments")
        for kind in ("none", "identity", "raw")
        for relu in (True, False)
    ),
    reduce_case("none-relu", False, False, True),
    reduce_case("none-identity", False, False, False),
    reduce_case("out-relu", False, True, True),
    reduce_case("out-identity", False, True, False),
    reduce_case("raw-relu", True, False, True),
    reduce_case("raw-identity", True, False, False),
    *apply_cases("frozen-relu", False, False, False, True),
    *apply_cases("moments-relu", True, False, False, True),
    *apply_cases("moments-identity", True, False, False, False),
    *apply_cases("raw-frozen-relu", False, True, False, True),
    *apply_cases("raw-moments-relu", True, True, True, True),
    *apply_cases("raw-own-moments", True, True, False, False),
    *apply_cases("raw-other-moments", False, True, True, True),
    Case("scale_shift_relu_maxpool", "4d", lambda d, m: [*images(d, m, 1), *vectors(d, 2), *WINDOW]),
    Case(
        "scale_shift_relu_maxpool_backward_reduce",
        "4d",
        lambda d, m: [*pooled(d, m), *images(d, m, 1), *vectors(d, 3), *WINDOW],
    ),
    *pool_cases("frozen", False),
    *pool_cases("moments", True),
]
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.form}")


def overload(case):
    return getattr(ops, case.op)


def outputs(result):
    return [result] if isinstance(result, torch.Tensor) else list(result or ())


def is_written(argument):
    return argument.alias_info is not None and argument.alias_info.is_write


def test_every_schema_has_a_fake_a_handle_and_a_case():
    assert set(NAMES) | TILE_OPS == set(ops._FAKES)
    assert set(NAMES) == {case.op for case in CASES}
    for name in ops._FAKES:
        assert getattr(ops, name) is getattr(torch.ops.resfuse, name).default
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"resfuse::{name}", "CPU")


def test_forms_reach_every_optional_argument():
    """Each argument that may be absent is absent in one case and present in another; each flag takes both values."""
    for name in NAMES:
        calls = [case.build(torch.float32, "contiguous") for case in CASES if case.op == name]
        for i, argument in enumerate(getattr(ops, name)._schema.arguments):
            if isinstance(argument.type, torch.OptionalType):
                assert {call[i] is None for call in calls} == {True, False}, (name, argument.name)
            if isinstance(argument.type, torch.BoolType):
                assert {call[i] for call in calls} == {True, False}, (name, argument.name)


@DENSE
@FLOATS
@EVERY_CASE
def test_opcheck(case, dtype, layout):
    opcheck(overload(case), tuple(case.build(dtype, layout)))


@DENSE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@EVERY_CASE
def test_fakes_agree_and_only_what_the_schema_names_is_written(case, dtype, layout, poisoned):
    args = case.build(dtype, layout)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    result = outputs(overload(case)(*args))
    for argument, now, then in zip(overload(case)._schema.arguments, args, before, strict=True):
        if isinstance(now, torch.Tensor) and not (is_written(argument) and case.form == "tracked-empty"):
            assert torch.equal(now, then) != is_written(argument), argument.name
    for tensor in result:
        assert tensor.isfinite().all(), "memory that was read or left unwritten"
        shared = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        assert tensor.numel() == 0 or tensor.untyped_storage().data_ptr() not in shared
    with FakeTensorMode() as mode:
        fakes = outputs(overload(case)(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in before]))
    for real, fake in zip(result, fakes, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("case", [case for case in CASES if case.op.endswith("_")], ids=lambda c: f"{c.op}-{c.form}")
def test_in_place_forms_give_the_bits_of_the_others(case):
    args = case.build(torch.bfloat16, "channels_last")
    expected = outputs(getattr(ops, case.op[:-1])(*args))
    written = [a for a, argument in zip(args, overload(case)._schema.arguments, strict=True) if is_written(argument)]
    assert overload(case)(*args) is None
    assert all(torch.equal(*pair) for pair in zip([a for a in written if a is not None], expected, strict=False))


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 5, 0, 4), (2, 0, 3, 4)], ids=str)
def test_empty_activations(shape):
    x, scale = torch.empty(shape), torch.rand(shape[1])
    assert ops.add_relu(x, x).shape == shape
    assert ops.scale_shift_act(x, scale, scale, x, scale, scale, True).shape == shape
    mean, var = ops.moments(x)
    assert mean.isnan().all() and var.isnan().all() and mean.shape == var.shape == shape[1:2]
    assert ops.moments_backward(mean, var, x, mean).shape == shape
    sums, dz = ops.scale_shift_act_backward_reduce(x, x, scale, scale, scale, None, None, None, None, x, True)
    assert torch.equal(sums, torch.zeros(2, shape[1])) and dz.shape == shape
    if shape[2] > 0:
        out, indices = ops.scale_shift_relu_maxpool(x, scale, scale, *WINDOW)
        assert out.shape == indices.shape == (*shape[:2], 2, 3)
        pair = (out, indices, x, scale, scale, scale)
        assert torch.equal(ops.scale_shift_relu_maxpool_backward_reduce(*pair, *WINDOW), torch.zeros(2, shape[1]))
        assert ops.scale_shift_relu_maxpool_backward_apply(*pair, scale, scale, *WINDOW).shape == shape
    through = ops.scale_shift_act_backward_apply(x, x, scale, scale, scale, scale, scale, *[None] * 6, True)
    assert through[0].shape == shape and through[1].shape == (0,)


def pool_backward(x, v, *, indices=torch.uint8, size=2, order=torch.contiguous_format):
    grad = torch.zeros(2, 5, size, 2).contiguous(memory_format=order)
    chosen = torch.zeros_like(grad, dtype=indices)
    return ops.scale_shift_relu_maxpool_backward_reduce(grad, chosen, x, v, v, v, 3, 2, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, v: ops.add_relu(x, x.bfloat16()), "residual must have the first tensor's dtype"),
        (lambda x, v: ops.add_relu(x, x[:1]), "residual must have the first tensor's shape"),
        (lambda x, v: ops.add_relu(x, x.to(memory_format=torch.channels_last)), "shape and strides"),
        (lambda x, v: ops.add_relu(x[..., ::2], x[..., ::2]), "dense"),
        (lambda x, v: ops.add_relu(x.int(), x.int()), "dtype must be float16"),
        (lambda x, v: ops.moments(x[..., ::2]), "dense, contiguous or channels_last"),
        (lambda x, v: ops.moments(x[0]), r"\(N, C, H, W\), got 3"),
        (lambda x, v: ops.scale_shift_act(x, v[:2], v, None, None, None, True), "scale must be contiguous of shape"),
        (lambda x, v: ops.scale_shift_act(x, v, v.double(), None, None, None, True), "shift has the wrong dtype"),
        (lambda x, v: ops.scale_shift_act(x, v, v, None, v, v, True), "come together, with a residual"),
        (lambda x, v: ops.scale_shift_act(x, v, v, x, v, None, True), "come together, with a residual"),
        (
            lambda x, v: ops.scale_shift_act_backward_reduce(x, x, v, v, v, x, v, v, None, None, True),
            "come with a raw residual",
        ),
        (
            lambda x, v: ops.scale_shift_act_backward_apply(x, x, v, v, v, None, None, x, v, None, v, None, None, True),
            "come with a raw residual",
        ),
        (lambda x, v: ops.finalize(v, v, 2, v[:2], None, None, None, None, 0.1, 1e-5), "weight must be a CPU tensor"),
        (lambda x, v: ops.scale_shift_relu_maxpool(x, v, v, 3, 2, 2), "padding at most half"),
        (lambda x, v: ops.scale_shift_relu_maxpool(x, v, v, 5, 1, 0), "must not exceed the padded input"),
        (lambda x, v: ops.scale_shift_relu_maxpool(x, v, v, 3, 0, 1), "stride must be positive"),
        (lambda x, v: ops.scale_shift_relu_maxpool(x, v, v, (17, 16), 1, (8, 8)), "at most 256 positions"),
        (lambda x, v: pool_backward(x, v, indices=torch.float32), "indices has the wrong dtype"),
        (lambda x, v: pool_backward(x, v, size=3), "grad_out must have the pooled shape"),
        (lambda x, v: pool_backward(x, v, order=torch.channels_last), "grad_out must have x's memory order"),
        (
            lambda x, v: ops.finalize(v, v, 2, v, v, v.clone(), v.clone(), torch.zeros(1), 0.1, 1e-5),
            "num_batches_tracked must be one int64",
        ),
    ],
)
def test_kernels_refuse_what_would_be_unsafe(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(SHAPE), torch.rand(SHAPE[1]))


def every_16_bit_value(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def assert_same_values(ours, expected):
    """Equal bits, except that any NaN is as good as another."""
    nan = expected.isnan()
    assert torch.equal(ours.isnan(), nan)
    integer = {2: torch.int16, 4: torch.int32}[ours.element_size()]
    assert torch.equal(ours.view(integer)[~nan], expected.view(integer)[~nan])


@pytest.mark.parametrize("shape", [(1, 1, 256, 256), (256, 256, 1, 1), (8, 64, 1, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_value_loads_and_stores_as_itself(dtype, shape):
    x, one = every_16_bit_value(dtype).view(shape), torch.ones(shape[1])
    for layout in (torch.contiguous_format, torch.channels_last):
        out = ops.scale_shift_act(x.contiguous(memory_format=layout), one, one * -0.0, None, None, None, False)
        assert_same_values(out.flatten(), x.flatten())


def edges(dtype):
    """float32 values where conversion to `dtype` may go wrong: halfway between neighbours, and beside."""
    values = every_16_bit_value(dtype).float().sort().values
    values = values[values.isfinite()]
    bits = ((values[1:].double() + values[:-1].double()) / 2).float().view(torch.int32)
    largest = torch.tensor(
        [3.4e38, -3.4e38, 65519.99, 65520.0, 65536.0, 1e-45, -1e-45, torch.inf, -torch.inf, torch.nan]
    )
    return torch.cat([*(v.view(torch.float32) for v in (bits, bits + 1, bits - 1)), values, largest])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_stores_round_as_torch_does(dtype):
    anything = torch.randint(-(2**31), 2**31, (2**18,)).to(torch.int32).view(torch.float32)
    values = torch.cat([edges(dtype), anything, torch.randn(2**16), torch.randn(2**16) * 1e-6])
    ones = torch.ones(1, len(values), 1, 1, dtype=dtype)  # 1 * value - 0 is value
    out = ops.scale_shift_act(ones, values, torch.full_like(values, -0.0), None, None, None, False)
    assert_same_values(out.flatten(), values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_are_rounded_once(dtype):
    x = every_16_bit_value(dtype)
    residual = x[torch.randperm(len(x))]
    expected = torch.relu(x.float() + residual.float()).to(dtype)
    out = ops.add_relu(x, residual)
    assert_same_values(out, expected)


@DENSE
@FLOATS
@pytest.mark.parametrize("kind", ["none", "identity", "raw"])
@pytest.mark.parametrize("shape", [(3, 65, 9, 7), (40, 3, 1, 1), (2, 256, 20, 20)], ids=str)
def test_fused_moments_are_those_of_the_stored_output(shape, kind, dtype, layout):
    x, r = image(shape, dtype, layout), image(shape, dtype, layout)
    v = torch.rand(4, shape[1])
    rest = {"none": (None, None, None), "identity": (r, None, None), "raw": (r, v[2], v[3])}[kind]
    out, mean, var = ops.scale_shift_act_moments(x, v[0], v[1], *rest, True)
    assert torch.equal(out, ops.scale_shift_act(x, v[0], v[1], *rest, True))
    assert all(torch.equal(a, b) for a, b in zip((mean, var), ops.moments(out), strict=True))
