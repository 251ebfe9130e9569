"""Every CUDA kernel beside the CPU's, thread by thread: shapes, layouts, dtypes, alignment, errors.

Run by test_cuda_on_host through plugin.py. Both sides compute the same formulas without contraction: element by element
they agree to the bit, and a reduction is as close to that in float64 as the rule of numerics demands.
"""

import pytest
import test_ops
import torch
from numerics import DTYPES, assert_as_exact
from plugin import cpu, launches

from resfuse import ops

CASES = [case for case in test_ops.CASES if case.op in cpu]
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.form}")
REDUCTIONS = {  # operators with outputs that are sums: which
    "moments": {0, 1},
    "scale_shift_act_moments": {1, 2},
    "scale_shift_act_backward_reduce": {0},
    "scale_shift_relu_maxpool_backward_reduce": {0},
}
WINDOW = ((3, 3), (2, 2), (1, 1))  # fits into one pixel too
LAYOUTS = ("contiguous", "channels_last")
SHAPES = [
    *(((2, 5, 3, 4), dtype, layout) for dtype in DTYPES for layout in LAYOUTS),
    # whole vectors, of channels and of a plane
    *(((2, 64, 7, 7), dtype, "channels_last") for dtype in DTYPES),
    *(((3, 5, 8, 16), dtype, "contiguous") for dtype in DTYPES),
    # one channel, one pixel, a block's columns and some more, more than a block has threads
    ((2, 1, 7, 7), "bfloat16", "contiguous"),
    ((3, 3, 1, 1), "float32", "channels_last"),
    ((1, 57, 7, 7), "float16", "channels_last"),
    ((1, 57, 7, 7), "float32", "contiguous"),
    ((1, 65, 7, 7), "bfloat16", "channels_last"),
    ((1, 65, 7, 7), "float64", "contiguous"),
    ((1, 1000, 2, 1), "bfloat16", "channels_last"),
    ((1, 2048, 2, 1), "float32", "channels_last"),
    # several rounds of a loop
    ((1, 24, 40, 40), "bfloat16", "channels_last"),
    ((9, 2, 32, 32), "bfloat16", "contiguous"),
]


def clones(args):
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in args]


def run(name, operator, args):
    """Everything a call returns or writes."""
    schema = cpu[name]._schema.arguments
    written = [a for a, s in zip(args, schema, strict=True) if a is not None and test_ops.is_written(s)]
    return [*test_ops.outputs(operator(*args)), *written]


def check(name, args, moved=None):
    """The CUDA kernel beside the CPU's on copies of `args`; moved: the same values elsewhere in memory."""
    expected = run(name, cpu[name], clones(args))
    ours = run(name, getattr(ops, name), clones(args) if moved is None else moved)
    exact = [None] * len(ours)
    if name in REDUCTIONS:
        floating = [isinstance(a, torch.Tensor) and a.is_floating_point() for a in args]
        exact = run(name, cpu[name], [a.double() if f else a for a, f in zip(args, floating, strict=True)])
    for i, (mine, theirs, right) in enumerate(zip(ours, expected, exact, strict=True)):
        assert (mine.shape, mine.dtype, mine.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
        if i in REDUCTIONS.get(name, ()):
            assert_as_exact(mine, theirs, right, f"output {i}")
        else:
            assert torch.equal(mine, theirs), f"output {i} has other bits"


def test_every_unit_of_the_cpu_has_a_cuda_kernel():
    assert set(cpu) == set(ops._FAKES) - test_ops.TILE_OPS


@pytest.mark.parametrize(("shape", "dtype", "layout"), SHAPES, ids=str)
@EVERY_CASE
def test_agrees_with_the_cpu(case, shape, dtype, layout, monkeypatch, poisoned):
    monkeypatch.setattr(test_ops, "SHAPE", shape)
    monkeypatch.setattr(test_ops, "WINDOW", WINDOW)
    check(case.op, case.build(DTYPES[dtype], layout))


def displaced(tensor):
    """A copy that begins one element behind an aligned address."""
    room = tensor.new_full((tensor.numel() + 1,), float("nan") if tensor.is_floating_point() else 255)
    return room[1:].as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)


