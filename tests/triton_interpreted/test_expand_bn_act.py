"""Train-time folding in Triton's interpreter: a 1x1 convolution with its normalisation, forward and every gradient."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from numerics import (
    CHAIN_MARGIN,
    GRADIENT_MARGIN,
    assert_all_as_exact,
    assert_as_exact,
    batch_norm,
    copy_of,
    image,
    leaf,
)

from resfuse import BatchNorm2dParameters, Conv2dParameters, choices, ops, reference
from resfuse._triton import LAUNCHERS
from resfuse._triton.candidates import CANDIDATES
from resfuse.autograd_folding import expand_norm_act
from resfuse.raw import Raw

# bfloat16 on a GPU alone: see conftest.py
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
kernels = ops.of("triton")


class Unit(NamedTuple):
    """The tensors of act(BN(conv(act((x - mean)*scale + bias))) + r)."""

    x: torch.Tensor
    affine: torch.Tensor | None
    mean: torch.Tensor | None
    weight: torch.Tensor
    conv_bias: torch.Tensor | None
    bn: BatchNorm2dParameters
    residual: torch.Tensor | None = None
    residual_affine: torch.Tensor | None = None
    residual_mean: torch.Tensor | None = None
    shortcut: torch.Tensor | None = None
    shortcut_weight: torch.Tensor | None = None
    shortcut_bn: BatchNorm2dParameters | None = None
    stride: tuple[int, int] = (1, 1)

    def leaves(self, dtype=None):
        """Fresh leaves by name, and the unit made of them; parameters and vectors stay wider than float16."""
        wide = dtype if dtype in (torch.float32, torch.float64) else None
        norms = {"bn": copy_of(self.bn, wide), "shortcut_bn": copy_of(self.shortcut_bn, wide)}
        fields = {name: t for name, t in self._asdict().items() if isinstance(t, torch.Tensor)}
        found = {
            name: leaf(t, dtype if t.dim() == 4 and "weight" not in name else wide or t.dtype)
            for name, t in fields.items()
            if not name.endswith("mean")
        }
        unit = self._replace(**found, **norms)
        for key, bn in norms.items():
            if bn is not None:
                found |= {f"{key}.{field}": getattr(bn, field) for field in ("weight", "bias")}
        return {name: t for name, t in found.items() if t is not None}, unit


def triton_path(unit, relu):
    shortcut = None
    if unit.shortcut is not None:
        shortcut = unit.shortcut, Conv2dParameters(unit.shortcut_weight), unit.shortcut_bn
    residual = None
    if unit.residual is not None:
        residual = Raw(unit.residual, unit.residual_affine, unit.residual_mean)
    return expand_norm_act(
        Raw(unit.x, unit.affine, unit.mean), unit.weight, unit.conv_bias, unit.bn, residual, shortcut,
        list(unit.stride), True, relu, "triton", moments=True,
    )  # fmt: skip


def torch_path(unit, relu):
    """Every step stored, in the unit's dtypes: stock, and in float64 the definition."""

    def prepared(x, affine, mean, activation):
        mean = None if mean is None else mean.to(affine.dtype)
        return reference.normalized(x, affine, mean, activation)

    a = prepared(unit.x, unit.affine, unit.mean, "relu")
    z = reference.conv_bn_act(a, Conv2dParameters(unit.weight, unit.conv_bias), unit.bn, activation="identity")
    if unit.residual is not None:
        z = z + prepared(unit.residual, unit.residual_affine, unit.residual_mean, "identity")
    if unit.shortcut is not None:
        projection = Conv2dParameters(unit.shortcut_weight, None, unit.stride)
        z = z + reference.conv_bn_act(unit.shortcut, projection, unit.shortcut_bn, activation="identity")
    out = F.relu(z) if relu else z
    return out, *reference.moments(out)


def left_behind(path, unit, dtype, relu, grads):
    """Outputs, moments, running statistics and all gradients, by name."""
    leaves, own = unit.leaves(dtype)
    results = path(own, relu)
    wanted = [grad.to(out.dtype) for grad, out in zip(grads, results, strict=True)]
    gradients = torch.autograd.grad(results, list(leaves.values()), wanted)
    # the moments of a 16-bit activation are no closer than it
    found = {name: t.detach().to(dtype) for name, t in zip(("out", "out_mean", "out_var"), results, strict=True)}
    found |= {f"grad {name}": t for name, t in zip(leaves, gradients, strict=True)}
    for key in ("bn", "shortcut_bn"):
        bn = getattr(own, key)
        if bn is not None:
            found |= {f"{key}.{field}": getattr(bn, field) for field in ("running_mean", "running_var")}
    return found


