"""Blocks whose last convolution folds in training, beside the same blocks unfolded, and what they keep for backward."""

import copy
from functools import partial

import pytest
import torch
from numerics import CHAIN_MARGIN, GRADIENT_MARGIN, assert_all_as_exact, image, leaf
from test_blocks import Unit, fused, native, outcome, randomise
from test_tiles import DTYPES
from torch import nn

import resfuse
from resfuse import models, ops, reference

pytestmark = pytest.mark.skipif(not ops.tile_dtypes, reason="this processor has no tile kernels (AVX-512 or AVX2)")


class Bottleneck(Unit):
    """A unit whose last convolution is an expanding 1x1."""

    def __init__(self, depth, channels, width, shortcut, *, out=None, stride=1, **options):
        super().__init__(depth, channels, width, "none", stride=stride, **options)
        out = channels if out is None else out
        self.convs[depth - 1] = nn.Conv2d(width if depth > 1 else channels, out, 1, bias=False)
        self.norms[depth - 1] = nn.BatchNorm2d(out)
        self.shortcut = shortcut
        if shortcut == "projection":
            self.convs.append(nn.Conv2d(channels, out, 1, stride, bias=False))
            self.norms.append(nn.BatchNorm2d(out))
        for bn in self.norms:
            randomise(bn)


def check_folding(unit, x, residual=None, autocast=None, margin=GRADIENT_MARGIN, **options):
    with torch.no_grad():
        grad_out = torch.randn(copy.deepcopy(unit)(x.float(), None if residual is None else residual.float()).shape)
    wide = [None if t is None else t.double() for t in (x, residual)]
    exact = outcome(copy.deepcopy(unit).double(), partial(fused, module=reference), *wide, grad_out)
    results = []
    for call in (partial(native, **options), lambda unit, *args: unit(*args)):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            results.append(outcome(copy.deepcopy(unit), call, x, residual, grad_out))
    for name in [name for name in exact if name.endswith("bias") and exact[name].norm() < 1e-9]:
        # what a later normalisation cancels: rounding noise in any dtype
        ours, stock = (found.pop(name) for found in results)
        assert ours.norm() <= 2 * stock.norm() + 1e-3 * exact[name.replace("bias", "weight")].norm(), name
        del exact[name]
    assert_all_as_exact(*results, exact, margin=margin)


