"""The public functions that hold convolutions: layers and whole residual units; :mod:`resfuse.functional` has them too,
and its rules hold here.

`return_moments`, where a function has it, hands on the moments of the output, taken in the pass that writes it, for a
successor that normalises it: the result is (out, Moments) then, and the output is kept for backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from resfuse import _checks, raw_chain
from resfuse._calls import add_moments, autocasts, bn_act, convolve
from resfuse.backends import choose
from resfuse.parameters import BatchNorm2dParameters, Conv2dParameters, Moments
from resfuse.reference import PreactLayer, Shortcut


def conv_bn_act(
    x: Tensor,
    conv: Conv2dParameters,
    bn: BatchNorm2dParameters,
    residual: Tensor | None = None,
    residual_bn: BatchNorm2dParameters | None = None,
    activation: str = "relu",
    *,
    return_moments: bool = False,
    backend: str | None = None,
) -> Any:
    """Convolution, batch normalisation, residual and activation: out = act(BN(conv(x)) + r).

    Args:
        x (Tensor): (N, C, H, W); float16, bfloat16, float32 or float64; any strides; channels_last is fastest.
        conv (Conv2dParameters): weight (K, C / groups, kH, kW) in x's dtype, or any under autocast.
        bn (BatchNorm2dParameters): its vectors are (K,).
        residual, residual_bn, activation, return_moments, backend: as in :func:`resfuse.functional.bn_act`, with the
            convolution's output for x.

    Returns:
        Tensor, or tuple[Tensor, Moments] with return_moments: (N, K, H', W') in the convolution's dtype.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; nothing has been updated.
    """
    _checks.check_image("x", x)
    _checks.check_activation_name(activation)
    cast = autocasts(x.device.type)
    shape = _checks.check_conv(conv, x.shape, x, cast=cast, prefix="conv.")
    _checks.check_norms(x, shape, bn, residual, residual_bn, cast=cast)
    if residual_bn is None and raw_chain.why_not(x, [conv], backend) is None:
        return raw_chain.conv_bn_act(x, (conv, bn), residual, activation, return_moments, backend)
    y, owned = convolve(x, conv, bn), residual_bn is None
    return bn_act(y, bn, residual, residual_bn, activation, backend, owned=owned, return_moments=return_moments)


def conv_bn_act_chain(
    x: Tensor,
    layers: Sequence[tuple[Conv2dParameters, BatchNorm2dParameters]],
    shortcut: Shortcut = None,
    activation: str = "relu",
    last_activation: str | None = None,
    *,
    return_moments: bool = False,
    backend: str | None = None,
    folding: bool | None = None,
) -> Any:
    """Layers in a row and a shortcut around them: out = last_act(BN(conv(... act(BN(conv(x))) ...)) + shortcut).

    The stretch between two pools of a plain network, and the residual unit of any depth.

    Args:
        x (Tensor): (N, C, H, W); float16, bfloat16, float32 or float64; any strides; channels_last is fastest.
        layers (Sequence[tuple[Conv2dParameters, BatchNorm2dParameters]]): one or more; each fits what comes before it,
            weights are in x's dtype, or any under autocast.
        shortcut (Tensor | tuple[Conv2dParameters, BatchNorm2dParameters] | None): what is added: a tensor of the
            output's shape, where x itself is the identity shortcut; or BN(conv(x)), a projection; None adds nothing.
        activation (str): "relu" or "identity", after each normalisation but the last.
        last_activation (str | None): after the sum; None is `activation`.
        return_moments (bool): see the module's description.
        backend (str | None): see :mod:`resfuse.functional`.
        folding (bool | None): as in :func:`basic_block`.

    Returns:
        Tensor, or tuple[Tensor, Moments] with return_moments: (N, K, H', W') in the convolutions' dtype.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; nothing has been updated.
    """
    last_activation = activation if last_activation is None else last_activation
    for name in (activation, last_activation):
        _checks.check_activation_name(name)
    _checks.check_chain(x, layers, shortcut, cast=isinstance(x, Tensor) and autocasts(x.device.type))
    choose("bn_act", x.device.type, x.dtype, backend)  # a missing backend raises before a running statistic changes
    convs = [conv for conv, _ in layers] + ([shortcut[0]] if isinstance(shortcut, tuple) else [])
    if raw_chain.why_not(x, convs, backend) is None:
        options = (activation, last_activation, folding, return_moments, backend)
        return raw_chain.residual_chain(x, list(layers), shortcut, *options)
    y = x
    for conv, bn in layers[:-1]:
        y = bn_act(convolve(y, conv, bn), bn, None, None, activation, backend, owned=True)
    conv, bn = layers[-1]
    y = convolve(y, conv, bn)
    residual: Any = shortcut
    residual_bn = None
    if isinstance(shortcut, tuple):
        projection, residual_bn = shortcut
        residual = convolve(x, projection, residual_bn)
    return bn_act(y, bn, residual, residual_bn, last_activation, backend, owned=True, return_moments=return_moments)


def basic_block(
    x: Tensor,
    conv1: Conv2dParameters,
    bn1: BatchNorm2dParameters,
    conv2: Conv2dParameters,
    bn2: BatchNorm2dParameters,
    shortcut: Shortcut = None,
    activation: str = "relu",
    *,
    return_moments: bool = False,
    backend: str | None = None,
    folding: bool | None = None,
) -> Any:
    """The two-layer residual unit: out = act(BN2(conv2(act(BN1(conv1(x))))) + shortcut).

    Args:
        x (Tensor): (N, C, H, W); float16, bfloat16, float32 or float64; any strides; channels_last is fastest.
        conv1, conv2 (Conv2dParameters): weights in x's dtype, or any under autocast; each fits its input.
        bn1, bn2 (BatchNorm2dParameters): vectors of the convolution's output channels.
        shortcut (Tensor | tuple[Conv2dParameters, BatchNorm2dParameters] | None): what is added: x itself if None, a
            tensor of the output's shape, or BN(conv(x)), a projection, normalised in the pass that adds it.
        activation (str): "relu" or "identity", after each normalisation and after the sum.
        return_moments (bool): see the module's description.
        backend (str | None): see :mod:`resfuse.functional`.
        folding (bool | None): fold the last batch normalisation into its convolution during training, where that is
            1x1 with stride 1, and a 1x1 projection's into the same product; None decides by
            :func:`resfuse.backends.folds_from`.

    Returns:
        Tensor, or tuple[Tensor, Moments] with return_moments: (N, K, H', W') in the convolutions' dtype.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; nothing has been updated.

    Source: He et al. 2015, arXiv:1512.03385, figure 5 left.
    """
    shortcut = x if shortcut is None else shortcut
    options: Any = {"return_moments": return_moments, "backend": backend, "folding": folding}
    return conv_bn_act_chain(x, [(conv1, bn1), (conv2, bn2)], shortcut, activation, **options)


def bottleneck(
    x: Tensor,
    conv1: Conv2dParameters,
    bn1: BatchNorm2dParameters,
    conv2: Conv2dParameters,
    bn2: BatchNorm2dParameters,
    conv3: Conv2dParameters,
    bn3: BatchNorm2dParameters,
    shortcut: Shortcut = None,
    activation: str = "relu",
    *,
    return_moments: bool = False,
    backend: str | None = None,
    folding: bool | None = None,
) -> Any:
    """The three-layer residual unit: out = act(BN3(conv3(act(BN2(conv2(act(BN1(conv1(x))))))) + shortcut).

    Args:
        x, shortcut, activation, return_moments, backend, folding: as in :func:`basic_block`.
        conv1, conv2, conv3 (Conv2dParameters), bn1, bn2, bn3 (BatchNorm2dParameters): the three layers; the stride may
            be on the 3x3 convolution (torchvision's "v1.5") or on the first 1x1 (the paper's).

    Returns:
        Tensor, or tuple[Tensor, Moments] with return_moments: (N, K, H', W') in the convolutions' dtype.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; nothing has been updated.

    Source: He et al. 2015, arXiv:1512.03385, figure 5 right.
    """
    shortcut = x if shortcut is None else shortcut
    options: Any = {"return_moments": return_moments, "backend": backend, "folding": folding}
    return conv_bn_act_chain(x, [(conv1, bn1), (conv2, bn2), (conv3, bn3)], shortcut, activation, **options)


def conv_stats(
    x: Tensor, conv: Conv2dParameters, residual: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Moments]:
    """A convolution and the moments of its output, for whoever normalises it: out = conv(x) + residual.

    Args:
        x (Tensor): (N, C, H, W); float16, bfloat16, float32 or float64; any strides; channels_last is fastest.
        conv (Conv2dParameters): weight (K, C / groups, kH, kW) in x's dtype, or any under autocast.
        residual (Tensor | None): the output's shape, x's dtype and device.
        backend (str | None): see :mod:`resfuse.functional`.

    Returns:
        tuple[Tensor, Moments]: (N, K, H', W') in the convolution's dtype, and its moments, (K,).

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described.
    """
    _checks.check_image("x", x)
    cast = autocasts(x.device.type)
    shape = _checks.check_conv(conv, x.shape, x, cast=cast, prefix="conv.")
    if residual is not None:
        _checks.check_residual(residual, shape, x, cast=cast)
    if raw_chain.why_not(x, [conv], backend) is None:
        return raw_chain.conv_stats(x, conv, residual, backend)
    return add_moments(convolve(x, conv), residual, backend)


def preact_block(
    x: Tensor,
    layers: Sequence[PreactLayer],
    shortcut: Tensor | Conv2dParameters | None = None,
    activation: str = "relu",
    *,
    moments: Moments | None = None,
    return_moments: bool = True,
    backend: str | None = None,
) -> Any:
    """The pre-activation unit: out = conv(act(BN(... conv(act(BN(x))) ...))) + shortcut, and its moments.

    In a chain of units each is given the moments that the one before handed on, so no pass is made for statistics: the
    sum is normalised by its readers.

    Args:
        x (Tensor): (N, C, H, W); float16, bfloat16, float32 or float64; any strides; channels_last is fastest.
        layers (Sequence[tuple[BatchNorm2dParameters | None, Conv2dParameters]]): one or more; each normalisation fits
            what comes before it, weights are in x's dtype, or any under autocast. None in the first says that x comes
            activated, as from a stem: it is read as it is.
        shortcut (Tensor | Conv2dParameters | None): what is added: a tensor of the output's shape, where x itself is
            the identity shortcut; or a convolution of act(BN(x)), a projection; None adds nothing, as in DenseNet.
        activation (str): "relu" or "identity", after each normalisation.
        moments (Moments | None): x's, where whoever wrote x handed them on; else they are taken here.
        return_moments (bool): False where nobody will normalise the output with its own statistics.
        backend (str | None): see :mod:`resfuse.functional`.

    Returns:
        tuple[Tensor, Moments]: (N, K, H', W') in the convolutions' dtype, and its moments, (K,); the Tensor alone with
        return_moments False.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; nothing has been updated.

    Source: He et al. 2016, arXiv:1603.05027, figure 1b; Huang et al. 2017, arXiv:1608.06993, without a shortcut.
    """
    _checks.check_activation_name(activation)
    _checks.check_preact_chain(x, layers, shortcut, moments, cast=isinstance(x, Tensor) and autocasts(x.device.type))
    choose("bn_act", x.device.type, x.dtype, backend)  # a missing backend raises before a running statistic changes
    projection = shortcut if isinstance(shortcut, Conv2dParameters) else None
    convs = [conv for _, conv in layers] + ([] if projection is None else [projection])
    if raw_chain.why_not(x, convs, backend) is None:
        return raw_chain.preact_chain(x, list(layers), shortcut, activation, moments, return_moments, backend)
    y = first = x
    for i, (bn, conv) in enumerate(layers):
        if bn is not None:
            given = moments if i == 0 else None
            y = bn_act(y, bn, None, None, activation, backend, owned=i > 0, moments=given)
        first = y if i == 0 else first
        y = convolve(y, conv, layers[i + 1][0] if i + 1 < len(layers) else None)
    added: Any = convolve(first, projection) if projection is not None else shortcut
    if return_moments:
        return add_moments(y, added, backend)
    return y if added is None else y + added.to(y.dtype)
