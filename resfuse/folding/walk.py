"""The walk through a model in eval: what each module computes, as steps of a plan in which nothing is merged yet.

A rule is a function that writes the steps of one class of modules. Rules of single layers are here, those of blocks and
networks in :mod:`resfuse.folding.families`. A subclass that overrides no forward goes by its base's rule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from resfuse.folding import plan as plans
from resfuse.folding.plan import INPUT, Pair, Plan, Step
from resfuse.fusion import known_class
from resfuse.nn import FusedBlock

Rule = Callable[["Walk", Any, str, int], int]
"""Writes the steps of (module, its qualified name) for an input value; returns the value of the result."""

RULES: dict[str, Rule] = {}
"""By the full name of the class, so that nothing is imported to ask whether a module is of it."""

# a class that defines one of these computes something else than its base
_FORWARDS = {
    "__call__", "forward", "_forward_impl", "_conv_forward", "_check_input_dim", "_stem", "_body", "_activated", "_run",
    "_squeeze", "bn_function",
}  # fmt: skip


_TAKES_MORE: set[Rule] = set()
"""Rules of classes that unknown modules may call with more than one tensor."""


def rule(*classes: str, takes_more: bool = False) -> Callable[[Rule], Rule]:
    """Register a function as the rule of classes, given by their full names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(classes, function))
        if takes_more:
            _TAKES_MORE.add(function)
        return function

    return register


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a module. A fused block goes by that of its stock class, a registered one by that of its mixin."""
    for base in type(module).__mro__:
        found = None if issubclass(base, FusedBlock) else RULES.get(_full_name(base))
        if found is not None:
            return found
        if not issubclass(base, FusedBlock) and not _FORWARDS.isdisjoint(vars(base)):
            break
    registered: Any = known_class(module) or nn.Module
    mixins = (_full_name(base) for base in registered.__mro__ if issubclass(base, FusedBlock))
    return next((RULES[name] for name in mixins if name in RULES), None)


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def joined(name: str, child: str) -> str:
    """The qualified name of a child, or of a tensor."""
    return f"{name}.{child}" if name else child


def _pair(value: Any) -> Pair:
    """Two numbers, from one, from two, or from a sequence of one, as torch's functions take them."""
    values = (value,) if isinstance(value, int) else tuple(value)
    first, second = values * 2 if len(values) == 1 else values
    return int(first), int(second)


class Walk:
    """The steps, tensors and stock modules that have been found so far.

    Args:
        dtype (torch.dtype): in which normalisations are folded.
        nested (Callable): makes the folded copy of a known module inside an unknown one; None where it must stay.

    Attributes:
        steps: in order. tensors: what they read, in `dtype`. modules: copies of what is not folded. reasons: why not.
    """

    def __init__(self, dtype: torch.dtype, nested: Callable[[nn.Module, str], nn.Module | None]) -> None:
        self.dtype = dtype
        self.steps: list[Step] = []
        self.tensors: dict[str, Tensor] = {}
        self.modules: dict[str, nn.Module] = {}
        self.reasons: dict[str, str] = {}
        self._nested = nested
        self._names: dict[int, str] = {}
        self._overwritten: dict[int, int] = {}

    def plan(self, output: int) -> Plan:
        return Plan(tuple(self.steps), self._now(output))

    @property
    def writes_input(self) -> bool:
        """Whether a module works in place on what the caller gives, who may read it afterwards."""
        return INPUT in self._overwritten

    def _now(self, value: int) -> int:
        """What the tensor that was this value holds now, after modules that work in place."""
        while value in self._overwritten:
            value = self._overwritten[value]
        return value

    def call(self, module: nn.Module | None, name: str, x: int) -> int:
        """module(x), by its rule or as it is; None is the identity."""
        if module is None:
            return x
        name = self._names.setdefault(id(module), name)  # a shared module has one name
        found = rule_of(module)
        if found is None:
            return self.stock(module, name, x, f"resfuse folds no {type(module).__name__}")
        check_plain(module, name)
        return found(self, module, name, x)

    def child(self, module: nn.Module, name: str, child: str, x: int) -> int:
        """module.child(x)."""
        found = getattr(module, child)
        if not isinstance(found, nn.Module | None):
            raise TypeError(f"{joined(name, child)} must be an nn.Module to be folded, got {type(found).__name__}")
        return self.call(found, joined(name, child), x)

    def children(self, module: nn.Module, name: str, x: int) -> int:
        """All children, one after the other."""
        for child in module._modules:
            x = self.child(module, name, child, x)
        return x

    def write(self, kind: type[Step], x: int, name: str | None = None, **options: Any) -> int:
        """Append a step; returns the value it writes."""
        output = INPUT + 1 + len(self.steps)
        if options.get("residual") is not None:
            options["residual"] = self._now(options["residual"])
        if "others" in options:
            options["others"] = tuple(self._now(value) for value in options["others"])
        self.steps.append(kind(self._now(x), output, names=() if name is None else (name,), **options))
        return output

    def tensor(self, name: str, child: str, value: Tensor | None) -> str | None:
        """Keep a copy of a tensor, in the dtype of folding; returns its name."""
        if value is None:
            return None
        full = joined(name, child)
        self.tensors[full] = value.detach().to(self.dtype, copy=True)
        return full

    def activation(
        self, x: int, activation: str, name: str | None = None, scalars: tuple[float, ...] = (), inplace: bool = False
    ) -> int:
        """`inplace`: whoever reads x from now on reads the result."""
        output = self.write(plans.ScaleShiftAct, x, name, activation=activation, scalars=scalars)
        if inplace:
            self._overwritten[self._now(x)] = output
        return output

    def add(self, x: int, residual: int) -> int:
        return self.write(plans.ScaleShiftAct, x, residual=residual)

    def stock(self, module: nn.Module, name: str, x: int, reason: str) -> int:
        """module(x), called as it is; known parts of an unknown module are folded inside its copy."""
        if name not in self.modules:
            memo = {}
            for path, part in known_parts(module):
                folded = self._nested(part, joined(name, path))
                if folded is None:
                    reason += f"; {joined(name, path)} writes its input"
                else:
                    memo[id(part)] = folded
            self.modules[name] = copy.deepcopy(module, memo)
            self.reasons[name] = reason
        return self.write(plans.Stock, x, name, module=name)


