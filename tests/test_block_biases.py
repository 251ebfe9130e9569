"""Biases in compositions: one that batch statistics cancel has no gradient, and none is kept for backward."""

from functools import partial

import pytest
import torch
from numerics import TRAIN_EVAL, batch_norm, image, leaf

from resfuse import functional
from resfuse.parameters import Conv2dParameters


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batch_statistics_cancel_a_convolutions_bias(layout, backend):
    """Its gradient is exactly zero, whoever convolves; of one that nothing normalises, or a frozen norm, it is not."""
    x, bn, options = image((2, 6, 5, 5), layout=layout), partial(batch_norm, 6), {"backend": backend}
    convs = [Conv2dParameters(leaf(torch.randn(6, 6, 3, 3)), leaf(torch.randn(6)), padding=1) for _ in range(8)]
    outputs = [
        functional.conv_bn_act(x, convs[0], bn(), **options),
        functional.conv_bn_act_chain(x, [(convs[1], bn()), (convs[2], bn())], (convs[3], bn()), **options),
        functional.preact_block(x, [(bn(), convs[4]), (bn(), convs[5])], return_moments=False, **options),
        functional.conv_bn_relu_maxpool(x, convs[6], bn(), **options),
        functional.conv_bn_act(x, convs[7], bn(training=False), **options),
    ]
    sum(out.square().sum() for out in outputs).backward()
    assert all(conv.weight.grad.norm() > 1 for conv in convs)
    assert [bool(conv.bias.grad.any()) for conv in convs] == [i in (5, 7) for i in range(8)]


@TRAIN_EVAL
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["bn_act", "conv_bn_act", "chain", "folded", "preact", "pool"])
def test_biases_may_change_between_forward_and_backward(name, layout, training):
    """Stock does not keep them: two forward passes may come before two steps of biases."""

    def layer(size=3):
        bn = batch_norm(6, training=training)
        conv = Conv2dParameters(leaf(torch.randn(6, 6, size, size)), leaf(torch.randn(6)), padding=size // 2)
        return conv, bn._replace(weight=leaf(bn.weight), bias=leaf(bn.bias))

    x, a, b, c = image((2, 6, 5, 5), layout=layout), layer(), layer(1), layer(1)
    call = {
        "bn_act": lambda: functional.bn_act(x, a[1], x, b[1]),
        "conv_bn_act": lambda: functional.conv_bn_act(x, *a, x),
        "chain": lambda: functional.conv_bn_act_chain(x, [a, b], c, folding=False),
        "folded": lambda: functional.conv_bn_act_chain(x, [a, b], c, folding=True),
        "preact": lambda: functional.preact_block(x, [a[::-1], b[::-1]], c[0], return_moments=False),
        "pool": lambda: functional.conv_bn_relu_maxpool(x, *a),
    }[name]
    parameters = [p for conv, bn in (a, b, c) for p in (conv.weight, conv.bias, bn.weight, bn.bias)]
    first, second = (call().square().sum() for _ in range(2))
    exact = torch.autograd.grad(first, parameters, allow_unused=True)
    with torch.no_grad():
        for bias in parameters[1::2]:
            bias.add_(1)
    found = torch.autograd.grad(second, parameters, allow_unused=True)
    for ours, wanted in zip(found, exact, strict=True):
        assert (ours is None and wanted is None) or torch.equal(ours, wanted)
    assert sum(grad.norm() > 0 for grad in found if grad is not None) > 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["conv_bn_act", "chain", "pool"])
def test_gradients_of_gradients_reach_a_bias_beside_frozen_statistics(name, layout):
    """The gradient of a normalisation's weight depends on the convolution's bias; against the reference in float64."""

    def layer():
        conv = Conv2dParameters(torch.randn(6, 6, 3, 3) / 7, torch.randn(6), padding=1)
        return conv, batch_norm(6, training=False)

    x, layers, results = image((2, 6, 5, 5), layout=layout), [layer(), layer()], []
    for dtype, options in ((torch.float32, {}), (torch.float64, {"backend": "reference"})):
        own = []
        for conv, bn in layers:
            leaves = [leaf(t, dtype) for t in (conv.weight, conv.bias, bn.weight, bn.bias)]
            frozen = {k: getattr(bn, k).to(dtype) for k in ("running_mean", "running_var")}
            own.append((conv._replace(weight=leaves[0], bias=leaves[1]),
                        bn._replace(weight=leaves[2], bias=leaves[3], **frozen)))  # fmt: skip
        given = leaf(x, dtype)
        out = {
            "conv_bn_act": lambda o=own, g=given, k=options: functional.conv_bn_act(g, *o[0], **k),
            "chain": lambda o=own, g=given, k=options: functional.conv_bn_act_chain(g, o, g, **k),
            "pool": lambda o=own, g=given, k=options: functional.conv_bn_relu_maxpool(g, *o[0], **k),
        }[name]()
        used = own if name == "chain" else own[:1]
        parameters = [p for conv, bn in used for p in (conv.weight, conv.bias, bn.weight, bn.bias)]
        grads = torch.autograd.grad(out.square().mean(), parameters, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), parameters))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
        assert exact.norm() > 1e-3
