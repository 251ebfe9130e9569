"""Statistics handed on: pre-activation units, and moments that the writer of an activation gives to its reader."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from numerics import CHAIN_MARGIN, GRADIENT_MARGIN, assert_all_as_exact, image, judged, leaf
from test_blocks import Unit, native, randomise
from test_folded_blocks import kept_images
from test_fusion import nodes
from torch import nn

from resfuse import Moments, backends, functional, ops, reference
from resfuse.nn import batch_norm_parameters, conv_parameters

LAST = torch.channels_last
PATHS = ["tiles", "passes"]  # convolutions by tile kernels, or torch's between passes
needs_tiles = pytest.mark.skipif(not ops.tile_dtypes, reason="this processor has no tile kernels (AVX-512 or AVX2)")


@pytest.fixture
def path(request, monkeypatch):
    if request.param == "passes":
        monkeypatch.setattr(backends, "_TILE_CHANNELS", dict.fromkeys(ops.tile_dtypes, 10**6))
    elif not ops.tile_dtypes:
        pytest.skip("this processor has no tile kernels (AVX-512 or AVX2)")
    return request.param


class Preact(nn.Module):
    """Stock modules of `units` pre-activation units and the BN-ReLU behind the last, as a network has them."""

    def __init__(self, shortcut, units=2, depth=2, channels=12, out=20):
        super().__init__()
        widths = [channels, *[out] * units]
        if shortcut in ("identity", "tensor"):
            widths = [out] * (units + 1)
        self.units = nn.ModuleList()
        for i in range(units):
            sizes = [widths[i], *[8] * (depth - 1), widths[i + 1]]
            stride = 2 if shortcut == "projection" and i == 0 else 1
            unit = nn.Module()
            unit.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in sizes[:-1])
            unit.convs = nn.ModuleList(
                nn.Conv2d(a, b, 3, stride if j == 0 else 1, 1, bias=j == 1)
                for j, (a, b) in enumerate(itertools.pairwise(sizes))
            )
            projects = shortcut == "projection" and (stride != 1 or widths[i] != widths[i + 1])
            unit.projection = nn.Conv2d(widths[i], widths[i + 1], 1, stride, bias=False) if projects else None
            self.units.append(unit)
        self.last = nn.BatchNorm2d(widths[-1])
        self.shortcut = shortcut
        for bn in self.modules():
            if isinstance(bn, nn.BatchNorm2d):
                randomise(bn)

    def forward(self, x, residual=None):
        for unit in self.units:
            y = first = F.relu(unit.norms[0](x))
            for i, conv in enumerate(unit.convs):
                y = conv(y if i == 0 else F.relu(unit.norms[i](y)))
            if unit.projection is not None:
                y = y + unit.projection(first)
            elif self.shortcut != "none":
                y = y + (residual if self.shortcut == "tensor" else x)
            x = y
        return F.relu(self.last(x))

    def fused(self, x, residual=None, module=functional):
        moments = None
        for unit in self.units:
            layers = [
                (None if type(bn) is nn.Identity else batch_norm_parameters(bn), conv_parameters(conv))
                for bn, conv in zip(unit.norms, unit.convs, strict=True)
            ]
            shortcut = {"none": None, "tensor": residual}.get(self.shortcut, x)
            if unit.projection is not None:
                shortcut = conv_parameters(unit.projection)
            found = module.preact_block(x, layers, shortcut, moments=moments)
            x, moments = found if module is functional else (found[0], found[1:])
        return module.bn_act(x, batch_norm_parameters(self.last), moments=moments)


def outcome(net, call, x, residual, grad_out):
    x, residual = leaf(x), leaf(residual)
    out = call(net, x) if residual is None else call(net, x, residual)
    out.backward(grad_out.to(out.dtype))
    found = {"out": out.detach(), "grad_x": x.grad}
    if residual is not None:
        found["grad_residual"] = residual.grad
    found |= {f"grad {name}": p.grad for name, p in net.named_parameters()}
    return found | {name: b.clone() for name, b in net.named_buffers()}


def check(net, x, residual=None, autocast=None):
    with torch.no_grad():
        grad_out = torch.randn(copy.deepcopy(net)(x.float(), None if residual is None else residual.float()).shape)
    wide = [None if t is None else t.double() for t in (x, residual)]
    exact = outcome(copy.deepcopy(net).double(), lambda n, *a: n(*a), *wide, grad_out)
    results = []
    for call in (lambda n, *a: n.fused(*a), lambda n, *a: n(*a)):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            results.append(outcome(copy.deepcopy(net), call, x, residual, grad_out))
    for name in [name for name in exact if name.endswith("bias") and exact[name].norm() < 1e-9]:
        for found in (*results, exact):  # a convolution's bias before batch statistics: noise in stock, zero in ours
            del found[name]
    ours, stock = (judged(found, exact) for found in results)
    assert_all_as_exact(ours, stock, judged(exact, exact), margin=GRADIENT_MARGIN if autocast is None else CHAIN_MARGIN)


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("shortcut", ["identity", "tensor", "projection", "none"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_a_chain_of_units(path, depth, shortcut, training):
    net = Preact(shortcut, depth=depth)
    x = image((3, 12 if shortcut in ("projection", "none") else 20, 7, 9), layout="channels_last")
    residual = image((3, 20, 7, 9), layout="channels_last") if shortcut == "tensor" else None
    for bn in net.modules():  # frozen statistics that fit: no channel is dead throughout
        if isinstance(bn, nn.BatchNorm2d):
            bn.momentum = 0.9
    with torch.no_grad():
        net(x, residual)
    check(net.train(training), x, residual)


@pytest.mark.parametrize("shortcut", ["identity", "projection", "none"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_the_first_unit_may_read_its_input_as_it_is(path, depth, shortcut):
    net, x = Preact(shortcut, depth=depth), image((3, 20 if shortcut == "identity" else 12, 7, 9), mean=0).abs() + 0.1
    net.units[0].norms[0] = nn.Identity()  # x is positive, and ReLU leaves it alone
    x = x.contiguous(memory_format=LAST)
    check(net, x)
    assert "MomentsFunctionBackward" not in nodes(net.fused(x)) or (path, shortcut) == ("passes", "none")


@pytest.mark.parametrize("shortcut", ["identity", "projection", "none"])
@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_moments_that_nobody_wants_are_not_taken(path, shortcut):
    net, x = Preact(shortcut), image((3, 20 if shortcut == "identity" else 12, 7, 9), layout="channels_last")
    unit = net.units[0]
    layers = [(batch_norm_parameters(b), conv_parameters(c)) for b, c in zip(unit.norms, unit.convs, strict=True)]
    added = {"identity": x, "none": None, "projection": unit.projection and conv_parameters(unit.projection)}[shortcut]
    moments = functional.moments(x)
    expected, _ = functional.preact_block(x, layers, added, moments=moments)
    out = functional.preact_block(x, layers, added, moments=moments, return_moments=False)
    assert torch.equal(out, expected) and out.requires_grad
    assert not [name for name in nodes(out) if "Moments" in name]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_an_input_without_gradient(path, depth):
    """The normalisation of data has gradients, though the data has none."""
    net, x = Preact("identity", depth=depth), image((3, 20, 7, 9), layout="channels_last")
    grads = []
    for own, call in ((copy.deepcopy(net), net.fused.__func__), (copy.deepcopy(net).double(), Preact.forward)):
        call(own, x.to(own.last.weight.dtype)).square().sum().backward()
        grads.append([p.grad for name, p in own.named_parameters() if "convs" not in name or name.endswith("weight")])
    for ours, exact in zip(*grads, strict=True):
        assert exact.norm() > 0 and (ours - exact).norm() / exact.norm() < 1e-4


@pytest.mark.parametrize("shortcut", ["identity", "projection", "none"])
@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_an_empty_batch_has_moments_of_zero(path, shortcut):
    net = Preact(shortcut)
    x = torch.zeros(0, 20 if shortcut == "identity" else 12, 6, 6).to(memory_format=LAST)
    assert net.fused(x).shape == net(x).shape
    bn = batch_norm_parameters(net.last)
    out, moments = functional.bn_act(torch.zeros(0, 20, 6, 6), bn, return_moments=True)
    assert out.shape == (0, 20, 6, 6) and moments.mean.tolist() == moments.var.tolist() == [0.0] * 20


@needs_tiles
@pytest.mark.skipif(torch.bfloat16 not in ops.tile_dtypes, reason="this processor has no bfloat16 tile kernels")
@pytest.mark.parametrize("shortcut", ["identity", "projection"])
def test_a_chain_under_autocast(shortcut):
    net = Preact(shortcut, channels=32, out=64)
    for module in net.modules():  # away from the kinks, where stock's own masks are noise
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 4.0)
            nn.init.uniform_(module.weight, 0.25, 0.5)
    channels = 64 if shortcut == "identity" else 32
    check(net, image((4, channels, 8, 8), torch.bfloat16, "channels_last"), autocast=torch.bfloat16)


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_a_chain_keeps_nothing_normalised(path):
    """By tiles the sums and the raw outputs are kept, each once; passes keep the convolutions' activated inputs too."""
    net, x = Preact("identity"), leaf(image((3, 20, 8, 8), layout="channels_last"))
    sums, inner = [20] * 3, [8] * 2
    passes = [8, 8, 20, 20] if path == "passes" else []
    assert kept_images(lambda: net.fused(x)) == sorted(sums + inner + passes)


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_double_backward(path):
    """First and second derivatives, through the moments that were handed on too, are those of the reference."""
    net, values = Preact("identity", out=6), image((3, 6, 4, 4), layout="channels_last")
    results = []
    for module in (functional, reference):
        own, x = copy.deepcopy(net), leaf(values)
        parameters = [p for name, p in own.named_parameters() if not name.endswith("convs.1.bias")]
        loss = own.fused(x, module=module).square().sum()
        first = torch.autograd.grad(loss, [x, *parameters], create_graph=True, allow_unused=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first if g is not None), [x, *parameters])
        results.append([g for g in (*first, *second) if g is not None])
    for ours, exact in zip(*results, strict=True):
        assert exact.norm() > 0
        assert (ours - exact).norm() / exact.norm() < 1e-3


