"""The public functions that end in a pooling layer; :mod:`resfuse.functional` has them too, and its rules hold here."""

from __future__ import annotations

from torch import Tensor

from resfuse import _checks, autograd_pool, raw_chain, reference
from resfuse._calls import as_dense, autocasts, bump_versions, convolve, serving_backend
from resfuse.parameters import BatchNorm2dParameters, Conv2dParameters, Moments, Size, Window


def _bn_relu_maxpool(
    x: Tensor, bn: BatchNorm2dParameters, window: Window, backend: str | None, moments: Moments | None, *, owned: bool
) -> Tensor:
    """bn_relu_maxpool on checked arguments. `owned`: nobody else reads x, see :func:`autograd_pool.bn_relu_maxpool`."""
    chosen = serving_backend("bn_relu_maxpool", x, backend)
    if chosen == "reference":
        return reference.bn_relu_maxpool(x, bn, *window, moments)
    out = autograd_pool.bn_relu_maxpool(as_dense(x), bn, window, chosen, owned=owned, moments=moments)
    bump_versions(bn)
    return out


def bn_relu_maxpool(
    x: Tensor,
    bn: BatchNorm2dParameters,
    kernel_size: Size = 3,
    stride: Size = 2,
    padding: Size = 1,
    *,
    moments: Moments | None = None,
    backend: str | None = None,
) -> Tensor:
    """The tail of a stem: out = maxpool(relu(BN(x))), in one pass over x that stores nothing normalised.

    BN is as in :func:`resfuse.functional.bn_act`: it updates the running statistics and the counter in training. The
    pool is :class:`torch.nn.MaxPool2d` with dilation 1, ceil_mode False; the defaults are a ResNet's.

    Args:
        x (Tensor): (N, C, H, W); float16, bfloat16, float32 or float64; any strides; channels_last is fastest.
        bn (BatchNorm2dParameters): its vectors are (C,), each of any floating dtype.
        kernel_size (int | tuple[int, int]): positive, at most 256 positions; a pair is (vertical, horizontal).
        stride (int | tuple[int, int]): positive.
        padding (int | tuple[int, int]): at most half the kernel_size; a padded position is never the maximum.
        moments (Moments | None): x's, where whoever wrote x handed them on; else they are taken here, in a pass.
        backend (str | None): see :mod:`resfuse.functional`.

    Returns:
        Tensor: (N, C, H', W') in x's dtype, H' = (H + 2 * padding - kernel_size) // stride + 1; x's memory order where
        x is dense, else contiguous. Kept for backward are x and one byte for each element of the output.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described, there is one value per channel in
            training, or the requested backend is missing; nothing has been updated.

    Numerics: values are compared after rounding to x's dtype. Of equal ones the first in the window, row by row, gets
    the gradient; NaN is larger than any number, and of several the last is selected: all as stock.
    """
    _checks.check_image("x", x)
    window = _checks.check_window(kernel_size, stride, padding)
    _checks.check_window_fits(window, x.shape)
    _checks.check_batch_norm(bn, x.shape, x.device)
    _checks.check_moments(moments, x)
    return _bn_relu_maxpool(x, bn, window, backend, moments, owned=False)


def conv_bn_relu_maxpool(
    x: Tensor,
    conv: Conv2dParameters,
    bn: BatchNorm2dParameters,
    kernel_size: Size = 3,
    stride: Size = 2,
    padding: Size = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """A whole stem, or the last layer of a VGG's stage: out = maxpool(relu(BN(conv(x)))).

    Args:
        x (Tensor): (N, C, H, W); float16, bfloat16, float32 or float64; any strides; channels_last is fastest.
        conv (Conv2dParameters): weight (K, C / groups, kH, kW) in x's dtype, or any under autocast.
        bn (BatchNorm2dParameters): its vectors are (K,).
        kernel_size, stride, padding, backend: as in :func:`bn_relu_maxpool`, with the convolution's output for x.

    Returns:
        Tensor: (N, K, H', W') in the convolution's dtype.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; nothing has been updated.
    """
    _checks.check_image("x", x)
    shape = _checks.check_conv(conv, x.shape, x, cast=autocasts(x.device.type), prefix="conv.")
    window = _checks.check_window(kernel_size, stride, padding)
    _checks.check_window_fits(window, shape)
    _checks.check_batch_norm(bn, shape, x.device)
    if raw_chain.why_not(x, [conv], backend) is None:
        return raw_chain.conv_bn_relu_maxpool(x, (conv, bn), window, backend)
    return _bn_relu_maxpool(convolve(x, conv, bn), bn, window, backend, None, owned=True)
