"""Blocks on Triton's convolutions in the interpreter: test_blocks's units through the public functions."""

from functools import partial

import pytest
import test_blocks
import torch
from numerics import image
from test_cuda_dispatch import Calls

triton = partial(test_blocks.fused, backend="triton")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("depth", "folding"), [(1, None), (2, None), (3, True), (3, False)])
def test_against_float64(monkeypatch, depth, folding, training):
    """Outputs, statistics and every gradient, and that the convolutions are Triton's, not torch's."""
    options = {} if depth == 1 else {"folding": folding}
    monkeypatch.setattr(test_blocks, "native", partial(triton, **options))
    shortcut, kernel = "none" if depth == 1 else "projection", 1 if folding else 3
    unit = test_blocks.Unit(depth, 5, 9, shortcut, stride=2, kernel=kernel).train(training)
    x = image((2, 5, 7, 6), layout="channels_last")
    test_blocks.check(unit, x)
    with Calls() as calls:
        triton(unit, x.requires_grad_(), **options).sum().backward()
    assert calls.ours()["conv_stats"] >= 1 and calls.ours()["conv_stats_backward"] >= 1
    assert not {"aten::convolution", "aten::convolution_backward"} & calls.of.keys()


def test_inference_is_folded(monkeypatch):
    unit = test_blocks.Unit(2, 5, 5, "identity").eval()
    x = image((2, 5, 6, 6), layout="channels_last")
    with torch.no_grad(), Calls() as calls:
        out = triton(unit, x)
        assert (out - unit(x)).norm() < 1e-5 * out.norm()
    assert calls.ours() == {"conv_act": 2} | {k: v for k, v in calls.ours().items() if k == "finalize"}