@pytest.mark.parametrize("folding", [True, False])
@pytest.mark.parametrize("shortcut", ["identity", "tensor", "projection"])
@pytest.mark.parametrize("shape", [(4, 28, 6, 6), (3, 65, 7, 5), (2, 6, 1, 9)], ids=str)
def test_folding(shape, shortcut, folding):
    """Folded or not, the unit is as exact as stock, for widths that are no whole vectors."""
    unit = Bottleneck(3, shape[1], max(shape[1] // 4, 3), shortcut)
    residual = image(shape, layout="channels_last") if shortcut == "tensor" else None
    check_folding(unit, image(shape, layout="channels_last"), residual, folding=folding)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("channels", [(64, 256), (13, 70)], ids=str)
def test_folding_a_projection(channels, stride):
    """A projection that widens and strides is a branch of the closing product: its own output never exists."""
    unit = Bottleneck(3, channels[0], channels[0] // 4 + 1, "projection", stride=stride, out=channels[1])
    x = image((3, channels[0], 8, 11), layout="channels_last")
    check_folding(unit, x, folding=True)
    kept = kept_images(lambda: native(unit, leaf(x), folding=True))
    assert kept.count(channels[1]) == 1, "of the output's width, the output alone is kept"


@pytest.mark.parametrize("folding", [True, False])
@pytest.mark.skipif(torch.bfloat16 not in ops.tile_dtypes, reason="this processor has no bfloat16 tile kernels")
@pytest.mark.parametrize("shortcut", ["identity", "tensor", "projection"])
def test_folding_under_autocast(shortcut, folding):
    unit = Bottleneck(3, 64, 16, shortcut)
    for bn in unit.norms:  # away from the kinks, where stock's own masks are noise
        nn.init.constant_(bn.bias, 4.0)
        nn.init.uniform_(bn.weight, 0.25, 0.5)
    x = image((4, 64, 6, 6), torch.bfloat16, "channels_last")
    residual = image(x.shape, torch.bfloat16, "channels_last") if shortcut == "tensor" else None
    check_folding(unit, x, residual, torch.bfloat16, CHAIN_MARGIN, folding=folding)


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
@pytest.mark.parametrize("affine", ["", "w", "b"])
def test_folding_without_weight_or_bias(affine, shortcut):
    unit = Bottleneck(3, 20, 6, shortcut, out=20 if shortcut == "identity" else 44)
    for bn in list(unit.norms)[2:]:
        if "w" not in affine:
            bn.weight = None
        if "b" not in affine:
            bn.bias = None
    check_folding(unit, image((4, 20, 6, 6), layout="channels_last"), folding=True)


@pytest.mark.parametrize("gamma", [-1.0, 0.0])
def test_folding_with_negative_and_zero_weights(gamma):
    """A zero weight of the last normalisation has a gradient; what lies behind it has none, exactly."""
    unit = Bottleneck(3, 28, 7, "identity")
    nn.init.constant_(unit.norms[2].weight, gamma)
    x = leaf(image((4, 28, 6, 6), layout="channels_last"))
    grads = []
    for call in (partial(native, folding=True), lambda unit, x: unit(x)):
        own = copy.deepcopy(unit)
        call(own, x).square().sum().backward()
        grads.append({name: p.grad for name, p in own.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], rtol=1e-3, atol=1e-3 * grads[1]["norms.2.weight"].abs().max()), name
    assert grads[0]["norms.2.weight"].norm() > 1
    assert (grads[0]["convs.2.weight"].norm() == 0) == (gamma == 0.0)


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("folding", [True, False])
def test_a_convolution_with_bias(folding, training):
    """Before batch statistics a bias only moves the running mean, and its gradient is exactly zero."""
    unit = Bottleneck(3, 28, 7, "identity")
    for i in range(3):
        conv = unit.convs[i]
        unit.convs[i] = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, 1, conv.padding)
    unit.train(training)
    x = image((4, 28, 6, 6), layout="channels_last")
    own, stock = copy.deepcopy(unit), copy.deepcopy(unit)
    ours, theirs = native(own, leaf(x), folding=folding), stock(leaf(x))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    for loss in (ours.square().sum(), theirs.square().sum()):
        loss.backward()
    for (name, a), (_, b) in zip(own.named_parameters(), stock.named_parameters(), strict=True):
        if training and name.startswith("convs") and name.endswith("bias"):
            assert a.grad.norm() == 0, name
        else:
            assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-3 * b.grad.abs().max()), name
    for (name, a), (_, b) in zip(own.named_buffers(), stock.named_buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4), name


@pytest.mark.parametrize(("shortcut", "groups"), [("identity", 1), ("identity", 2), ("projection", 1)])
@pytest.mark.parametrize("folding", [True, False])
def test_double_backward(folding, shortcut, groups):
    """Second derivatives are those of the reference."""
    unit, values = Bottleneck(3, 12, 6, shortcut, groups=groups), image((3, 12, 4, 4), layout="channels_last")
    results = []
    for call in (partial(native, folding=folding), partial(fused, module=reference)):
        own, x = copy.deepcopy(unit), leaf(values)
        first = torch.autograd.grad(call(own, x).square().sum(), [x, *own.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *own.parameters()])
        results.append(second)
    for ours, exact in zip(*results, strict=True):
        assert exact.norm() > 0
        assert (ours - exact).norm() / exact.norm() < 1e-3


@pytest.mark.parametrize("shape", [(3, 128, 17, 17), (1, 64, 12, 12), (2, 32, 7, 7)], ids=str)
@DTYPES
def test_bits_do_not_depend_on_threads(dtype, shape, threads):
    unit = Bottleneck(3, shape[1], shape[1] // 4, "projection")
    x = image(shape, dtype, "channels_last")
    found = []
    for count in (1, 2, 3):
        threads(count)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found.append(outcome(copy.deepcopy(unit), partial(native, folding=True), x, None, torch.ones(x.shape)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0].values(), other.values(), strict=True))


def kept_images(call):
    """The channels of every activation that a call keeps for backward, its output among them; each memory once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    return sorted(t.shape[1] for t in kept.values() if t.dim() == 4 and t.shape[0] == out.shape[0])


@pytest.mark.parametrize("shortcut", ["identity", "projection"])
@pytest.mark.parametrize("folding", [True, False])
def test_nothing_normalised_is_kept(folding, shortcut):
    """Kept are the input, the raw outputs of convolutions, and the output, the mask of a plain shortcut; folded, the
    input, the raw outputs of inner convolutions and the output."""
    unit, x = Bottleneck(3, 64, 16, shortcut), leaf(image((4, 64, 8, 8), layout="channels_last"))
    assert kept_images(lambda: native(unit, x, folding=folding)) == [16, 16, 64, 64] + [64] * (not folding)


def activations_kept(network, x, autocast):
    """Bytes that a step keeps of what has x's batch size in its size, however it is shaped: each memory once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor.dtype.itemsize)
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        out = network(x)
    assert out.requires_grad
    sizes = [kept[address] for address in kept.keys() - parameters]
    return sum(size for size, itemsize in sizes if size // itemsize % x.shape[0] == 0)


def activations_needed(network, x, dtype, folds):
    """Bytes of the images, each convolution's raw output but those that fold, each block's, the pool's, its choices."""
    sizes, blocks, handles = [x.numel() * dtype.itemsize], (models.BasicBlock, models.Bottleneck), []
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.AdaptiveAvgPool2d, *blocks)) and not (
            folds and name.endswith(("conv3", "downsample.0"))
        ):
            handles.append(module.register_forward_hook(lambda m, i, o: sizes.append(o.numel() * dtype.itemsize)))
    handles.append(
        network.maxpool.register_forward_hook(lambda m, i, o: sizes.append(o.numel() * (dtype.itemsize + 1)))
    )
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return sum(sizes)


@DTYPES
@pytest.mark.parametrize(
    ("block", "folding"), [(models.BasicBlock, None), (models.Bottleneck, True), (models.Bottleneck, False)]
)
def test_a_network_keeps_raw_activations_and_nothing_normalised(block, folding, dtype):
    network = models.ResNet(block, [2, 1, 1, 2], num_classes=4).to(memory_format=torch.channels_last)
    x = torch.randn(5, 3, 64, 64).to(memory_format=torch.channels_last)  # no channel or kernel is a multiple of 5
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    needed = activations_needed(network, x, dtype, bool(folding))
    assert activations_kept(network, x, autocast) > needed, "stock keeps what is normalised, too"
    resfuse.fuse(network, folding=folding, strict=True)
    assert activations_kept(network, x, autocast) == needed