def make_unit(shape, out_channels, kind, dtype, stride=(1, 1), prologue=True):
    channels = shape[1]
    x = image(shape, dtype, "channels_last")
    affine = torch.stack([torch.randn(channels) / 4 + 0.5, torch.rand(channels) + 0.5]) if prologue else None
    mean = x.float().mean((0, 2, 3)) if prologue else None
    weight = torch.randn(out_channels, channels, 1, 1) / channels**0.5
    unit = Unit(x, affine, mean, weight, None, batch_norm(out_channels))
    size = (shape[0], out_channels, *shape[2:])
    if kind in ("identity", "raw"):
        unit = unit._replace(residual=image(size, dtype, "channels_last"))
    if kind == "raw":
        unit = unit._replace(residual_affine=torch.randn(2, out_channels), residual_mean=torch.randn(out_channels))
    if kind == "projection":
        width = channels + 5
        spatial = [(n - 1) * s + 1 + (s - 1) // 2 for n, s in zip(shape[2:], stride, strict=True)]
        unit = unit._replace(
            shortcut=image((shape[0], width, *spatial), dtype, "channels_last"),
            shortcut_weight=torch.randn(out_channels, width, 1, 1) / width**0.5,
            shortcut_bn=batch_norm(out_channels),
            stride=stride,
        )
    return unit


def check(unit, dtype, relu=True):
    exact_out, *_ = torch_path(unit.leaves(torch.float64)[1], relu)
    # no gradient where rounding may flip the mask
    z = torch_path(unit.leaves(torch.float64)[1], False)[0]
    grad = torch.randn(exact_out.shape) * (z.detach().abs() > 64 * torch.finfo(dtype).eps)
    pixels = exact_out[:, 0].numel()
    grads = grad, torch.randn(exact_out.shape[1]) * pixels / 50, torch.randn(exact_out.shape[1]) * pixels / 50
    ours = left_behind(triton_path, unit, dtype, relu, grads)
    stock = left_behind(torch_path, unit, dtype, relu, grads)
    exact = left_behind(torch_path, unit, torch.float64, relu, grads)
    assert_all_as_exact(ours, stock, exact, margin=GRADIENT_MARGIN if dtype == torch.float32 else CHAIN_MARGIN)


@pytest.mark.parametrize("kind", ["none", "identity", "raw", "projection"])
@DTYPES
def test_every_residual(dtype, kind):
    """Widths that fill no block; a projection strides over its input."""
    check(make_unit((3, 13, 7, 5), 37, kind, dtype, (2, 1)), dtype)


@pytest.mark.parametrize("shape", [(2, 3, 1, 9), (3, 70, 7, 7)], ids=str)
def test_every_width(shape):
    """Fewer channels than a block, and more channels and pixels than one."""
    check(make_unit(shape, 2 * shape[1] + 1, "identity", torch.float32), torch.float32)


def test_the_algebra_is_never_torchs(monkeypatch):
    """Where torch convolves activations, it does not get the float32 matrices, which cuDNN would multiply in TF32."""
    taken = []

    def recorded(candidate, position):
        def call(*arguments):
            taken.append(arguments[position].dtype)
            return candidate(*arguments)

        return call

    composed = CANDIDATES["composed"]
    recording = composed._replace(
        conv_act=recorded(composed.conv_act, 0), conv_stats_backward=recorded(composed.conv_stats_backward, 7)
    )
    monkeypatch.setitem(CANDIDATES, "composed", recording)
    monkeypatch.setattr(choices, "choose", lambda *asked: "composed")
    check(make_unit((3, 13, 7, 5), 37, "projection", torch.float16, (2, 1)), torch.float16)
    assert taken and set(taken) == {torch.float16}  # the gradient to the projection's weight


def test_neither_prologue_nor_activation():
    check(make_unit((3, 20, 6, 7), 44, "projection", torch.float32, prologue=False), torch.float32, relu=False)


def test_a_convolution_with_bias():
    """Batch statistics cancel it: it only moves the running mean, and its gradient is exactly zero."""
    unit = make_unit((3, 12, 6, 7), 30, "identity", torch.float32)
    (_, plain), (leaves, biased) = unit.leaves(), unit._replace(conv_bias=torch.randn(30)).leaves()
    outs = [triton_path(own, True)[0] for own in (plain, biased)]
    assert torch.equal(*outs)
    moved = biased.bn.running_mean - plain.bn.running_mean
    assert torch.allclose(moved, biased.bn.momentum * biased.conv_bias.detach(), atol=1e-6)
    (grad,) = torch.autograd.grad(outs[1].sum(), leaves["conv_bias"])
    assert not grad.any()


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 3)], ids=str)
@DTYPES
def test_the_gradient_to_the_input(dtype, stride):
    """[dz | a | 1] [[W'], [-Q], [row]], through the prologue; nothing for pixels that were not read."""
    x = image((2, 70, 6, 7), dtype, "channels_last")
    affine, mean = torch.stack([torch.randn(70), torch.rand(70) + 0.5]), torch.randn(70)
    spatial = [-(-n // s) for n, s in zip((6, 7), stride, strict=True)]
    dz = image((2, 100, *spatial), dtype, "channels_last")
    weight, correction, row = torch.randn(100, 70).to(dtype), torch.randn(70, 70), torch.randn(70)
    correction = correction + correction.T
    grad_x, sums = kernels.expand_bn_act_backward_input(
        dz, x, affine, mean, True, weight, correction, row, list(stride)
    )

    def path(kind):
        wide = kind if kind == torch.float64 else torch.float32
        leaves = leaf(x, kind), leaf(affine, wide)
        a = reference.normalized(*leaves, mean.to(wide))[:, :, :: stride[0], :: stride[1]]
        da = torch.einsum("nkhw,kc->nchw", dz.to(kind), weight.to(kind))
        da = da + torch.einsum("nchw,cd->ndhw", a.detach(), correction.to(dtype).to(kind)) + row.to(kind)[:, None, None]
        return torch.autograd.grad(a, leaves, da)

    for name, ours, stock, exact in zip(
        ("grad_x", "grad_affine"), (grad_x, sums), path(dtype), path(torch.float64), strict=True
    ):
        assert_as_exact(ours, stock, exact, name, margin=CHAIN_MARGIN)


def test_the_gradient_to_the_weight_and_its_mask():
    """dz is written once, exactly; a NaN of out lets the gradient through, as torch's own backward."""
    x = image((2, 33, 5, 7), layout="channels_last")
    grad, out = (image((2, 130, 5, 7), layout="channels_last", mean=0.0) for _ in range(2))
    out = out.relu()
    out[0, 0, 0, 0] = float("nan")
    dz, gram, sums = kernels.expand_bn_act_backward_weight(grad, out, x, None, None, False)
    masked = torch.where(out == 0, 0, grad)
    assert torch.equal(dz, masked) and dz.is_contiguous(memory_format=torch.channels_last)
    rows, columns = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (masked, x))
    assert_as_exact(gram, rows.T @ columns, rows.double().T @ columns.double(), "grad")
    assert_as_exact(sums, rows.sum(0), rows.double().sum(0), "grad")
    copied, *_ = kernels.expand_bn_act_backward_weight(grad, None, x, None, None, False)
    assert torch.equal(copied, grad) and copied.data_ptr() != grad.data_ptr()


def test_the_backward_of_folding_names_bad_input():
    x, dz = image((2, 4, 3, 3), layout="channels_last"), image((2, 8, 3, 3), layout="channels_last")
    weight, correction, row = torch.zeros(8, 4), torch.zeros(4, 4), torch.zeros(4)
    for given, error, message in (
        ((dz, None, x.double()), TypeError, "x must be float16"),
        ((dz[:1], None, x), ValueError, "grad_out must have shape"),
        ((dz, dz.half(), x), TypeError, r"out must be torch\.float32"),
    ):
        with pytest.raises(error, match=message):
            kernels.expand_bn_act_backward_weight(*given, None, None, True)
    for given, error, message in (
        ((weight[:4], correction, row, [1, 1]), ValueError, r"weight must be contiguous \(8, 4\)"),
        ((weight.half(), correction, row, [1, 1]), TypeError, r"weight must be torch\.float32"),
        ((weight, correction[:2], row, [1, 1]), ValueError, r"correction must be contiguous \(4, 4\)"),
        ((weight, correction.to("meta"), row, [1, 1]), ValueError, "correction must be on .*, got meta"),
        ((weight, correction, row[:2], [1, 1]), ValueError, r"row must be contiguous float32 \(4,\)"),
        ((weight, correction, row.to("meta"), [1, 1]), ValueError, "row must be on .*, got meta"),
        ((weight, correction, row, [2, 2]), ValueError, "dz must have shape"),
    ):
        with pytest.raises(error, match=message):
            LAUNCHERS["expand_bn_act_backward_input"](dz, x, None, None, True, *given)
