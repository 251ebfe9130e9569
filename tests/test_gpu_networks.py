"""Blocks and whole networks on a GPU: those tests of the CPU that cuDNN's convolutions can run, and training as there:
mixed precision, CUDA graphs, torch.compile, several streams, and never waiting for the device."""

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_all_as_exact, image, judged, step
from test_contract import (
    test_backward_twice_over_a_retained_graph,  # noqa: F401
    test_double_backward,  # noqa: F401
    test_func_transforms_in_eval,  # noqa: F401
    test_modes,  # noqa: F401
)
from test_cuda_dispatch import Calls
from test_fused_stem import test_a_fused_stem_equals_stock, test_any_other_pool_is_called  # noqa: F401
from test_fusion import (
    build,
    networks,
    test_eval_is_as_exact_as_stock,  # noqa: F401
    test_training_step_under_autocast,  # noqa: F401
    without_ties,
)
from torch import nn

import resfuse
from resfuse import models

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu")]
CHANNELS_LAST = torch.channels_last


@networks("resnet18", "resnet50")
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
def test_a_training_step_is_as_exact_as_stock(name, layout):
    stock = build(name).to(memory_format=layout)
    exact, fused = copy.deepcopy(stock).double(), resfuse.fuse(copy.deepcopy(stock), backend="native", strict=True)
    x, target = without_ties(exact, (8, 3, 16, 16)).to(memory_format=layout), torch.randint(10, (8,))
    results = [step(model, x, target=target) for model in (fused, stock)]
    wanted = step(exact, x.double(), target=target)
    assert_all_as_exact(*(judged(result, wanted) for result in (*results, wanted)))


def network():
    """A small network of both kinds of block, with projections and a pooled stem."""
    model = models.ResNet(models.Bottleneck, [2, 1, 1, 1], num_classes=10)
    return resfuse.fuse(model.to(memory_format=CHANNELS_LAST), backend="native", strict=True)


def images(batch=8, size=64):
    return image((batch, 3, size, size), layout="channels_last"), torch.arange(batch) % 10


def trainer(model, x, target, dtype=torch.bfloat16):
    """A whole training step on tensors that stay where they are."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def run():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            out = model(x)
        F.cross_entropy(out.float(), target).backward()
        optimizer.step()

    return run


def state(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_graph_of_a_step_replays_what_eager_computes(dtype):
    model, batches = network(), [images()[0] for _ in range(3)]
    twin, target = copy.deepcopy(model), images()[1]
    x = batches[0].clone(memory_format=CHANNELS_LAST)
    run, stream = trainer(model, x, target, dtype), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for batch in batches[1:]:
        x.copy_(batch)
        graph.replay()
    x.copy_(batches[0])
    eager = trainer(twin, x, target, dtype)
    for batch in (*[batches[0]] * 3, *batches[1:]):
        x.copy_(batch)
        eager()
    assert model.bn1.num_batches_tracked == 5
    assert_equal_states(state(model), state(twin))


def test_two_runs_give_the_same_bits():
    model, found = network(), []
    for _ in range(2):
        twin = copy.deepcopy(model)
        torch.manual_seed(1)
        run = trainer(twin, *images())
        for _ in range(3):
            run()
        found.append(state(twin))
    assert_equal_states(*found)


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_a_step_never_waits_for_the_gpu(momentum):
    model = network()
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.momentum = momentum
    run = trainer(model, *images())
    run()  # cuDNN and the optimizer set themselves up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        with torch.no_grad():
            model.eval()(images()[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_runs_on_the_current_stream():
    """Everything before it in that stream has happened, although the stream began with a long wait."""
    model = network()
    other, (x, target) = copy.deepcopy(model), images()
    trainer(other, x, target)()
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        trainer(model, late, target)()
    stream.synchronize()
    assert_equal_states(state(model), state(other))


def test_float16_trains_with_a_grad_scaler():
    model, (x, target) = network(), images(16)
    scaler, optimizer = torch.amp.GradScaler("cuda"), torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    losses = []
    for _ in range(10):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(x), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch.compile needs Triton on a GPU")
def test_a_compiled_network_trains_as_exactly_as_stock():
    """In CUDA graphs, which torch.compile records in the second call and replays in the third."""
    torch._dynamo.reset()
    stock = models.ResNet(models.BasicBlock, [1, 1, 1, 1], num_classes=10).to(memory_format=CHANNELS_LAST)
    exact, fused = copy.deepcopy(stock).double(), resfuse.fuse(copy.deepcopy(stock), backend="native", strict=True)
    x, target = without_ties(exact, (8, 3, 16, 16)).contiguous(memory_format=CHANNELS_LAST), torch.randint(10, (8,))
    call = torch.compile(fused, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        ours, theirs = step(fused, x, call=call, target=target), step(stock, x, target=target)
        wanted = step(exact, x.double(), target=target)
        assert_all_as_exact(*(judged(result, wanted) for result in (ours, theirs, wanted)))


def test_a_fused_network_calls_the_units():
    run = trainer(network(), *images())
    with Calls() as calls:
        run()
    assert calls.ours()["scale_shift_act"] == calls.ours()["scale_shift_act_backward_apply_"] == 15
    assert calls.ours()["scale_shift_relu_maxpool"] == 1
    assert not [name for name in calls.of if "batch_norm" in name or "max_pool" in name]


def test_explain_says_that_torch_convolves():
    blocks = resfuse.explain(network()).blocks
    assert all(block.fused for block in blocks)
    assert "no convolution kernels for cuda" in blocks[1].convolutions
