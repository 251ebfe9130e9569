"""fuse and unfuse: fused networks against their stock selves, and the promises of `fuse`."""

import contextlib
import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_all_as_exact, assert_as_exact, judged, step
from torch import nn

import resfuse
from resfuse import models, ops
from resfuse.bench.peers import import_torchvision

try:
    resnet = import_torchvision().models.resnet
except ImportError:
    resnet = None

needs_torchvision = pytest.mark.skipif(resnet is None, reason="torchvision is not installed")
TIE = 1e-5  # a pre-activation this close to 0 may take either branch of relu when sums are ordered differently


def tv(build, *arguments, **options):
    return lambda: getattr(resnet, build)(
        *(getattr(resnet, a, a) if isinstance(a, str) else a for a in arguments), **options
    )


ONE_EACH = [1, 1, 1, 1]
TORCHVISION = {  # builder, number of normalisations that run fused
    "resnet18": (tv("resnet18", num_classes=10), 20),
    "resnet50": (tv("resnet50", num_classes=10), 53),
    "bottleneck": (tv("ResNet", "Bottleneck", ONE_EACH, num_classes=10), 17),
    "resnext": (tv("ResNet", "Bottleneck", ONE_EACH, num_classes=10, groups=32, width_per_group=4), 17),
    "wide": (tv("ResNet", "Bottleneck", ONE_EACH, num_classes=10, width_per_group=128), 17),
}
OWN = {
    "own-resnet18": (partial(models.resnet18, num_classes=10), 20),
    "own-bottleneck": (partial(models.ResNet, models.Bottleneck, ONE_EACH, num_classes=10), 17),
    "own-plain": (partial(models.ResNet, models.BasicBlock, ONE_EACH, num_classes=10, shortcut=None), 9),
    "own-padded": (partial(models.ResNet, models.Bottleneck, ONE_EACH, num_classes=10, shortcut="A"), 13),
    "own-projected": (
        partial(models.ResNet, models.Bottleneck, ONE_EACH, num_classes=10, shortcut="C", stride_in_1x1=True),
        17,
    ),
    "cifar_resnet20": (models.cifar_resnet20, 19),
}
NETWORKS = TORCHVISION | OWN


def networks(*only):
    marks = {n: needs_torchvision if n in TORCHVISION else () for n in only or NETWORKS}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=mark) for n, mark in marks.items()])


@torch.no_grad()
def build(name):
    """A network whose normalisations are not at their initial values, so that every term of a gradient counts."""
    model = NETWORKS[name][0]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5).mul_(torch.where(torch.rand(module.num_features) < 0.3, -1, 1))
            module.bias.uniform_(-0.5, 0.5)
    return model


def without_ties(exact, shape):
    """An input for which no pre-activation of the float64 network is within TIE of 0."""

    def refuse_ties(_, inputs):
        if inputs[0].abs().min() < TIE:
            raise ArithmeticError

    exact = copy.deepcopy(exact)
    for module in exact.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(refuse_ties)
    for _ in range(500):
        x = torch.randn(shape)
        with torch.no_grad(), contextlib.suppress(ArithmeticError):
            exact(x.double())
            return x
    raise AssertionError("no input without ties")


def nodes(out):
    """The names of all nodes of out's autograd graph."""
    left, seen = [out.grad_fn], set()
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
    return [node.name() for node in seen]


def identities(model):
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    buffers = [(name, id(b)) for name, b in model.named_buffers()]
    return parameters, buffers, [(name, id(m)) for name, m in model.named_modules()]


def types(model):
    return [type(module) for module in model.modules()]


@networks()
def test_fuse_changes_nothing_but_classes(name):
    model = build(name)
    before, keys = identities(model), list(model.state_dict())
    assert resfuse.fuse(model) is model
    assert identities(model) == before
    assert list(model.state_dict()) == keys
    assert all(block.fused for block in resfuse.explain(model).blocks)


