"""Parity: how far a training step is from the same step in float64, beside how far stock PyTorch is.

The bound: an error is at most FACTOR times stock's in the same dtype, plus one floor per dtype, and always nearer to
the exact step than zeros are.

Errors are relative in the L2 norm: |ours - exact| / |exact|. Quantities are judged as one long vector over all their
tensors, and gradients and statistics also by single tensors. A tensor whose exact values have cancelled, as the
gradient of a bias that batch statistics take away again, has no size of its own: it is judged beside its whole layer.

Stock is given in both memory layouts, whose kernels round differently. Outputs, losses and statistics depend smoothly
on rounding: there the more exact layout counts. Gradients do not: a ReLU whose input is within rounding of zero may
let its gradient through or not, and in float32 a step has so few of these that the errors of two equally exact
implementations can be a thousandfold apart (1e-6 with none, 1e-3 with one). There the less exact layout counts, which
is the one that met some. A batch may still be unlucky: where float32 gradients break the bound, more batches are taken
(:func:`over_batches`), and their medians tell wrong gradients from luck. In a network that meets some in every other
batch medians are luck, too. What is wrong is wrong in every batch, and such a ReLU only adds to an error: there the
smallest errors are compared, and the network's blocks are judged one by one besides.

A deep network without shortcuts amplifies rounding so far that in 16 bits stock's own gradients have little in common
with the exact ones. A bound that zeros would meet proves nothing (:attr:`Verdict.proves_nothing`), and such a network's
outputs depend on luck as gradients do; :func:`resfuse.bench.networks.check` then judges its blocks one by one.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from resfuse.bench.gate import RefusedError
from resfuse.fusion import fuse

FACTOR = 2.0
# what a correct result may be off by where stock happens to be exact: a few roundings, or one quarter of a coarse one
FLOOR = {torch.float64: 1e-15, torch.float32: 5e-7, torch.float16: 2.5e-4, torch.bfloat16: 2e-3}
# a tensor below this share of its layer has cancelled
CANCELLED = 1e-2

Step = dict[str, dict[str, Tensor]]
"""What one training step leaves behind: for each quantity, its tensors by name."""


class Errors(NamedTuple):
    """Relative L2 errors of one quantity: all its tensors as one vector, and the median and worst of single tensors."""

    together: float
    median: float
    worst: float
    worst_name: str


class Verdict(NamedTuple):
    """One comparison with its bound; `quantity` names the quantity, and "median" or "worst" of its single tensors."""

    quantity: str
    ours: float
    stock: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the error is within the bound and nearer to the exact result than zeros; False for NaN."""
        return self.ours <= self.bound and self.ours < 1

    @property
    def proves_nothing(self) -> bool:
        """Whether the error is within a bound that zeros would meet too."""
        return self.ours <= self.bound and self.bound >= 1

    @property
    def failed(self) -> str:
        """The rule that a verdict that does not hold has broken."""
        if not self.ours <= self.bound:
            return f"is off by {self.ours:.2e}, allowed {self.bound:.2e}"
        return f"is off by {self.ours:.2e}, no nearer to the exact result than zeros are"


def training_step(model: nn.Module, images: Tensor, labels: Tensor, autocast: torch.dtype | None = None) -> Step:
    """One forward and backward of the mean cross entropy.

    Args:
        model (nn.Module): in training mode; its running statistics are updated and its gradients replaced.
        images (Tensor): (N, C, H, W) in the model's dtype.
        labels (Tensor): (N,) int64.
        autocast (torch.dtype | None): lower precision to run in.

    Returns:
        Step: outputs, losses (one per image: a mean alone may be right by luck), gradients, running_mean, running_var.
    """
    model.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        outputs = model(images)
    logits = outputs if autocast is None else outputs.float()
    losses = F.cross_entropy(logits, labels, reduction="none")
    losses.mean().backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    return {
        "outputs": {"logits": outputs.detach()},
        "losses": {"losses": losses.detach()},
        "gradients": gradients,
        "running_mean": {n: b for n, b in buffers.items() if n.endswith("running_mean")},
        "running_var": {n: b for n, b in buffers.items() if n.endswith("running_var")},
    }


def weaken(model: nn.Module, weight: float = 0.2) -> nn.Module:
    """Give the last normalisation of every residual branch `weight` for its ones, in place; returns the model.

    Branches of trained networks are weaker than their shortcuts. With ones, bfloat16 gradients of a random ResNet-50
    have nothing in common with the exact ones, in any implementation, nor outputs of a small batch.
    """
    for module in model.modules():
        last = getattr(module, "bn3", None) or getattr(module, "bn2", None)
        if isinstance(last, nn.BatchNorm2d):
            nn.init.constant_(last.weight, weight)
    return model


def condition(model: nn.Module) -> nn.Module:
    """Make a random residual network's gradients mean something, in place; returns the model.

    Its branches are weakened. Running statistics start from zero, so that a step leaves this batch's alone. Nothing is
    dropped: each step would drop something else.
    """
    for module in weaken(model).modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.zero_()
            module.running_var.zero_()
    return model


def relative_l2(value: Tensor, exact: Tensor, size: float | None = None) -> float:
    """|value - exact| / size in float64, size |exact| if not given; 0 where both are zero, infinite where size is."""
    exact = exact.double()
    distance = (value.double() - exact).norm().item()
    size = exact.norm().item() if size is None else size
    if size > 0:
        return distance / size
    return 0.0 if distance == 0 else math.inf


