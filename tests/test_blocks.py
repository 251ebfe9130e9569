"""The compositions with convolutions: native against a float64 reference and the stock modules that they replace."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from numerics import (
    CHAIN_MARGIN,
    GRADIENT_MARGIN,
    LAYOUTS,
    TRAIN_EVAL,
    assert_all_as_exact,
    image,
    leaf,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from resfuse import functional, ops, reference
from resfuse.nn import batch_norm_parameters, conv_parameters

pytestmark = pytest.mark.skipif(ops.missing_native["cpu"] is not None, reason=str(ops.missing_native["cpu"]))

SHORTCUTS = pytest.mark.parametrize("shortcut", ["identity", "tensor", "projection"])
DEPTHS = pytest.mark.parametrize("depth", [1, 2, 3], ids=["conv_bn_act", "basic_block", "bottleneck"])
FUNCTIONS = {1: "conv_bn_act", 2: "basic_block", 3: "bottleneck"}


def randomise(bn):
    nn.init.uniform_(bn.weight, 0.5, 1.5)
    nn.init.normal_(bn.bias, std=0.25)
    if bn.track_running_stats:
        nn.init.uniform_(bn.running_mean, 0.25, 0.5)  # away from 0: errors are judged relative to it
        nn.init.uniform_(bn.running_var, 0.5, 1.5)


class Unit(nn.Module):
    """A residual unit of stock modules: `depth` convolutions with their normalisations, and a shortcut."""

    def __init__(
        self, depth, channels, out, shortcut="none", *, stride=1, kernel=3, groups=1, dilation=1, **bn_options
    ):
        super().__init__()
        widths = [channels] + [out] * depth
        pad, options = dilation * (kernel - 1) // 2, {"groups": groups, "dilation": dilation, "bias": False}
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], out, kernel, stride if i == 0 else 1, pad, **options) for i in range(depth)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(out, **bn_options) for _ in range(depth))
        self.shortcut = shortcut
        if shortcut == "projection":
            self.convs.append(nn.Conv2d(channels, out, 1, stride, bias=False))
            self.norms.append(nn.BatchNorm2d(out, **bn_options))
        for conv, bn in zip(self.convs, self.norms, strict=True):
            nn.init.kaiming_normal_(conv.weight)
            randomise(bn)
        self.depth = depth

    def summed(self, x, residual=None):
        """What stock activates last; residual is for shortcut "tensor"."""
        y = x
        for i, (conv, bn) in enumerate(zip(self.convs[: self.depth], self.norms[: self.depth], strict=True)):
            y = bn(conv(y if i == 0 else F.relu(y)))
        if self.shortcut == "projection":
            residual = self.norms[-1](self.convs[-1](x))
        elif self.shortcut == "identity":
            residual = x
        return y if residual is None else y + residual

    def forward(self, x, residual=None):
        return F.relu(self.summed(x, residual))

    def fused(self, module, x, residual=None, **options):
        """The same through functional or reference."""
        convs = [conv_parameters(conv) for conv in self.convs]
        norms = [batch_norm_parameters(bn) for bn in self.norms]
        layers = [p for pair in zip(convs, norms, strict=True) for p in pair][: 2 * self.depth]
        function = getattr(module, FUNCTIONS[self.depth])
        if self.depth > 1:
            shortcut = (convs[-1], norms[-1]) if self.shortcut == "projection" else residual
            return function(x, *layers, shortcut, **options)
        if self.shortcut == "projection":
            return function(x, *layers, F.conv2d(x, *convs[-1]), norms[-1], **options)
        return function(x, *layers, x if self.shortcut == "identity" else residual, **options)


@torch.no_grad()
def settle(unit, x, residual):
    """Running statistics become those of this batch, so that eval too normalises."""
    momenta, training = [bn.momentum for bn in unit.norms], unit.training
    for bn in unit.norms:
        bn.momentum = 1.0
    unit.train()(x.to(unit.convs[0].weight.dtype), None if residual is None else residual.float())
    for bn, momentum in zip(unit.norms, momenta, strict=True):
        bn.momentum = momentum
    unit.train(training)


def outcome(unit, call, x, residual, grad_out):
    """The output, every gradient and every buffer of one path, by name."""
    x, residual = leaf(x), leaf(residual)
    before = [t.detach().clone() for t in (x, residual, *unit.parameters()) if t is not None]
    out = call(unit, x, residual)
    kept = out.detach().clone()
    out.backward(grad_out.to(out.dtype))
    assert torch.equal(out, kept), "the output was overwritten"
    for now, then in zip([t for t in (x, residual, *unit.parameters()) if t is not None], before, strict=True):
        assert torch.equal(now, then), "an input was overwritten"
    found = {"out": out.detach(), "grad_x": x.grad}
    if residual is not None:
        found["grad_residual"] = residual.grad
    found |= {f"grad_{name}": p.grad for name, p in unit.named_parameters() if p.requires_grad}
    return found | dict(unit.named_buffers())


def fused(unit, *args, module=functional, **options):
    return unit.fused(module, *args, **options)


native = partial(fused, backend="native")


def check(unit, x, residual=None, autocast=None):
    """native and stock on copies of the unit, both against reference in float64; native's outcome."""
    with torch.no_grad():
        grad_out = torch.randn(copy.deepcopy(unit)(x.to(unit.convs[0].weight.dtype), residual).shape)
    wide = [None if t is None else t.double() for t in (x, residual)]
    exact = outcome(copy.deepcopy(unit).double(), partial(fused, module=reference), *wide, grad_out)
    results = []
    for call in (native, lambda unit, *args: unit(*args)):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            results.append(outcome(copy.deepcopy(unit), call, x, residual, grad_out))
    assert_all_as_exact(*results, exact, margin=GRADIENT_MARGIN if autocast is None else CHAIN_MARGIN)
    return results[0]