@pytest.mark.parametrize("folding", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@networks()
def test_every_normalisation_runs_fused(name, layout, folding):
    model = resfuse.fuse(build(name), folding=folding)
    x = torch.randn(2, 3, 32, 32).repeat(2, 1, 1, 1)
    found = nodes(model(x.to(memory_format=layout)))
    joined = sum(type(m.downsample) is nn.Sequential for m in model.modules() if hasattr(m, "downsample"))
    pooled = found.count("BNReLUMaxPoolFunctionBackward") + found.count("ConvBNReLUMaxPoolFunctionBackward")
    assert pooled == (name != "cifar_resnet20")
    folded = found.count("ExpandNormActFunctionBackward")
    closed = found.count("ConvNormActFunctionBackward") + folded
    alone = found.count("BNActFunctionBackward") + pooled
    if layout == torch.contiguous_format:  # a map of one pixel is channels_last too
        assert alone + closed + found.count("ConvNormFunctionBackward") >= NETWORKS[name][1] - joined
    elif closed:  # convolutions with their normalisation; a projection has a node of its own, unless it is folded
        assert bool(folded) == (folding and any(hasattr(module, "conv3") for module in model.modules()))
        assert alone + closed + found.count("ConvNormFunctionBackward") == NETWORKS[name][1] - (joined if folded else 0)
    else:
        assert alone == NETWORKS[name][1] - joined
    assert not [node for node in found if "NativeBatchNorm" in node or "Relu" in node or "MaxPool2D" in node]


@networks()
def test_unfuse_restores_the_stock_model(name):
    model = build(name)
    before, stock_types = identities(model), types(model)
    attributes = [set(module.__dict__) for module in model.modules()]
    resfuse.fuse(model, backend="reference")
    assert types(model) != stock_types
    assert resfuse.unfuse(model) is model
    assert types(model) == stock_types
    assert identities(model) == before
    assert [set(module.__dict__) for module in model.modules()] == attributes


def test_fuse_and_unfuse_are_idempotent():
    model = models.CifarResNet(8)
    fused = types(resfuse.fuse(model))
    assert types(resfuse.fuse(model)) == fused
    assert types(resfuse.unfuse(resfuse.unfuse(model))) == types(models.CifarResNet(8))


LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param("bottleneck", torch.contiguous_format, marks=needs_torchvision, id="bottleneck"),
        pytest.param("resnet18", torch.channels_last, marks=needs_torchvision, id="resnet18-channels_last"),
        pytest.param("resnext", torch.channels_last, marks=needs_torchvision, id="resnext-channels_last"),
        pytest.param("own-bottleneck", torch.channels_last, id="own-bottleneck-channels_last"),
        pytest.param("cifar_resnet20", torch.contiguous_format, id="cifar_resnet20"),
        pytest.param("cifar_resnet20", torch.channels_last, id="cifar_resnet20-channels_last"),
    ],
)
def test_training_step_is_as_exact_as_stock(name, layout):
    stock = build(name).to(memory_format=layout)
    exact, fused = copy.deepcopy(stock).double(), resfuse.fuse(copy.deepcopy(stock), strict=True)
    x = without_ties(exact, (8, 3, 16, 16)).to(memory_format=layout)
    target = torch.randint(10, (8,))
    results = [
        step(model, x.to(p.dtype), target=target) for model in (fused, stock, exact) for p in [next(model.parameters())]
    ]
    assert_all_as_exact(*(judged(result, results[2]) for result in results))


@LAYOUTS
@networks("bottleneck", "resnet18", "cifar_resnet20")
def test_training_step_under_autocast(name, layout):
    stock = build(name).to(memory_format=layout)
    exact, fused = copy.deepcopy(stock).double(), resfuse.fuse(copy.deepcopy(stock))
    # losses of four images may be off by a quarter of what is usual, and by four times: sixteen are not
    x, target = torch.randn(16, 3, 64, 64).to(memory_format=layout), torch.randint(10, (16,))
    ours, theirs = (step(model, x, target=target, autocast=True) for model in (fused, stock))
    wanted = step(exact, x.double(), target=target)
    # through this many layers, bfloat16 gradients are off by tenths: they must only be longer than their bound
    assert_all_as_exact(*(judged(result, wanted) for result in (ours, theirs, wanted)), margin=1)


