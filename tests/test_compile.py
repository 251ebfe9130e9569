"""Fused networks under torch.compile (whole graphs, no recompiles, the numbers of eager) and under graph tracers."""

import copy
import importlib
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from numerics import assert_as_exact, batch_norm, copy_of, image, leaf, outcome, step
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import resfuse
from resfuse import functional, models
from resfuse.bench.peers import import_torchvision

FUSED_OPS = {"resfuse::moments", "resfuse::scale_shift_act"}  # finalize updates in place: it is functionalised


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Recorder:
    """A compiler that runs graphs as they are, and keeps the operators of each and the number of runs.

    As a backend it is aot_eager: Dynamo, autograd and functionalisation, without code generation.
    """

    def __init__(self):
        self.forward, self.backward, self.runs = [], [], 0
        self.backend = aot_autograd(
            fw_compiler=partial(self._compile, self.forward),
            bw_compiler=partial(self._compile, self.backward),
            inference_compiler=partial(self._compile, self.forward),
        )

    def _compile(self, graphs, module, _):
        graphs.append({n.target.name().split(".")[0] for n in module.graph.nodes if hasattr(n.target, "_schema")})

        def run(*arguments):
            self.runs += 1
            return module(*arguments)

        return make_boxed_func(run)


@pytest.fixture
def recorder():
    return Recorder()


@torch.no_grad()
def network():
    """A small stock network, normalisations away from their initial values: a projection, a grouped convolution."""
    shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
    blocks = models.BasicBlock(8, 8), models.BasicBlock(8, 16, 2, shortcut), models.Bottleneck(16, 4, groups=2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *blocks)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and not name.startswith("0."):
            parameter.uniform_(0.5, 1.5)
    return model


def assert_same(compiled, eager, exact, **options):
    for name in exact:
        assert_as_exact(compiled[name], eager[name], exact[name], name, **options)


def three():
    """A fused network to compile, one to run eagerly, and a stock one in float64, with the same state."""
    stock = network()
    return resfuse.fuse(copy.deepcopy(stock)), resfuse.fuse(copy.deepcopy(stock)), stock.double()


def test_a_training_step_is_one_graph_with_the_numbers_of_eager(recorder):
    model, eager, exact = three()
    compiled = torch.compile(model, fullgraph=True, backend=recorder.backend)
    for i in range(2):
        x = torch.randn(3, 3, 12, 12)
        assert_same(step(model, x, call=compiled), step(eager, x), step(exact, x.double()))
        assert recorder.runs == 2 * (i + 1)
    assert len(recorder.forward) == len(recorder.backward) == 1
    assert recorder.forward[0] >= FUSED_OPS
    assert not [name for name in recorder.forward[0] if "batch_norm" in name or "relu" in name]
    assert {"resfuse::scale_shift_act_backward_reduce", "resfuse::finalize_backward"} <= recorder.backward[0]
    counters = [b.item() for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counters and set(counters) == {2}


@pytest.mark.parametrize(
    ("how", "layout"),
    [("dynamic=True", torch.channels_last), ("mark_dynamic", torch.contiguous_format)],
    ids=["dynamic-channels_last", "mark_dynamic-contiguous"],
)
def test_a_second_batch_size_does_not_recompile(recorder, how, layout):
    model, eager, exact = three()
    options = {"dynamic": True} if how == "dynamic=True" else {}
    compiled = torch.compile(model, fullgraph=True, backend=recorder.backend, **options)

    def call(x):
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(x, 0)
        return compiled(x)

    for batch in (4, 3, 6):
        x = torch.randn(batch, 3, 12, 12).contiguous(memory_format=layout)
        assert_same(step(model, x, call=call), step(eager, x), step(exact, x.double()))
    assert len(recorder.forward) == len(recorder.backward) == 1
    assert recorder.runs == 6


def test_automatic_dynamic_shapes_settle(recorder):
    model = resfuse.fuse(network())
    compiled = torch.compile(model, fullgraph=True, backend=recorder.backend)
    for batch in (4, 3, 6, 5):
        step(model, torch.randn(batch, 3, 12, 12), call=compiled)
    assert len(recorder.forward) <= 2


def test_eval_and_a_whole_network(recorder):
    stock = models.CifarResNet(8).eval()
    model, exact = resfuse.fuse(copy.deepcopy(stock)), copy.deepcopy(stock).double()
    compiled = torch.compile(model, fullgraph=True, backend=recorder.backend, dynamic=True)
    for batch in (2, 3):
        x = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            assert_as_exact(compiled(x), stock(x), exact(x.double()))
    assert recorder.runs == 2 and len(recorder.forward) == 1
    assert "resfuse::scale_shift_act" in recorder.forward[0] and "resfuse::moments" not in recorder.forward[0]


def test_switching_to_eval_and_back_recompiles_once(recorder):
    model, eager, exact = three()
    compiled = torch.compile(model, fullgraph=True, backend=recorder.backend)
    for training in (True, False, True, False):
        x = torch.randn(3, 3, 12, 12)
        for module in (model, eager, exact):
            module.train(training)
        assert_same(step(model, x, call=compiled), step(eager, x), step(exact, x.double()))
    assert len(recorder.forward) == 2 and recorder.runs == 8


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3], ids=["cumulative", "0", "0.3"])
def test_running_statistics_with_every_momentum(recorder, momentum):
    stock = models.BasicBlock(4, 4)
    for bn in (stock.bn1, stock.bn2):
        bn.momentum = momentum
    model, exact = resfuse.fuse(copy.deepcopy(stock)), copy.deepcopy(stock).double()
    compiled = torch.compile(model, fullgraph=True, backend=recorder.backend)
    for _ in range(3):
        x = torch.randn(2, 4, 5, 5) + 1
        compiled(x), stock(x), exact(x.double())
    for (name, ours), theirs, wanted in zip(model.named_buffers(), stock.buffers(), exact.buffers(), strict=True):
        assert_as_exact(ours, theirs, wanted, name)
    assert len(recorder.forward) == 1 and recorder.runs == 3


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bn_act_compiles_whole(recorder, training, residual):
    compiled = torch.compile(functional.bn_act, fullgraph=True, backend=recorder.backend, dynamic=True)
    for batch in (4, 3):
        x, bn = image((batch, 5, 6, 7)), batch_norm(5, training=training)
        r, grad_out = (torch.randn_like(x) if residual else None), torch.randn_like(x)
        results = []
        for call, dtype in ((compiled, None), (functional.bn_act, None), (functional.bn_act, torch.float64)):
            a, b, own = leaf(x, dtype or x.dtype), leaf(r, dtype or x.dtype), copy_of(bn, dtype)
            inputs = {"x": a, "residual": b, "weight": own.weight, "bias": own.bias}
            results.append(outcome(call(a, own, b), inputs, grad_out, (own,)))
        assert_same(*results)
    assert len(recorder.forward) == len(recorder.backward) == 1 and recorder.runs == 4