def inputs(shape, out, shortcut, dtype=torch.float32, layout="channels_last", stride=1):
    """x and, for shortcut "tensor", a residual."""
    x = image(shape, dtype, layout)
    size = [-(-s // stride) for s in shape[2:]]
    return x, image((shape[0], out, *size), dtype, layout) if shortcut == "tensor" else None


@TRAIN_EVAL
@pytest.mark.parametrize("shortcut", ["none", "identity", "tensor", "projection"])
@pytest.mark.parametrize("layout", LAYOUTS)
@DEPTHS
def test_against_float64(depth, layout, shortcut, training):
    if depth > 1 and shortcut == "none":
        shortcut = "identity"
    unit = Unit(depth, 7, 7, shortcut).train(training)
    found = check(unit, *inputs((4, 7, 6, 6), 7, shortcut, layout=layout))
    assert found["out"].is_contiguous(memory_format=torch.channels_last) or layout != "channels_last"


@TRAIN_EVAL
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"stride": 2}, id="strided"),
        pytest.param({"groups": 3}, id="grouped"),
        pytest.param({"dilation": 2}, id="dilated"),
        pytest.param({"kernel": 1}, id="1x1"),
        pytest.param({"momentum": None}, id="cumulative"),
        pytest.param({"momentum": 0.0}, id="momentum-0"),
        pytest.param({"track_running_stats": False}, id="untracked"),
        pytest.param({"eps": 1e-2}, id="eps"),
    ],
)
@DEPTHS
def test_options(depth, options, training):
    unit = Unit(depth, 3, 57, "projection", **options).train(training)
    found = check(unit, image((3, 3, 7, 7), layout="channels_last"))
    counted = training and options.get("track_running_stats", True)
    assert found.get("norms.0.num_batches_tracked", torch.tensor(0)) == int(counted)


@TRAIN_EVAL
@pytest.mark.parametrize("channels", [3, 65])
@SHORTCUTS
@DEPTHS
def test_channels(depth, shortcut, channels, training):
    unit = Unit(depth, channels, channels, shortcut).train(training)
    check(unit, *inputs((4, channels, 5, 5), channels, shortcut))


