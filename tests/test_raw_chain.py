"""Blocks whose activations travel raw, through the public functions: what they leave alone, cast and refuse."""

import pytest
import torch
from numerics import image, leaf
from test_folded_blocks import Bottleneck, native
from torch import nn

from resfuse import backends, functional, ops
from resfuse.nn import ConvBNAct2d, batch_norm_parameters, conv_parameters

pytestmark = pytest.mark.skipif(not ops.tile_dtypes, reason="this processor has no tile kernels (AVX-512 or AVX2)")
LAST = torch.channels_last
MEASURED = backends._TILE_CHANNELS


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("folding", [True, False])
def test_the_callers_gradient_is_left_alone(folding, activation):
    """Shortcut gradients are added in place, but never in a tensor that the caller may hold."""
    unit, x = Bottleneck(3, 64, 8, "identity"), leaf(image((2, 64, 6, 6), layout="channels_last"))
    out = native(unit, x, folding=folding, activation=activation)
    grad_out = torch.randn_like(out)
    kept = grad_out.clone()
    out.backward(grad_out)
    assert torch.equal(grad_out, kept) and x.grad.norm() > 1


@pytest.mark.skipif(torch.bfloat16 not in ops.tile_dtypes, reason="this processor has no bfloat16 tile kernels")
def test_autocast_casts_float32_inputs_and_residuals():
    unit = Bottleneck(3, 64, 16, "tensor")
    x, residual = (image((2, 64, 6, 6), layout="channels_last") for _ in range(2))
    layer = ConvBNAct2d(64, 8).to(memory_format=LAST)
    with torch.autocast("cpu", torch.bfloat16):
        assert native(unit, x, residual).dtype == torch.bfloat16
        assert layer(x).dtype == torch.bfloat16
        assert layer(x, image((2, 8, 6, 6), layout="channels_last")).dtype == torch.bfloat16
        layer.conv.to(torch.bfloat16)
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"padding": (1,)}, {"stride": (2,), "padding": 1}, {"dilation": (1,)}], ids=str)
def test_one_number_for_both_axes(options):
    conv, bn, x = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), image((2, 8, 9, 9), layout="channels_last")
    parameters = conv_parameters(conv)._replace(**options)
    same = parameters._replace(**{name: v[0] if isinstance(v, tuple) else v for name, v in options.items()})
    a, b = (functional.conv_bn_act(x, p, batch_norm_parameters(bn)) for p in (parameters, same))
    assert torch.equal(a, b)


def test_a_weight_with_unusual_strides_folds():
    unit, x = Bottleneck(3, 64, 16, "identity"), image((2, 64, 6, 6), layout="channels_last")
    exact = native(unit, leaf(x), folding=True)
    weight = unit.convs[2].weight
    weight.data = weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    out = native(unit, leaf(x), folding=True)
    assert torch.equal(out, exact)
    out.sum().backward()
    assert weight.grad.isfinite().all()


def test_the_rule_that_folds():
    assert backends.folds_from(64, 256) == 256 and backends.folds_from(512, 2048) is None
    assert backends.folds_from(256, 64) is None, "only an expansion trades a large output away"
    assert backends.folds_from(512, 2048, True) == 0 and backends.folds_from(64, 256, False) is None


def test_narrow_convolutions_stay_torchs(monkeypatch):
    unit, x = Bottleneck(3, 64, 8, "identity"), leaf(image((2, 64, 6, 6), layout="channels_last"))
    assert native(unit, x, folding=False).grad_fn.name() == "ConvNormActFunctionBackward"
    monkeypatch.setattr(backends, "_TILE_CHANNELS", MEASURED)
    assert native(unit, x).grad_fn.name() == "BNActFunctionBackward"
    fewest = MEASURED[torch.float32]
    assert f"below {fewest} channels" in backends.why_not_raw("cpu", torch.float32, fewest - 1)
    assert backends.why_not_raw("cpu", torch.float32, fewest) is None


def test_backends_say_why_activations_do_not_travel_raw():
    assert backends.why_not_raw("cpu", torch.float32) is None
    assert "float64" in backends.why_not_raw("cpu", torch.float64)
    assert "cuda" in backends.why_not_raw("cuda", torch.float32)