def step_errors(step: Step, exact: Step) -> dict[str, Errors]:
    """Errors of every quantity of a step against the same step in float64."""
    return {quantity: _errors(step[quantity], tensors) for quantity, tensors in exact.items()}


def _errors(values: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> Errors:
    if values.keys() != exact.keys():
        raise ValueError(f"both steps must hold the same tensors, got {sorted(values.keys() ^ exact.keys())} in one")
    sizes = _sizes(exact)
    single = {name: relative_l2(values[name], exact[name], sizes[name]) for name in exact}
    finite = {name: math.inf if math.isnan(error) else error for name, error in single.items()}
    worst = max(finite, key=finite.__getitem__)
    together = relative_l2(_one_vector(values), _one_vector(exact))
    return Errors(together, statistics.median(finite.values()), finite[worst], worst)


def _sizes(exact: Mapping[str, Tensor]) -> dict[str, float]:
    """What each tensor's error is relative to: its norm, or its layer's where it has cancelled."""
    own = {name: tensor.double().norm().item() for name, tensor in exact.items()}
    layers: dict[str, float] = {}
    for name, size in own.items():
        layer = name.rpartition(".")[0]
        layers[layer] = math.hypot(layers.get(layer, 0.0), size)
    whole = {name: layers[name.rpartition(".")[0]] for name in own}
    return {name: size if size >= CANCELLED * whole[name] else whole[name] for name, size in own.items()}


def _one_vector(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


_JUDGED = {
    "outputs": ("together",),
    "losses": ("together",),
    "gradients": ("together", "median", "worst"),
    "running_mean": ("together", "worst"),
    "running_var": ("together", "worst"),
}
_LABELS = {"together": "", "median": ", median", "worst": ", worst"}


def judge(ours: Mapping[str, Errors], stock: Sequence[Mapping[str, Errors]], dtype: torch.dtype) -> list[Verdict]:
    """Hold the errors of a step to those of stock PyTorch.

    Args:
        ours (Mapping[str, Errors]): from :func:`step_errors`.
        stock (Sequence[Mapping[str, Errors]]): the same for stock, in each memory layout; the most exact counts, for
            gradients, and wherever these prove nothing, the least exact.
        dtype (torch.dtype): precision of the step, which decides the floor.

    Returns:
        list[Verdict]: one for each quantity and way of looking at it.
    """
    verdicts = []
    amplifies = FACTOR * max(errors["gradients"].together for errors in stock) + FLOOR[dtype] >= 1
    for quantity, kinds in _JUDGED.items():
        which = max if quantity == "gradients" or amplifies else min
        for kind in kinds:
            theirs = which(getattr(errors[quantity], kind) for errors in stock)
            error = getattr(ours[quantity], kind)
            verdicts.append(Verdict(quantity + _LABELS[kind], error, theirs, FACTOR * theirs + FLOOR[dtype]))
    return verdicts


def judge_fused(
    network: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype, backend: str = "native"
) -> list[Verdict]:
    """Hold the training step of a network, fused on the kernels of a backend, to the stock one's.

    Args:
        network (nn.Module): stock, in float32 and training mode; its weights are conditioned in place, see
            :func:`condition`.
        images (Tensor): (N, C, H, W) float32, on the network's device. labels (Tensor): (N,) int64.
        dtype (torch.dtype): precision of the step: float32, or what autocast runs in.
        backend (str): "native" or "triton".

    Returns:
        list[Verdict]: as :func:`judge`; every step starts from the same state.
    """
    condition(network)
    autocast = None if dtype == torch.float32 else dtype

    def step(layout: torch.memory_format, *, fused: bool = False, exact: bool = False) -> Step:
        precision = torch.float64 if exact else torch.float32
        model = copy.deepcopy(network).to(precision, memory_format=layout)  # type: ignore[call-overload]
        if fused:
            fuse(model, backend=backend, strict=True)
        data = images.to(precision, memory_format=layout)
        return training_step(model, data, labels, None if exact else autocast)

    layouts = (torch.channels_last, torch.contiguous_format)
    exact = step(layouts[0], exact=True)
    stock = [step_errors(step(layout), exact) for layout in layouts]
    return judge(step_errors(step(layouts[0], fused=True), exact), stock, dtype)


def over_batches(
    judged: Sequence[Sequence[Verdict]],
    dtype: torch.dtype,
    summary: Callable[[Iterable[float]], float] = statistics.median,
) -> list[Verdict]:
    """One verdict for each of those of several batches: of gradients by the medians, else the one nearest its bound.

    `summary` takes another number of both errors than their median.
    """
    found = []
    for same in zip(*judged, strict=True):
        if same[0].quantity.startswith("gradients"):
            ours = summary(math.inf if math.isnan(verdict.ours) else verdict.ours for verdict in same)
            stock = summary(verdict.stock for verdict in same)
            found.append(Verdict(same[0].quantity, ours, stock, FACTOR * stock + FLOOR[dtype]))
        else:
            found.append(max(same, key=lambda verdict: math.inf if not verdict.holds else verdict.ours / verdict.bound))
    return found


def refuse_a_wrong_result(verdicts: Sequence[Verdict], name: str) -> None:
    """Raise RefusedError for the first verdict that does not hold, before anything is timed."""
    for verdict in verdicts:
        if not verdict.holds:
            raise RefusedError(f"refusing to time a wrong result: {name} {verdict.quantity} {verdict.failed}")