@TRAIN_EVAL
@SHORTCUTS
@DEPTHS
def test_autocast(depth, shortcut, training):
    """A chain of bfloat16 convolutions: activations stay away from the kinks, where stock's own masks are noise."""
    unit = Unit(depth, 16, 16, shortcut).train(training)
    for bn in unit.norms:
        nn.init.constant_(bn.bias, 4.0)
        nn.init.uniform_(bn.weight, 0.25, 0.5)
    x, residual = inputs((4, 16, 6, 6), 16, shortcut, torch.bfloat16)
    settle(unit, x, residual)
    found = check(unit, x, residual, autocast=torch.bfloat16)
    assert found["out"].dtype == torch.bfloat16
    assert found["grad_convs.0.weight"].dtype == found["grad_norms.0.weight"].dtype == torch.float32
    assert found["norms.0.running_mean"].dtype == torch.float32


@SHORTCUTS
@DEPTHS
def test_pure_bfloat16_convolutions(depth, shortcut):
    unit = Unit(depth, 16, 16, shortcut).to(torch.bfloat16)
    x, residual = inputs((4, 16, 6, 6), 16, shortcut, torch.bfloat16)
    ours, stock = (call(copy.deepcopy(unit), x, residual) for call in (native, lambda unit, *args: unit(*args)))
    exact = fused(copy.deepcopy(unit).double(), x.double(), None if residual is None else residual.double())
    assert_all_as_exact(*({"out": t.detach()} for t in (ours, stock, exact)))


@pytest.mark.parametrize("frozen", ["eval", "no-grad", "both"])
@DEPTHS
def test_frozen_batch_norm_inside_training(depth, frozen):
    unit = Unit(depth, 7, 7, "projection").train()
    bn = unit.norms[0]
    if frozen != "no-grad":
        bn.eval()
    if frozen != "eval":
        bn.requires_grad_(False)
    before = copy.deepcopy(bn.state_dict())
    found = check(unit, image((4, 7, 6, 6)))
    if frozen != "no-grad":
        assert all(torch.equal(found[f"norms.0.{name}"], before[name]) for name in before if name.startswith("r"))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@SHORTCUTS
@DEPTHS
def test_without_gradients_the_bits_are_the_same(depth, shortcut, layout):
    """Where no gradient is needed, layers may write over what nobody else holds.

    In eval, tile kernels fold the normalisation into the weight where no gradient is needed: the same up to rounding.
    """
    unit = Unit(depth, 7, 7, shortcut)
    x, residual = inputs((4, 7, 6, 6), 7, shortcut, layout=layout)
    kept = [None if t is None else t.clone() for t in (x, residual)]
    for training in (True, False):
        results = []
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            own = copy.deepcopy(unit).train(training)
            with mode():
                results.append([native(own, x, residual), *own.buffers()])
        folded = not training and layout == "channels_last" and torch.float32 in ops.tile_dtypes
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b) or (folded and torch.allclose(a, b, rtol=1e-5, atol=1e-5))
    assert torch.equal(x, kept[0]) and (residual is None or torch.equal(residual, kept[1]))


@DEPTHS
def test_a_1x1_convolution_of_one_channel_is_no_alias(depth):
    """The convolution's output may be overwritten, its input never, however small it is."""
    unit = Unit(depth, 1, 1, "identity", kernel=1).eval()
    x = image((2, 1, 1, 1))
    before = x.clone()
    with torch.no_grad():
        out = native(unit, x)
    assert torch.equal(x, before) and out.data_ptr() != x.data_ptr()


@TRAIN_EVAL
@DEPTHS
def test_nothing_depends_on_fresh_memory(depth, training, request):
    unit, x = Unit(depth, 7, 7, "projection").train(training), image((4, 7, 6, 6))
    grad_out = torch.randn(4, 7, 6, 6)
    expected = outcome(copy.deepcopy(unit), native, x, None, grad_out)
    request.getfixturevalue("poisoned")
    found = outcome(copy.deepcopy(unit), native, x, None, grad_out)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@SHORTCUTS