@pytest.mark.parametrize("folding", [True, False])
@pytest.mark.parametrize("shortcut", ["identity", "tensor", "projection"])
@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_a_block_hands_on_its_moments(path, shortcut, folding):
    """The moments are those of what was stored, and their gradients reach everything behind them."""
    unit = Unit(3, 16, 16, shortcut)
    last = nn.BatchNorm2d(16)
    unit.convs[2] = nn.Conv2d(16, 16, 1, bias=False)
    randomise(last)
    x = image((3, 16, 6, 6), layout="channels_last")
    residual = image((3, 16, 6, 6), layout="channels_last") if shortcut == "tensor" else None
    grad_out = torch.randn(3, 16, 6, 6)
    found = []
    for path in ("handed", "taken", "exact"):
        wide = torch.float64 if path == "exact" else torch.float32
        own, bn = copy.deepcopy(unit).to(wide), copy.deepcopy(last).to(wide)
        inputs = [leaf(t, wide) for t in (x, residual) if t is not None]
        if path == "handed":
            out, moments = native(own, *inputs, folding=folding, return_moments=True)
            assert torch.allclose(moments.mean, out.mean((0, 2, 3)), atol=1e-5)
            assert torch.allclose(moments.var, out.var((0, 2, 3), unbiased=False), rtol=1e-4)
            out = functional.bn_act(out, batch_norm_parameters(bn), moments=moments)
        else:
            out = F.relu(bn(own(*inputs)))
        out.backward(grad_out.to(wide))
        grads = [*inputs, *own.parameters(), *bn.parameters()]
        found.append({f"grad {i}": t.grad for i, t in enumerate(grads)} | {"out": out.detach()})
        found[-1] |= {f"buffer {i}": b for i, b in enumerate([*own.buffers(), *bn.buffers()])}
    ours, stock, exact = (judged(f, found[2]) for f in found)
    assert_all_as_exact(ours, stock, exact)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_conv_stats(path, residual):
    conv, x = nn.Conv2d(8, 12, 3, 2, 1), image((3, 8, 9, 9), layout="channels_last")
    r = image((3, 12, 5, 5), layout="channels_last") if residual else None
    weights = torch.randn(3, 12, 5, 5), torch.randn(12), torch.randn(12)
    found = []
    for function in (functional.conv_stats, reference.conv_add):
        leaves = [leaf(t) for t in (x, r, conv.weight, conv.bias) if t is not None]
        parameters = conv_parameters(conv)._replace(weight=leaves[-2], bias=leaves[-1])
        out, *rest = function(leaves[0], parameters, leaves[1] if residual else None)
        moments = rest[0] if isinstance(rest[0], Moments) else rest
        loss = sum((t * w).sum() for t, w in zip((out, *moments), weights, strict=True))
        found.append([out.detach(), *moments, *torch.autograd.grad(loss, leaves)])
    for ours, exact in zip(*found, strict=True):
        assert torch.allclose(ours, exact, rtol=1e-4, atol=1e-5)