@EVERY_CASE
def test_unaligned_memory(case, monkeypatch, poisoned):
    """One argument at a time lies where 16 bytes at once would be refused."""
    monkeypatch.setattr(test_ops, "SHAPE", (2, 16, 4, 4))
    args = case.build(torch.bfloat16, "channels_last")
    for i, argument in enumerate(args):
        if isinstance(argument, torch.Tensor):
            moved = clones(args)
            moved[i] = displaced(argument)
            assert moved[i].data_ptr() % 16 != 0
            check(case.op, args, moved)


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 5, 0, 4), (2, 0, 3, 4)], ids=str)
def test_empty_activations(shape, monkeypatch):
    test_ops.test_empty_activations(shape)


@pytest.mark.parametrize("momentum", [None, 0.1], ids=["cumulative", "moving"])
@pytest.mark.parametrize("channels", [0, 1, 1000])
def test_running_statistics_are_counted_once(channels, momentum):
    """By several blocks, or by one that reads the counter which it increments; also where there is no channel."""
    mean, var, batches = torch.randn(channels), torch.rand(channels), torch.tensor(3)
    running = torch.zeros(channels), torch.ones(channels)
    ops.finalize(mean, var, 10, None, None, *running, batches, momentum, 1e-5)
    factor = 0.25 if momentum is None else momentum
    assert batches == 4
    torch.testing.assert_close(running[0], factor * mean)
    torch.testing.assert_close(running[1], 1 - factor + factor * var * 10 / 9)


def a_call(x, **changes):
    """Arguments of scale_shift_act_backward_apply with a raw residual; changes by name."""
    vector = torch.rand(x.shape[1])
    names = [a.name for a in cpu["scale_shift_act_backward_apply"]._schema.arguments]
    given = {"grad_out": x, "x": x, "raw_residual": x, "relu": True}
    return [{**given, **changes}.get(n, None if "grad_mean" in n or "grad_var" in n else vector) for n in names]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, v: ops.moments(x[0]), r"\(N, C, H, W\), got 3"),
        (lambda x, v: ops.moments(x[..., ::2]), "dense, contiguous or channels_last"),
        (lambda x, v: ops.add_relu(x.int(), x.int()), "dtype must be float16"),
        (lambda x, v: ops.add_relu(x, x[:1]), "residual must have the first tensor's shape"),
        (lambda x, v: ops.scale_shift_act(x, v[:2], v, None, None, None, True), "scale must be contiguous of shape"),
        (lambda x, v: ops.scale_shift_act(x, v, v.double(), None, None, None, True), "shift has the wrong dtype"),
        (lambda x, v: ops.scale_shift_act(x, v, v, x, v, None, True), "come together, with a residual"),
        (lambda x, v: ops.scale_shift_act_backward_apply(*a_call(x, grad_out=x[:1])), "grad_out must have the first"),
        (lambda x, v: ops.scale_shift_act_backward_apply(*a_call(x, residual_mean=None)), "come with a raw residual"),
        (lambda x, v: ops.finalize(v, v, 2, v[:2], None, None, None, None, 0.1, 1e-5), "weight must be of shape"),
        (lambda x, v: ops.finalize(v, v, 2, v, v, v, v, torch.zeros(1), 0.1, 1e-5), "must be one int64"),
        (lambda x, v: ops.scale_shift_relu_maxpool(x, v, v, 3, 2, 2), "padding at most half"),
        (lambda x, v: test_ops.pool_backward(x, v, size=3), "grad_out must have the pooled shape"),
    ],
)
def test_kernels_refuse_what_would_be_unsafe(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(test_ops.SHAPE), torch.rand(test_ops.SHAPE[1]))


def test_a_failed_launch_names_its_kernel():
    x = torch.randn(test_ops.SHAPE)
    launches.cuda_on_host_fail_next_launch()
    with pytest.raises(RuntimeError, match="launching moments failed: invalid configuration argument"):
        ops.moments(x)
    assert ops.moments(x)[0].isfinite().all()
