"""The units that are measured: each as our kernel, by reference.py, and by stock torch operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse import BatchNorm2dParameters, functional, ops, reference
from resfuse.bench.roofline import bytes_moved, operations

FORMS = ("none", "identity", "raw")
EPS = 1e-5
STEM_CHANNELS, STEM_POOL = 64, (3, 2, 1)

Results = tuple[Tensor, ...]


class Inputs:
    """Activations and vectors of one shape and dtype; `of` gives the same values in another dtype."""

    backend: str
    x: Tensor
    residual: Tensor
    grad: Tensor
    scale: Tensor
    shift: Tensor
    raw_scale: Tensor
    raw_shift: Tensor
    grad_mean: Tensor
    grad_var: Tensor

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", backend: str = "native"
    ) -> None:
        self.backend = backend
        source: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        for name in ("x", "residual", "grad"):
            value = torch.randn(shape, **source).to(dtype)
            setattr(self, name, value.contiguous(memory_format=torch.channels_last))
        for name in ("scale", "shift", "raw_scale", "raw_shift", "grad_mean", "grad_var"):
            setattr(self, name, torch.randn(shape[1], **source))
        self.mean, self.var = reference.moments(self.x)
        self.raw_mean, self.raw_var = reference.moments(self.residual)

    def of(self, dtype: torch.dtype) -> Inputs:
        """Copies to differentiate with respect to; activations in `dtype`, vectors in float32 at least."""
        other = object.__new__(Inputs)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                wanted = dtype if value.dim() == 4 or dtype == torch.float64 else torch.float32
                value = value.to(wanted, copy=True).requires_grad_()
            setattr(other, name, value)
        return other

    @property
    def kernels(self) -> Any:
        """The operators of the backend that is measured."""
        return ops if self.backend == "native" else ops.of(self.backend)

    def affine(self, form: str) -> Any:
        """scale, shift, residual, residual_scale, residual_shift of a form."""
        residual = None if form == "none" else self.residual
        raw = (self.raw_scale, self.raw_shift) if form == "raw" else (None, None)
        return self.scale, self.shift, residual, *raw


@dataclass(frozen=True)
class Case:
    """One row: a unit in one form.

    Attributes:
        unit, form: names, of :data:`resfuse.bench.roofline.PASSES`, or of a convolution.
        ours: what is timed, ready to call.
        expected: the same from reference.py, for inputs of any dtype.
        bytes, flops: of one call, by the counts that :mod:`resfuse.bench.roofline` states.
        stock: the same mathematics by stock torch operators, or None where stock has no such unit.
        more: what else tells the row apart, as a convolution's weight.
        others: further ways of ours to compute it, by name, which are timed beside the first.
    """

    unit: str
    form: str
    ours: Callable[[], Results]
    expected: Callable[[Any], Results]
    bytes: int
    flops: int
    stock: Callable[[], Results] | None = None
    more: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Callable[[], Results]] = field(default_factory=dict)


def _case(
    unit: str,
    form: str,
    i: Inputs,
    ours: Callable[[], Results],
    expected: Callable[[Inputs], Results],
    stock: Callable[[], Results] | None = None,
) -> Case:
    moved = bytes_moved(unit, form, i.x.shape, i.x.element_size())
    return Case(unit, form, ours, expected, moved, operations(unit, form, i.x.shape), stock)


def _finalize(i: Inputs) -> Case:
    """Statistics into scale and shift: four vectors read and two written, seven operations a channel."""

    def stock() -> Results:
        scale = torch.rsqrt(i.var + EPS) * i.scale
        return scale, i.shift - i.mean * scale

    count = i.x.numel() // i.x.shape[1]
    return Case(
        "finalize", "", lambda: i.kernels.finalize(i.mean, i.var, count, i.scale, i.shift, None, None, None, None, EPS),
        lambda j: reference.finalize(j.mean, j.var, j.scale, j.shift, EPS),
        6 * i.mean.numel() * i.mean.element_size(), 7 * i.mean.numel(), stock,
    )  # fmt: skip


def cases(i: Inputs) -> Iterator[Case]:
    """All rows for one set of inputs."""
    yield _case(
        "moments", "", i, lambda: i.kernels.moments(i.x), lambda j: reference.moments(j.x),
        lambda: torch.var_mean(i.x, (0, 2, 3), correction=0)[::-1],
    )  # fmt: skip
    yield _finalize(i)
    yield _case(
        "add_relu", "", i, lambda: (i.kernels.add_relu(i.x, i.residual),),
        lambda j: (reference.add_relu(j.x, j.residual),), lambda: (torch.relu_(i.x + i.residual),),
    )  # fmt: skip
    if i.x.shape[1] == STEM_CHANNELS:
        yield from _pool(i)
    for form in FORMS:
        yield _scale_shift_act(i, form)
        yield _reduce(i, form)
        yield _apply(i, form)
        yield from _bn_act(i, form)


def _scale_shift_act(i: Inputs, form: str) -> Case:
    def frozen(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.batch_norm(x, zero, one, scale, shift, False, 0.0, 0.0)

    def stock() -> Results:
        z = frozen(i.x, i.scale, i.shift)
        if form == "identity":
            z += i.residual
        elif form == "raw":
            z += frozen(i.residual, i.raw_scale, i.raw_shift)
        return (torch.relu_(z),)

    zero, one = torch.zeros_like(i.scale), torch.ones_like(i.scale)
    return _case(
        "scale_shift_act", form, i,
        lambda: (i.kernels.scale_shift_act(i.x, *i.affine(form), True),),
        lambda j: (reference.scale_shift_act(j.x, *j.affine(form)),), stock,
    )  # fmt: skip


def _dz(i: Inputs, form: str) -> Tensor:
    out = reference.scale_shift_act(i.x, *i.affine(form))
    return torch.where(out > 0, i.grad, 0)


def _reduce(i: Inputs, form: str) -> Case:
    out = reference.scale_shift_act(i.x, *i.affine(form)) if form == "identity" else None
    raw = (i.residual, i.raw_scale, i.raw_shift, i.raw_mean) if form == "raw" else (None,) * 4

    def ours() -> Results:
        sums, dz = i.kernels.scale_shift_act_backward_reduce(i.grad, i.x, i.scale, i.shift, i.mean, *raw, out, True)
        return (sums, dz) if form == "identity" else (sums,)

    def expected(j: Inputs) -> Results:
        wanted = [j.shift, j.scale] + ([j.raw_scale] if form == "raw" else [])
        result = reference.scale_shift_act(j.x, *j.affine(form))
        grads = torch.autograd.grad(result, wanted, j.grad.detach())
        # the kernels sum around the mean
        centered = [grads[0], *(g - m * grads[0] for g, m in zip(grads[1:], (j.mean, j.raw_mean), strict=False))]
        sums = torch.stack(centered)
        return (sums, _dz(j, form)) if form == "identity" else (sums,)

    return _case("backward_reduce", form, i, ours, expected)


def _apply(i: Inputs, form: str) -> Case:
    masked = form == "identity"  # the first pass has left the masked gradient
    grad = _dz(i, form) if masked else i.grad
    moments = (i.grad_mean, i.grad_var)
    raw = (i.residual, i.raw_scale, i.raw_shift, i.raw_mean, *moments) if form == "raw" else (None,) * 6

    def ours() -> Results:
        found = i.kernels.scale_shift_act_backward_apply(
            grad, i.x, i.scale, i.shift, i.mean, *moments, *raw, not masked
        )  # fmt: skip
        return found if form == "raw" else found[:1]

    def expected(j: Inputs) -> Results:
        wanted = [j.x, j.residual] if form == "raw" else [j.x]
        out = reference.scale_shift_act(j.x, *j.affine(form))
        ends = [out, *(end for tensor in wanted for end in reference.moments(tensor))]
        starts = [j.grad, *[j.grad_mean, j.grad_var] * len(wanted)]
        return torch.autograd.grad(ends, wanted, [start.detach() for start in starts])

    return _case("backward_apply", form, i, ours, expected)


def _pool(i: Inputs) -> Iterator[Case]:
    """The stem's tail, and its backward through the pixels that the forward pass has selected."""
    out, indices = i.kernels.scale_shift_relu_maxpool(i.x, i.scale, i.shift, *STEM_POOL)

    def grad(j: Inputs) -> Tensor:
        part = j.grad.detach()[..., : out.shape[2], : out.shape[3]]
        return part.contiguous(memory_format=torch.channels_last)

    def pooled(j: Inputs) -> Tensor:
        return reference.scale_shift_relu_maxpool(j.x, j.scale, j.shift, *STEM_POOL)

    def sums(j: Inputs) -> Results:
        shift, scale = torch.autograd.grad(pooled(j), [j.shift, j.scale], grad(j))
        return (torch.stack([shift, scale - j.mean * shift]),)  # the kernels sum around the mean

    def grad_x(j: Inputs) -> Results:
        starts = [grad(j), j.grad_mean.detach(), j.grad_var.detach()]
        return torch.autograd.grad([pooled(j), *reference.moments(j.x)], [j.x], starts)

    backward = (grad(i), indices, i.x, i.scale, i.shift, i.mean)
    unit = "scale_shift_relu_maxpool"
    yield _case(
        unit, "", i, lambda: i.kernels.scale_shift_relu_maxpool(i.x, i.scale, i.shift, *STEM_POOL)[:1],
        lambda j: (pooled(j),),
    )  # fmt: skip
    yield _case(
        f"{unit} backward_reduce", "", i,
        lambda: (i.kernels.scale_shift_relu_maxpool_backward_reduce(*backward, *STEM_POOL),), sums,
    )  # fmt: skip
    moments = (i.grad_mean, i.grad_var)
    yield _case(
        f"{unit} backward_apply", "", i,
        lambda: (i.kernels.scale_shift_relu_maxpool_backward_apply(*backward, *moments, *STEM_POOL),), grad_x,
    )  # fmt: skip


