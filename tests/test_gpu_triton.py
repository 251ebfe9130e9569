"""Triton's kernels on a GPU: the tests of the native units, asked of the overloads `.triton`, and what a GPU adds."""

import pytest
import test_ops
import torch
from numerics import DENSE, EVERY_DTYPE, RESIDUALS, assert_as_exact, image
from test_gpu import moved, results_of
from test_ops import CASES, is_written, outputs
from test_units import (
    bn_act_inputs,
    check_bn_act,
    test_bn_act,  # noqa: F401  the tests themselves, and those below
    test_empty_activations_as_stock,  # noqa: F401
    test_finalize,  # noqa: F401
    test_low_precision_statistics,  # noqa: F401
    test_mean_much_larger_than_std,  # noqa: F401
    test_momentum_and_tracking,  # noqa: F401
    test_relu_of_special_values,  # noqa: F401
    test_special_values_propagate_as_stock,  # noqa: F401
    test_strided_vectors,  # noqa: F401
    test_zero_and_negative_gamma_and_tiny_variance,  # noqa: F401
)

import resfuse
from resfuse import functional, models, ops

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu_with_triton", "native_is_triton")]


def results_of_triton(case, args):
    operator = getattr(ops.of("triton"), case.op)
    found = outputs(operator(*args))
    written = [a for a, s in zip(args, operator._schema.arguments, strict=True) if is_written(s)]
    return [t.cpu() for t in [*found, *written] if t is not None]


@pytest.fixture
def cpu_operators(monkeypatch):
    """The handles of resfuse.ops are the C++ ones again: what is compared with."""
    for case in CASES:
        monkeypatch.setattr(ops, case.op, getattr(torch.ops.resfuse, case.op).default)


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (3, 65, 9, 9)], ids=["small", "odd"])
@DENSE
@EVERY_DTYPE
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.form}")
def test_operators_are_as_exact_as_on_the_cpu(case, dtype, layout, shape, poisoned, cpu_operators, monkeypatch):
    monkeypatch.setattr(test_ops, "SHAPE", shape)
    with torch.device("cpu"):
        args = case.build(dtype, layout)
    ours, theirs = results_of_triton(case, moved(args, "cuda")), results_of(case, moved(args, "cpu"))
    exact = results_of(case, moved(args, "cpu", torch.float64))
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert mine.stride() == other.stride()
        if mine.is_floating_point():
            assert_as_exact(mine, other, truth)
        else:
            assert torch.equal(mine, other)


@pytest.mark.parametrize("residual", RESIDUALS)
@DENSE
@EVERY_DTYPE
def test_bn_act_of_many_slabs(dtype, layout, residual):
    check_bn_act(*bn_act_inputs((33, 129, 57, 57), dtype, layout, residual))


@EVERY_DTYPE
def test_large_reductions_have_one_order(dtype):
    x = image((64, 96, 56, 56), dtype, "channels_last")
    found = [functional.moments(x, backend="triton") for _ in range(3)]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def two_billion_elements():
    """An image in bfloat16, and a batch of more than 2^31 elements that repeats it."""
    shape = (2**31 // (64 * 256 * 256) + 1, 64, 256, 256)
    size = 2 * torch.Size(shape).numel()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 3 * size:
        pytest.skip(f"needs {3 * size / 1e9:.0f} GB of free GPU memory")
    first = image((1, *shape[1:]), torch.bfloat16, "channels_last")
    return first, torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last).copy_(first)


def test_beyond_two_billion_elements():
    first, big = two_billion_elements()
    out, expected = (functional.add_relu(t, t, backend="triton") for t in (big, first))
    assert all(torch.equal(part, expected.expand_as(part)) for part in out.split(64))
    torch.testing.assert_close(
        functional.moments(big, backend="triton"), functional.moments(first, backend="triton"), rtol=1e-5, atol=1e-5
    )


def test_a_step_is_captured_in_a_cuda_graph():
    """Nothing waits for the host, and a replay gives the bits of the step."""
    model = resfuse.fuse(models.CifarResNet(8).to(memory_format=torch.channels_last), backend="triton", strict=True)
    x = image((8, 3, 32, 32), layout="channels_last")

    def step():
        model.zero_grad()
        model(x).square().mean().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    expected = [p.grad.clone() for p in model.parameters()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_compiled_and_eager_agree(autocast):
    model = resfuse.fuse(models.CifarResNet(8).to(memory_format=torch.channels_last), backend="triton", strict=True)
    x = image((8, 3, 32, 32), layout="channels_last")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        ours, theirs = compiled(x), model(x)
    torch.testing.assert_close(ours, theirs, rtol=2e-2 if autocast else 1e-4, atol=2e-2 if autocast else 1e-4)