def known_parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The parts of an unknown module that fold, by qualified name: the largest that have a rule and hold a norm.

    A Sequential of blocks stays: the module may go through it, or take a slice.
    """
    found: list[tuple[str, nn.Module]] = []

    def visit(part: nn.Module, path: str) -> None:
        for name, child in part.named_children():
            if _folds_alone(child):
                found.append((joined(path, name), child))
            else:
                visit(child, joined(path, name))

    visit(module, "")
    return found


def _folds_alone(module: nn.Module) -> bool:
    found = rule_of(module)
    if found is None or found in _TAKES_MORE:
        return False
    if found is sequential and all(any(True for _ in child.children()) for child in module.children()):
        return False
    return any(rule_of(inner) is batch_norm for inner in module.modules() if inner is not module)


def check_plain(module: nn.Module, name: str) -> None:
    """Raise ValueError if folding a module would drop what something else has attached to it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks):
        raise ValueError(f"{name or 'the model'} has a hook, which folding would drop: remove it first")
    if parametrize.is_parametrized(module):
        raise ValueError(
            f"{name or 'the model'} has a parametrization, which folding would drop: "
            "call torch.nn.utils.parametrize.remove_parametrizations first"
        )
    if "forward" in module.__dict__:
        raise ValueError(f"{name or 'the model'} has its own forward, which folding would drop")


@rule("torch.nn.modules.conv.Conv2d")
def conv2d(walk: Walk, conv: nn.Conv2d, name: str, x: int) -> int:
    padding = _zero_padding(conv)
    if padding is None:
        return walk.stock(conv, name, x, f"it pads with {conv.padding_mode!r} and {conv.padding!r}")
    return walk.write(
        plans.Convolution,
        x,
        name,
        weight=walk.tensor(name, "weight", conv.weight),
        bias=walk.tensor(name, "bias", conv.bias),
        stride=_pair(conv.stride),
        padding=padding,
        dilation=_pair(conv.dilation),
        groups=conv.groups,
    )