def _bn_act(i: Inputs, form: str) -> Iterator[Case]:
    """The composition, forward with its graph and backward, as a network in training calls it."""

    def norm(j: Inputs, raw: bool) -> BatchNorm2dParameters:
        weight, bias = (j.raw_scale, j.raw_shift) if raw else (j.scale, j.shift)
        return BatchNorm2dParameters(None, None, weight, bias, True, 0.1, EPS)

    def fused(j: Inputs, run: Callable[..., Tensor]) -> Tensor:
        return run(
            j.x, norm(j, False), None if form == "none" else j.residual, norm(j, True) if form == "raw" else None
        )

    def stock(j: Inputs) -> Tensor:
        z = F.batch_norm(j.x, None, None, j.scale, j.shift, True, 0.1, EPS)
        if form == "identity":
            z += j.residual
        elif form == "raw":
            z += F.batch_norm(j.residual, None, None, j.raw_scale, j.raw_shift, True, 0.1, EPS)
        return torch.relu_(z)

    def wanted(j: Inputs) -> list[Tensor]:
        return [j.x, j.scale, j.shift, *{"none": [], "identity": [j.residual],
                                         "raw": [j.residual, j.raw_scale, j.raw_shift]}[form]]  # fmt: skip

    def backward(j: Inputs, end: Tensor, keep: bool = True) -> Results:
        return torch.autograd.grad(end, wanted(j), j.grad.detach(), retain_graph=keep)

    bn_act = partial(functional.bn_act, backend=i.backend)
    ours, theirs = i.of(i.x.dtype), i.of(i.x.dtype)
    yield _case(
        "bn_act forward", form, i, lambda: (fused(ours, bn_act),),
        lambda j: (fused(j, reference.bn_act),), lambda: (stock(theirs),),
    )  # fmt: skip
    our_end, their_end = fused(ours, bn_act), stock(theirs)
    yield _case(
        "bn_act backward", form, i, lambda: backward(ours, our_end),
        lambda j: backward(j, fused(j, reference.bn_act), False), lambda: backward(theirs, their_end),
    )  # fmt: skip
