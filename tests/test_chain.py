"""conv_bn_act_chain: plain chains and residual units whose last activation is another."""

import pytest
import torch
from numerics import image, leaf
from test_blocks import SHORTCUTS, TRAIN_EVAL, Unit, check, inputs
from test_folded_blocks import kept_images

from resfuse import functional, ops
from resfuse.nn import batch_norm_parameters, conv_parameters

pytestmark = pytest.mark.skipif(ops.missing_native["cpu"] is not None, reason=str(ops.missing_native["cpu"]))
DEPTHS = pytest.mark.parametrize("depth", [1, 2, 3])


class Chain(Unit):
    """A unit whose last activation is an option, through conv_bn_act_chain."""

    last_activation = folding = None

    def forward(self, x, residual=None):
        return super().forward(x, residual) if self.last_activation is None else self.summed(x, residual)

    def fused(self, module, x, residual=None, **options):
        layers = [
            (conv_parameters(conv), batch_norm_parameters(bn)) for conv, bn in zip(self.convs, self.norms, strict=True)
        ]
        shortcut = {"identity": x, "tensor": residual, "projection": layers[-1], "none": None}[self.shortcut]
        layers = layers[: self.depth]
        options |= {"folding": self.folding} if module is functional else {}
        return module.conv_bn_act_chain(x, layers, shortcut, last_activation=self.last_activation, **options)


@TRAIN_EVAL
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@DEPTHS
def test_a_plain_chain(depth, layout, training):
    check(Chain(depth, 7, 9).train(training), *inputs((4, 7, 6, 6), 9, "none", layout=layout))


@TRAIN_EVAL
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@SHORTCUTS
@DEPTHS
def test_a_unit_that_ends_in_its_sum(depth, shortcut, layout, folded, training):
    unit = Chain(depth, 7, 7, shortcut, kernel=1 if folded else 3).train(training)
    unit.last_activation, unit.folding = "identity", folded
    x, residual = inputs((4, 7, 6, 6), 7, shortcut, layout=layout)
    check(unit, x, residual)


@pytest.mark.skipif(not ops.tile_dtypes, reason="this processor has no tile kernels (AVX-512 or AVX2)")
def test_a_plain_chain_keeps_nothing_activated_but_its_output():
    unit, x = Chain(3, 20, 20), leaf(image((3, 20, 8, 8), layout="channels_last"))
    assert kept_images(lambda: unit.fused(functional, x)) == [20] * 4  # x and what each convolution wrote


def test_errors_leave_everything_alone():
    unit, x = Chain(2, 6, 6), image((2, 6, 4, 4))
    layers = [(conv_parameters(c), batch_norm_parameters(b)) for c, b in zip(unit.convs, unit.norms, strict=True)]
    before = {name: b.clone() for name, b in unit.named_buffers()}
    narrow = layers[1][0]._replace(weight=torch.zeros(6, 5, 3, 3))
    for kind, match, change in [
        (ValueError, "layers must hold at least one", dict(layers=[])),
        (RuntimeError, "conv2.weight .* 5 channels", dict(layers=[layers[0], (narrow, layers[1][1])])),
        (ValueError, "shortcut must have x's shape", dict(shortcut=x[:1])),
        (ValueError, "activation must be one of", dict(last_activation="tanh")),
        (ValueError, "activation must be one of", dict(activation="tanh", last_activation="relu")),
        (ValueError, "backend must be one of", dict(backend="fast")),
    ]:
        with pytest.raises(kind, match=match):
            functional.conv_bn_act_chain(**(dict(x=x, layers=layers) | change))
    assert all(torch.equal(b, before[name]) for name, b in unit.named_buffers())
