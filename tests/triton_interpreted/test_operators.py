"""Triton's operators one by one in the interpreter: as exact as the C++ ones, and nothing left unwritten."""

import pytest
import torch
from numerics import assert_as_exact
from test_ops import CASES, EVERY_CASE, is_written, outputs, overload
from torch.library import opcheck

from resfuse import ops
from resfuse._triton import LAUNCHERS

FORMS = pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, "contiguous"), (torch.float16, "channels_last"), (torch.float64, "channels_last")],
    ids=["float32-contiguous", "float16-channels_last", "float64-channels_last"],
)


def of_triton(case):
    return getattr(ops.of("triton"), case.op)


def results_of(operator, args, dtype=None):
    """What a call returns and what it writes, on copies of its arguments, in another dtype if one is given."""
    copies = [
        a.to(dtype if dtype and a.is_floating_point() else a.dtype, copy=True) if isinstance(a, torch.Tensor) else a
        for a in args
    ]
    found = outputs(operator(*copies))
    written = [a for a, s in zip(copies, operator._schema.arguments, strict=True) if is_written(s)]
    return [t for t in [*found, *written] if t is not None]


@FORMS
@EVERY_CASE
def test_as_exact_as_the_cpus(case, dtype, layout, poisoned):
    args = case.build(dtype, layout)
    ours, theirs = results_of(of_triton(case), args), results_of(overload(case), args)
    exact = results_of(overload(case), args, torch.float64)
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert mine.stride() == other.stride()
        if mine.is_floating_point():
            assert_as_exact(mine, other, truth)
        else:
            assert torch.equal(mine, other)


@pytest.mark.parametrize("op", sorted({case.op for case in CASES}))
def test_opcheck(op):
    case = next(case for case in reversed(CASES) if case.op == op)
    opcheck(of_triton(case), tuple(case.build(torch.float32, "channels_last")), test_utils="test_schema")
    opcheck(of_triton(case), tuple(case.build(torch.float32, "contiguous")), test_utils="test_faketensor")


def test_every_unit_of_the_native_libraries_has_launchers():
    assert {case.op for case in CASES} <= LAUNCHERS.keys()
    for name in LAUNCHERS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"resfuse::{name}.triton", "CPU")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k, x, v: k.moments(x[..., ::2]), "contiguous or channels_last"),
        (lambda k, x, v: k.scale_shift_act(x, v, v, x[:1], None, None, True), "shape and strides"),
        (lambda k, x, v: k.scale_shift_act(x, v, v, x.double(), None, None, True), "dtype and device"),
        (lambda k, x, v: k.add_relu(x, x[:1]), "shape and strides"),
        (lambda k, x, v: k.add_relu(x[..., ::2], x[..., ::2]), "shape and strides"),
        (lambda k, x, v: k.scale_shift_act(x, v[:2], v, None, None, None, True), "scale must be contiguous of shape"),
        (lambda k, x, v: k.scale_shift_act(x, v.half(), v, None, None, None, True), "scale must be torch.float32"),
        (lambda k, x, v: k.scale_shift_act(x, v, v, x, v, v[:1].expand(5), True), "residual_shift must be"),
        (lambda k, x, v: k.moments_backward(v, v[0], x, v), "grad_var must be contiguous of shape"),
        (lambda k, x, v: k.scale_shift_relu_maxpool(x, v, v[1:], [3, 3], [2, 2], [1, 1]), "shift must be"),
        (lambda k, x, v: k.scale_shift_act_backward_reduce(x, x, v, v, v[:3], *[None] * 5, True), "mean must be"),
        (lambda k, x, v: k.scale_shift_act_backward_apply(x, x, v, v, v, v[:3], v, *[None] * 6, True), "grad_mean"),
        (lambda k, x, v: k.finalize(v, v, 2, v[:2], None, None, None, None, 0.1, 1e-5), "weight must be of shape"),
        (lambda k, x, v: k.scale_shift_relu_maxpool(x, v, v, [3, 3], [2, 2], [2, 2]), "no pool has"),
        (lambda k, x, v: k.scale_shift_act_moments(x[:0], v, v, None, None, None, True), "no moments"),
    ],
)
def test_launchers_refuse_what_would_be_unsafe(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(ops.of("triton"), torch.randn(2, 5, 4, 6), torch.rand(5))