def _zero_padding(conv: nn.Conv2d) -> Pair | None:
    """How many zeros stand on both sides; None where they are no zeros, or not as many on both."""
    if conv.padding_mode != "zeros":
        return None
    if not isinstance(conv.padding, str):
        return _pair(conv.padding)
    if conv.padding == "valid":
        return 0, 0
    both = [d * (k - 1) for d, k in zip(_pair(conv.dilation), _pair(conv.kernel_size), strict=True)]
    return None if any(zeros % 2 for zeros in both) else (both[0] // 2, both[1] // 2)


@rule(
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.batchnorm.SyncBatchNorm",
    "torchvision.ops.misc.FrozenBatchNorm2d",
)
def batch_norm(walk: Walk, bn: Any, name: str, x: int) -> int:
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError(f"{name or 'the model'} has no running statistics to fold: it normalises by the batch's")
    mean, var = (statistic.detach().to(walk.dtype) for statistic in (bn.running_mean, bn.running_var))
    scale = torch.rsqrt(var + bn.eps)
    scale = scale if bn.weight is None else bn.weight.detach().to(walk.dtype) * scale
    shift = -mean * scale if bn.bias is None else bn.bias.detach().to(walk.dtype) - mean * scale
    scaled = walk.tensor(name, "scale", scale), walk.tensor(name, "shift", shift)
    return walk.write(plans.ScaleShiftAct, x, name, scale=scaled[0], shift=scaled[1])


@rule("torch.nn.modules.linear.Linear")
def linear(walk: Walk, layer: nn.Linear, name: str, x: int) -> int:
    weight, bias = walk.tensor(name, "weight", layer.weight), walk.tensor(name, "bias", layer.bias)
    return walk.write(plans.Linear, x, name, weight=weight, bias=bias)


# by class: its function, and the attributes that are this function's numbers
_ACTIVATIONS = {
    "ReLU": ("relu",),
    "ReLU6": ("relu6",),
    "SiLU": ("silu",),
    "GELU": ("gelu",),
    "Hardswish": ("hardswish",),
    "Hardsigmoid": ("hardsigmoid",),
    "Mish": ("mish",),
    "Sigmoid": ("sigmoid",),
    "Tanh": ("tanh",),
    "LeakyReLU": ("leaky_relu", "negative_slope"),
    "ELU": ("elu", "alpha"),
    "Hardtanh": ("hardtanh", "min_val", "max_val"),
}


@rule(*(f"torch.nn.modules.activation.{kind}" for kind in _ACTIVATIONS))
def activation(walk: Walk, module: nn.Module, name: str, x: int) -> int:
    kind = next(base.__name__ for base in type(module).__mro__ if base.__name__ in _ACTIVATIONS)
    if getattr(module, "approximate", "none") != "none":
        return walk.stock(module, name, x, "it approximates")
    function, *numbers = _ACTIVATIONS[kind]
    scalars = tuple(float(getattr(module, number)) for number in numbers)
    return walk.activation(x, function, name, scalars, getattr(module, "inplace", False))


@rule("torch.nn.modules.pooling.MaxPool2d")
def max_pool(walk: Walk, pool: nn.MaxPool2d, name: str, x: int) -> int:
    if pool.return_indices:
        return walk.stock(pool, name, x, "it returns indices")
    return walk.write(
        plans.MaxPool,
        x,
        name,
        kernel_size=_pair(pool.kernel_size),
        stride=_pair(pool.stride),
        padding=_pair(pool.padding),
        dilation=_pair(pool.dilation),
        ceil_mode=pool.ceil_mode,
    )


@rule("torch.nn.modules.pooling.AvgPool2d")
def average_pool(walk: Walk, pool: nn.AvgPool2d, name: str, x: int) -> int:
    if pool.divisor_override is not None:
        return walk.stock(pool, name, x, "it has a divisor of its own")
    return walk.write(
        plans.AveragePool,
        x,
        name,
        kernel_size=_pair(pool.kernel_size),
        stride=_pair(pool.stride),
        padding=_pair(pool.padding),
        ceil_mode=pool.ceil_mode,
        count_include_pad=pool.count_include_pad,
    )


@rule("torch.nn.modules.pooling.AdaptiveAvgPool2d")
def adaptive_pool(walk: Walk, pool: nn.AdaptiveAvgPool2d, name: str, x: int) -> int:
    size = pool.output_size
    if size is None or (not isinstance(size, int) and None in size):
        return walk.stock(pool, name, x, "it keeps a size of its input")
    return walk.write(plans.AdaptivePool, x, name, output_size=_pair(size))


@rule("torch.nn.modules.flatten.Flatten")
def flatten(walk: Walk, module: nn.Flatten, name: str, x: int) -> int:
    if (module.start_dim, module.end_dim) != (1, -1):
        return walk.stock(module, name, x, f"it flattens from {module.start_dim} to {module.end_dim}")
    return walk.write(plans.Flatten, x, name)


@rule(
    "torch.nn.modules.linear.Identity",
    *(
        f"torch.nn.modules.dropout.{kind}"
        for kind in ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout")
    ),
)
def identity(walk: Walk, module: nn.Module, name: str, x: int) -> int:
    return x


@rule("torch.nn.modules.container.Sequential", "resfuse.models.checkpointing.CheckpointedSequential")
def sequential(walk: Walk, module: nn.Module, name: str, x: int) -> int:
    return walk.children(module, name, x)
