"""What tests of folding share: networks with statistics of photographs, the engines of this machine, and the bound."""

import copy

import pytest
import torch
from numerics import FLOOR
from torch import nn

import resfuse
from resfuse.bench.parity import condition
from resfuse.demo.data import load_photos, normalise
from resfuse.folding.engines import ENGINES

SIZE = 64


def photographs(count=4, size=SIZE):
    """Real images, as networks for ImageNet read them."""
    return normalise(load_photos(count, size))


def settle(model, images):
    """Random affine parameters, residual branches as weak as trained ones, then statistics of these images; in eval."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
            module.reset_running_stats()
            module.momentum = None  # statistics of all that comes, not of the last
    condition(model)
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def stock_and_exact(model, images, dtype):
    """What the model gives in this dtype, in its best layout, and in float64."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(images.double())
        stock = copy.deepcopy(model).to(dtype, memory_format=torch.channels_last)
        return stock(images.to(dtype)), exact


def assert_folded(folded, model, images, dtype):
    """At most twice stock's error, and stock's classes wherever its margin says something."""
    stock, exact = stock_and_exact(model, images, dtype)
    out = folded(images)
    assert out.dtype == dtype and out.shape == exact.shape and not out.requires_grad
    errors = [((y.double() - exact).norm() / exact.norm()).item() for y in (out, stock)]
    assert errors[0] <= 2 * errors[1] + FLOOR[dtype], f"off by {errors[0]:.2e}, stock by {errors[1]:.2e}"
    assert_same_classes(out, stock, exact)


def assert_same_classes(out, stock, exact):
    best = stock.double().topk(2, dim=1).values
    error = (stock.double() - exact).abs().amax(1)
    sure = best[:, 0] - best[:, 1] > 2 * error  # both logits may be off
    assert sure.any(), "no image is classified surely: this proves nothing"
    assert torch.equal(out.argmax(1)[sure], stock.argmax(1)[sure])


def engines_for(dtype):
    """The engines that serve this dtype on this machine's CPU."""
    plan = resfuse.fold(nn.Conv2d(1, 1, 1).eval()).plan
    return [name for name, engine in ENGINES.items() if engine.missing(plan, torch.device("cpu"), dtype) is None]


FLOAT_ENGINES = pytest.mark.parametrize(
    "dtype, backend",
    [(dtype, name) for dtype in (torch.float32, torch.bfloat16) for name in engines_for(dtype)],
    ids=lambda value: str(value).removeprefix("torch."),
)