def test_second_derivatives(shortcut):
    unit = Unit(2, 2, 2, shortcut, kernel=1, eps=1e-2).double()
    x, residual = inputs((2, 2, 2, 2), 2, shortcut, torch.float64)
    leaves = [leaf(t) for t in (x, residual) if t is not None] + [leaf(p) for p in unit.parameters()]
    names = [name for name, _ in unit.named_parameters()]
    count = len(leaves) - len(names)

    def function(*tensors):
        state = dict(zip(names, tensors[count:], strict=True))
        return torch.func.functional_call(
            Fused(unit), {f"unit.{name}": t for name, t in state.items()}, tensors[:count]
        )

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


class Fused(nn.Module):
    """A unit whose forward is the native one."""

    def __init__(self, unit):
        super().__init__()
        self.unit = unit

    def forward(self, *args):
        return native(self.unit, *args)


@DEPTHS
def test_kept_for_backward_are_raw_activations(depth):
    """Each layer keeps its raw output, which is the next one's input, and the last one the block's: nothing normalised.

    Without tile kernels each layer's input is an activation of its own.
    """
    unit, x = Unit(depth, 7, 7, "identity"), leaf(image((4, 7, 6, 6), layout="channels_last"))
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr(), tensor.numel()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        native(unit, x)
    large = [t for t in kept.values() if t.shape == x.shape]
    layers_keep = depth + 2 if torch.float32 in ops.tile_dtypes else 2 * depth + 1
    assert len({t.untyped_storage().data_ptr() for t in large}) == layers_keep
    assert all(t.numel() <= 7 for t in kept.values() if t.shape != x.shape and t.dim() == 1)


def test_backward_after_another_forward():
    """Two forwards before the first backward: running statistics are not kept, so both backwards work."""
    unit, x = Unit(2, 7, 7, "identity"), leaf(image((4, 7, 6, 6)))
    first = native(unit, x).square().sum()
    second = native(unit, x).square().sum()
    one, two = (torch.autograd.grad(loss, x)[0] for loss in (first, second))
    assert torch.equal(one, two) and one.norm() > 1


@SHORTCUTS
@DEPTHS
def test_a_graph_that_is_kept_gives_the_same_gradients_again(depth, shortcut):
    """The last backward may use up what was saved, an earlier one may not."""
    unit = Unit(depth, 7, 7, shortcut)
    x, residual = (leaf(t) for t in inputs((4, 7, 6, 6), 7, shortcut))
    leaves = [t for t in (x, residual, *unit.parameters()) if t is not None]
    out = native(unit, x, residual)
    grad_out = torch.randn_like(out)
    first, second, last = (torch.autograd.grad(out, leaves, grad_out, keep) for keep in (True, True, False))
    for grads in (second, last):
        assert all(torch.equal(a, b) for a, b in zip(first, grads, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves, grad_out)


def test_a_raw_residual_of_the_caller_is_not_used_up():
    unit, x, residual = Unit(1, 7, 7, "projection"), leaf(image((4, 7, 6, 6))), leaf(image((4, 7, 6, 6)))
    norms, before = [batch_norm_parameters(bn) for bn in unit.norms], residual.detach().clone()
    conv = conv_parameters(unit.convs[0])
    functional.conv_bn_act(x, conv, norms[0], residual, norms[1], backend="native").square().sum().backward()
    assert torch.equal(residual, before) and residual.grad.norm() > 1e-3


@DEPTHS
def test_checkpointing_gives_the_same_gradients(depth):
    unit, x = Unit(depth, 7, 7, "projection"), leaf(image((4, 7, 6, 6)))
    leaves = [x, *unit.parameters()]
    expected = torch.autograd.grad(native(unit, x).square().sum(), leaves)
    out = checkpoint(lambda x: native(unit, x), x, use_reentrant=False)
    assert all(
        torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.square().sum(), leaves), expected, strict=True)
    )
