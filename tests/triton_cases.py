"""What the gate of Triton's kernels compiles: operators with arguments on the meta device.

Steps of networks are recorded as they run; what no step launches is listed. A case is a function of a dtype.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from triton_steps import Call, all_fused, by_the_rule, step

from resfuse import models

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Case(NamedTuple):
    """Operators to compile, and who convolves while they launch."""

    calls: Callable[[torch.dtype], Iterable[Call]]
    choose: Callable[..., str] = all_fused


def resnet50(choose, batch=256, **options):
    """A step of a fused ResNet-50 on images of 224 pixels."""
    return Case(lambda dtype: step(models.resnet50, (batch, 3, 224, 224), dtype, choose, **options), choose)


def activation(dtype, channels=64, size=56, batch=32):
    return torch.empty(batch, channels, size, size, dtype=dtype, device="meta", memory_format=torch.channels_last)


def vectors(count, channels=64):
    return [torch.empty(channels, device="meta") for _ in range(count)]


def memory_bound(dtype):
    """The operators of the memory-bound units: (name, arguments)."""
    x, v = activation(dtype), vectors(1)[0]
    parameter = [torch.empty(64, device="meta") for _ in range(4)]
    counter = torch.empty((), dtype=torch.int64, device="meta")
    large = activation(dtype, size=112)
    pooled, indices = activation(dtype), activation(torch.uint8)
    window = ([3, 3], [2, 2], [1, 1])
    none = (None,) * 6
    yield "add_relu", (x, x)
    yield "add_relu_backward", (x, x)
    yield "moments", (x,)
    yield "moments_backward", (v, v, x, v)
    yield "finalize", (v, v, 100, *parameter, counter, 0.1, 1e-5)
    yield "finalize_backward", (v, v, v, parameter[0], 1e-5)
    for residual in ((None, None, None), (x, None, None), (x, v, v)):
        yield "scale_shift_act", (x, v, v, *residual, True)
        yield "scale_shift_act_moments", (x, v, v, *residual, True)
    yield "scale_shift_act_backward_reduce", (x, x, v, v, v, *none[:5], True)
    yield "scale_shift_act_backward_reduce", (x, x, v, v, v, *none[:4], x, True)
    yield "scale_shift_act_backward_reduce", (x, x, v, v, v, x, v, v, v, None, True)
    yield "scale_shift_act_backward_apply", (x, x, v, v, v, v, v, *none, True)
    yield "scale_shift_act_backward_apply", (x, x, v, v, v, v, v, x, v, v, v, v, v, True)
    yield "scale_shift_relu_maxpool", (large, v, v, *window)
    yield "scale_shift_relu_maxpool_backward_reduce", (pooled, indices, large, v, v, v, *window)
    yield "scale_shift_relu_maxpool_backward_apply", (pooled, indices, large, v, v, v, v, v, *window)


_UNIT = ([1, 1], [0, 0], [1, 1], 1)


def _prologue(channels):
    return torch.empty(2, channels, device="meta"), *vectors(1, channels)


def _matrix(rows, columns, dtype, *kernel):
    return torch.empty(rows, columns, *kernel, dtype=dtype, device="meta")


def folding(dtype):
    """Train-time folding of the last convolution of ResNet-50's bottlenecks, and of their projections."""
    for channels, size, stride in ((64, 56, 1), (128, 28, 2), (256, 14, 2)):
        wide, narrow = 4 * channels, channels if stride == 1 else 2 * channels
        x, out = activation(dtype, channels, size), activation(dtype, wide, size)
        shortcut = activation(dtype, narrow, size * stride)
        prologue, strides = _prologue(channels), [stride, stride]
        projection = shortcut, _matrix(wide, narrow, dtype, 1, 1), strides
        weight, shift = _matrix(wide, channels, dtype, 1, 1), *vectors(1, wide)
        folded = (x, *prologue, True, weight, None, shift)
        yield "second_moments", (x, *prologue, True, [1, 1])
        yield "second_moments", (shortcut, None, None, False, strides)
        yield "conv_act", (*folded, out, *[None] * 4, [1, 1], True, *_UNIT, False)
        yield "conv_act", (*folded, out, *_prologue(wide), None, None, [1, 1], True, *_UNIT, True)
        yield "conv_act", (*folded, None, None, None, *projection, True, *_UNIT, False)
        yield "expand_bn_act_backward_weight", (out, out, x, *prologue, True)
        for read, before, strides_of_read in ((x, prologue, [1, 1]), (shortcut, (None, None), strides)):
            c = read.shape[1]
            algebra = _matrix(wide, c, dtype), _matrix(c, c, torch.float32), *vectors(1, c)
            yield "expand_bn_act_backward_input", (out, read, *before, True, *algebra, strides_of_read)