def test_add_relu_compiles_whole(recorder):
    compiled = torch.compile(functional.add_relu, fullgraph=True, backend=recorder.backend, dynamic=True)
    for batch in (4, 3):
        x, residual = (torch.randn(batch, 5, 6, 7, requires_grad=True) for _ in range(2))
        out, grad_out = compiled(x, residual), torch.randn(batch, 5, 6, 7)
        assert torch.equal(out, F.relu(x + residual))
        for grad in torch.autograd.grad(out, (x, residual), grad_out):
            assert torch.equal(grad, grad_out * (x + residual > 0))
    assert recorder.forward == [{"resfuse::add_relu"}] and len(recorder.backward) == 1 and recorder.runs == 4


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast(recorder, where):
    model, eager, exact = three()

    def inside(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    compiled = torch.compile(inside if where == "inside" else model, fullgraph=True, backend=recorder.backend)
    x = torch.randn(3, 3, 12, 12)
    found = step(model, x, call=compiled, autocast=where == "outside")
    assert found["out"].dtype == torch.bfloat16
    # bfloat16 gradients are off by hundredths: they must only be longer than their bound
    assert_same(found, step(eager, x, autocast=True), step(exact, x.double()), margin=1)
    assert recorder.runs == 2 and recorder.forward[0] >= FUSED_OPS


def test_inductor_generates_code_with_the_numbers_of_eager():
    model = resfuse.fuse(models.BasicBlock(4, 4))
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (3, 2):
        x = torch.randn(batch, 4, 6, 6)
        assert_same(step(model, x, call=compiled), step(eager, x), step(exact, x.double()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert sum(torch._dynamo.utils.counters["inductor"].values()) > 0


def graph(traced):
    """The nodes of a graph by operation, name and target."""
    return [(node.op, node.name, str(node.target)) for node in traced.graph.nodes]


def test_symbolic_trace_gives_the_stock_graph():
    stock = network()
    fused = resfuse.fuse(copy.deepcopy(stock))
    assert graph(torch.fx.symbolic_trace(fused)) == graph(torch.fx.symbolic_trace(stock))


def test_create_feature_extractor_gives_the_stock_graph():
    try:
        torchvision = import_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")
    extract = importlib.import_module("torchvision.models.feature_extraction").create_feature_extractor
    stock = torchvision.models.resnet18().eval()
    fused, x = resfuse.fuse(copy.deepcopy(stock)), torch.randn(1, 3, 32, 32)
    ours, theirs = (extract(model, ["layer1.0.relu", "layer3"]) for model in (fused, stock))
    assert graph(ours) == graph(theirs)
    assert all(torch.equal(ours(x)[key], theirs(x)[key]) for key in ("layer1.0.relu", "layer3"))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export_sees_the_stock_graph(training):
    stock = network().train(training)
    fused, x = resfuse.fuse(copy.deepcopy(stock)), torch.randn(2, 3, 12, 12)
    ours, theirs = (torch.export.export(block, (x,)) for block in (fused, stock))
    assert not [node for node in ours.graph.nodes if "resfuse" in str(node.target)]
    assert graph(ours) == graph(theirs)


def test_jit_trace_can_be_saved_and_loaded():
    model = resfuse.fuse(network().eval())
    x, file = torch.randn(2, 3, 12, 12), io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x))


def test_jit_script_refuses_fused_blocks_and_changes_nothing():
    model, x = resfuse.fuse(network().eval()), torch.randn(2, 3, 12, 12)
    modules, expected = list(model.modules()), model(x)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script does not support fused blocks.*unfuse"):
        torch.jit.script(model)
    assert list(model.modules()) == modules and all(block.fused for block in resfuse.explain(model).blocks)
    torch.testing.assert_close(torch.jit.script(resfuse.unfuse(model))(x), expected)