@networks()
def test_eval_is_as_exact_as_stock(name):
    stock = build(name)
    x = torch.randn(4, 3, 32, 32)
    stock(x)  # leaves running statistics that fit
    stock.eval()
    exact, fused = copy.deepcopy(stock).double(), resfuse.fuse(copy.deepcopy(stock))
    with torch.no_grad():
        assert_as_exact(fused(x), stock(x), exact(x.double()))
    for ours, theirs in zip(fused.buffers(), stock.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_tail_of_a_pre_activation_network(training):
    stock = models.BNReLU(6, nn.BatchNorm2d).train(training)
    nn.init.uniform_(stock.bn.weight, 0.5, 1.5), nn.init.uniform_(stock.bn.bias, -0.5, 0.5)
    exact, fused, x = copy.deepcopy(stock).double(), resfuse.fuse(copy.deepcopy(stock)), torch.randn(4, 6, 7, 7)
    wanted = step(exact, x.double())
    assert_all_as_exact(*(judged(result, wanted) for result in (step(fused, x), step(stock, x), wanted)))
    assert fused(x).grad_fn.name() == "BNActFunctionBackward"


def test_an_optimizer_made_before_fuse_keeps_training():
    stock, x, target = build("cifar_resnet20"), torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    losses = []
    for fused in (False, True):
        model = copy.deepcopy(stock)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        model = resfuse.fuse(model) if fused else model
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[4:] == pytest.approx(losses[:4], rel=1e-3)
    assert losses[7] < 0.9 * losses[4]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_named_backend_runs(backend):
    if backend == "native" and ops.missing_native["cpu"] is not None:
        pytest.skip("the C++ library is not built")
    stock = build("cifar_resnet20")
    x = torch.randn(4, 3, 16, 16)
    fused, exact = resfuse.fuse(copy.deepcopy(stock), backend=backend), copy.deepcopy(stock).double()
    out = fused(x)
    assert ("BNActFunctionBackward" in nodes(out)) == (backend == "native")
    assert not [node for node in nodes(out) if "NativeBatchNorm" in node]
    assert_as_exact(out, stock(x), exact(x.double()))


@pytest.mark.parametrize(
    ("backend", "error"),
    [("fastest", ValueError), ("triton", RuntimeError), pytest.param("native", RuntimeError, id="native-missing")],
)
def test_a_backend_that_cannot_serve_raises_and_changes_nothing(backend, error, monkeypatch):
    monkeypatch.setitem(ops.missing_native, "cpu", "test")
    model = models.CifarResNet(8)
    before = types(model)
    with pytest.raises(error, match=backend):
        resfuse.fuse(model, backend=backend)
    assert types(model) == before


@pytest.mark.parametrize("function", [resfuse.fuse, resfuse.unfuse])
def test_only_modules_can_be_fused(function):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        function([nn.ReLU()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_blocks_on_an_unserved_device_run_stock(dtype, monkeypatch):
    monkeypatch.setitem(ops.missing_native, "cpu", "test")
    stock = build("cifar_resnet20").to(dtype)
    fused, x = resfuse.fuse(copy.deepcopy(stock)), torch.randn(4, 3, 16, 16, dtype=dtype)
    out = fused(x)
    assert torch.equal(out, stock(x))
    assert "BNActFunctionBackward" not in nodes(out)
    for block in resfuse.explain(fused).blocks:
        assert not block.fused and block.reason == f"no backend serves {dtype} on cpu: test"


def run_python(code):
    """What a fresh interpreter prints; it must succeed."""
    root = Path(resfuse.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_silent_and_imports_nothing_optional():
    out = run_python(
        "import sys, torch, os; before, environment = set(sys.modules), dict(os.environ)\n"
        "import resfuse; assert os.environ == environment\n"
        "model = resfuse.fuse(resfuse.models.CifarResNet(8)); model(torch.zeros(2, 3, 8, 8))\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    optional = {"torchvision", "typer", "rich", "matplotlib", "skimage", "mlxtend", "triton", "PIL", "pytest"}
    assert out.count("\n") == 1
    assert "resfuse" in out and not optional & set(json.loads(out.replace("'", '"')))


WITHOUT_LIBRARY = """
import copy, importlib.util, torch
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "resfuse._C" else find_spec(name, package)
import resfuse
status = next(s for s in resfuse.backends.available() if (s.backend, s.device) == ("native", "cpu"))
assert not status.available and "not built" in status.reason, status
stock, x = resfuse.models.CifarResNet(8), torch.randn(4, 3, 8, 8)
fused = resfuse.fuse(copy.deepcopy(stock))
assert torch.equal(fused(x), stock(x)) and "not built" in str(resfuse.explain(fused))
out = resfuse.fuse(copy.deepcopy(stock), backend="reference")(x)
torch.testing.assert_close(out, stock(x))
try:
    resfuse.fuse(fused, backend="native")
except RuntimeError as error:
    print(error)
"""


def test_without_the_compiled_library():
    assert "backend='native' does not serve this model on cpu: the C++ library was not built" in run_python(
        WITHOUT_LIBRARY
    )