def inference(dtype):
    """Convolutions with a folded normalisation: in, out, kernel, stride, groups, size; the last adds a residual.

    Rows of fewer than 8 channels are too short for asynchronous copies: those of a stem are not among them.
    """
    for channels, wide, kernel, stride, groups, size in (
        (64, 64, 3, 1, 1, 56), (128, 128, 3, 2, 1, 56), (128, 128, 3, 1, 8, 28), (256, 512, 1, 2, 1, 56),
        (256, 64, 1, 1, 1, 56), (64, 256, 1, 1, 1, 56),
    ):  # fmt: skip
        weight = _matrix(wide, channels // groups, torch.float32, kernel, kernel)
        residual = activation(dtype, wide, size) if wide > channels and stride == 1 else None
        geometry = [stride] * 2, [kernel // 2] * 2, [1, 1], groups
        operands = activation(dtype, channels, size), None, None, False, weight, *vectors(2, wide)
        yield "conv_act", (*operands, residual, *[None] * 4, [1, 1], True, *geometry, False)


# (channels, out channels, kernel, stride, size of the map, groups) of convolutions: one step, many, phases of a stride,
# groups, and the stem, whose few channels are read one by one
CONVOLUTIONS = (
    (64, 64, 1, 1, 56, 1), (256, 64, 1, 1, 56, 1), (128, 512, 1, 1, 28, 1), (256, 512, 1, 2, 56, 1),
    (64, 64, 3, 1, 56, 1), (128, 128, 3, 2, 56, 1), (128, 128, 3, 1, 28, 32), (3, 64, 7, 2, 224, 1),
)  # fmt: skip


def convolutions(dtype):
    """conv_stats and its backward, with a prologue and without, with every way that dY is formed."""
    for channels, out, kernel, stride, size, groups in CONVOLUTIONS:
        x = activation(dtype, channels, size)
        weight = torch.empty(out, channels // groups, kernel, kernel, device="meta")
        padding = kernel // 2
        y = activation(dtype, out, (size + 2 * padding - kernel) // stride + 1)
        pairs = [stride] * 2, [padding] * 2, [1, 1], groups
        affine, (mean,) = torch.empty(2, channels, device="meta"), vectors(1, channels)
        y_affine, moments = torch.empty(2, out, device="meta"), vectors(3, out)
        reads = (x, None, None, weight, False) if channels == 3 else (x, affine, mean, weight, True)
        yield "conv_stats", (*reads, *pairs, True)
        yield "conv_stats", (x, None, None, weight, False, *pairs, False)
        if channels == 3:
            yield "conv_stats_backward", (y, y, None, *moments, False, *reads, *pairs, None, False, True)
            continue
        yield "conv_stats_backward", (y, y, None, *moments, False, *reads, *pairs, None, True, True)
        yield "conv_stats_backward", (y, y, y_affine, *moments, True, *reads, *pairs, None, True, True)
        plain = (y, None, None, None, None, None, False, x, None, None, weight, False, *pairs, x, True, True)
        yield "conv_stats_backward", plain


def cifar(dtype):
    """A network of 16 to 64 channels: those of the first convolutions fill no tile."""
    return step(models.cifar_resnet20, (128, 3, 32, 32), dtype, all_fused)


# what `make test` compiles: a ResNet-50's training step as it is by default, and the operators that it does not launch
CASES = [resnet50(by_the_rule), Case(memory_bound)]
# what `make gate` compiles beside it: our convolutions wherever there is one, with folding and without, for few images
# and in inference; the passes over contiguous memory; other networks, and forms that a network may ask for
MORE_CASES = [
    resnet50(all_fused), resnet50(all_fused, folding=False), resnet50(all_fused, batch=8),
    resnet50(all_fused, batch=8, training=False), resnet50(by_the_rule, order=torch.contiguous_format),
    Case(cifar), Case(folding), Case(inference), Case(convolutions),
]  # fmt: skip