def test_moments_come_as_a_pair():
    moments = functional.moments(image((2, 3, 4, 4)))
    assert isinstance(moments, Moments) and moments.mean is moments[0] and moments.var is moments[1]


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_errors_leave_everything_alone(path):
    net, x = Preact("identity"), image((2, 20, 6, 6), layout="channels_last")
    unit = net.units[0]
    layers = [(batch_norm_parameters(b), conv_parameters(c)) for b, c in zip(unit.norms, unit.convs, strict=True)]
    before = {name: b.clone() for name, b in net.named_buffers()}
    wrong = Moments(torch.zeros(20), torch.ones(3))
    cases = [
        (ValueError, "layers", dict(layers=[])),
        (ValueError, "shortcut", dict(shortcut=x[:1])),
        (ValueError, "shortcut", dict(shortcut=conv_parameters(nn.Conv2d(20, 19, 1)))),
        (RuntimeError, "moments.var", dict(moments=wrong)),
        (TypeError, "moments.mean", dict(moments=Moments(torch.zeros(20).double(), torch.ones(20)))),
        (ValueError, "moments", dict(moments=(torch.zeros(20),))),
        (ValueError, "activation", dict(activation="tanh")),
        (ValueError, "backend", dict(backend="fast")),
        ((ValueError, RuntimeError), "bn2", dict(layers=[layers[0], layers[0]])),
        (ValueError, r"layers\[1\] must begin", dict(layers=[layers[0], (None, layers[1][1])])),
        (ValueError, "moments must be None", dict(layers=[(None, layers[0][1])], moments=functional.moments(x))),
    ]
    for kind, match, change in cases:
        with pytest.raises(kind, match=match):
            functional.preact_block(**(dict(x=x, layers=layers, shortcut=x) | change))
    with pytest.raises(RuntimeError, match=r"moments\.var"):
        functional.bn_act(x, layers[0][0], moments=wrong)
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())
