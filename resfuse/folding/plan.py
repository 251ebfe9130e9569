"""The plan of a folded network: what is computed, in order, as plain data; engines decide how.

Values are numbered: 0 is the network's input, and each step writes one value that no other step writes. Tensors are
named; they lie beside the plan, in a dict or in the buffers of the folded module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

INPUT = 0
"""The value that the caller gives."""

ACTIVATIONS = {
    "identity": 0,
    "relu": 0,
    "relu6": 0,
    "silu": 0,
    "gelu": 0,
    "hardswish": 0,
    "hardsigmoid": 0,
    "mish": 0,
    "sigmoid": 0,
    "tanh": 0,
    "leaky_relu": 1,
    "elu": 1,
    "hardtanh": 2,
}
"""What may end a step, by torch.nn.functional's name, and how many numbers it takes."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class Step:
    """out = f(input); subclasses say which f. `names` are the source's modules that it stands for, in their order."""

    input: int
    output: int
    names: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[int, ...]:
        """The values that the step reads, the input first."""
        return (self.input,)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the tensors that the step reads."""
        return ()


@dataclass(frozen=True)
class Ending(Step):
    """A step that may end by adding a value and by an activation: out = act(f(input) + residual, *scalars)."""

    activation: str = "identity"
    residual: int | None = None
    scalars: tuple[float, ...] = ()

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.input,) if self.residual is None else (self.input, self.residual)

    def check_sum(self, shape: Sequence[int], residual: Sequence[int]) -> None:
        """Raise RuntimeError unless the two that are added have one shape: for engines that repeat no values."""
        if tuple(shape) != tuple(residual):
            raise RuntimeError(
                f"{self.names[0] if self.names else 'a step'} gives {tuple(shape)} and adds {tuple(residual)}: this "
                "engine adds equal shapes only, backend='reference' repeats the smaller"
            )


@dataclass(frozen=True)
class Convolution(Ending):
    """out = act(conv(input, weight) + bias + residual).

    weight (K, C / groups, kH, kW) in the plan's dtype, bias (K,) in its accumulation dtype; pairs are (vertical,
    horizontal), padding is with zeros on both sides.
    """

    weight: str = ""
    bias: str | None = None
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class ScaleShiftAct(Ending):
    """out = act(input * scale + shift + residual), scale and shift (C,) in the accumulation dtype, or both absent."""

    scale: str | None = None
    shift: str | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        return () if self.scale is None or self.shift is None else (self.scale, self.shift)


@dataclass(frozen=True)
class Linear(Step):
    """out = act(input @ weight^T + bias, *scalars), weight (K, C) in the plan's dtype, bias (K,) as a convolution's."""

    activation: str = "identity"
    scalars: tuple[float, ...] = ()
    weight: str = ""
    bias: str | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class MaxPool(Step):
    """out = max_pool2d(input), padded with -inf."""

    kernel_size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False


@dataclass(frozen=True)
class AveragePool(Step):
    """out = avg_pool2d(input)."""

    kernel_size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True


@dataclass(frozen=True)
class AdaptivePool(Step):
    """out = adaptive_avg_pool2d(input, output_size); (1, 1) is the global average, (N, C, 1, 1)."""

    output_size: Pair = (1, 1)


@dataclass(frozen=True)
class Flatten(Step):
    """out = flatten(input, 1): (N, C * H * W), a view where strides allow."""


@dataclass(frozen=True)
class PadShortcut(Step):
    """out[n, c, h, w] = input[n, c, stride * h, stride * w], and zeros for the channels that are appended."""

    stride: int = 1
    channels: int = 0


@dataclass(frozen=True)
class Concatenate(Step):
    """out = cat([input, *others], 1)."""

    others: tuple[int, ...] = ()

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.input, *self.others)


@dataclass(frozen=True)
class Stock(Step):
    """out = module(input): what is not folded, called as it is. `module` is its name in the folded module."""

    module: str = ""


_KINDS: dict[str, type[Step]] = {
    kind.__name__: kind
    for kind in (
        Convolution,
        ScaleShiftAct,
        Linear,
        MaxPool,
        AveragePool,
        AdaptivePool,
        Flatten,
        PadShortcut,
        Concatenate,
        Stock,
    )
}


class Plan(NamedTuple):
    """Steps in an order in which they can run, and the value that is the result."""

    steps: tuple[Step, ...]
    output: int

    def readers(self) -> dict[int, int]:
        """How often each value is read; the result is read by the caller, too."""
        count = {INPUT: 0} | {step.output: 0 for step in self.steps}
        for value in (*(value for step in self.steps for value in step.reads), self.output):
            count[value] += 1
        return count

    def dying(self) -> tuple[tuple[int, ...], ...]:
        """For each step the values that nobody reads after it: their memory is free then, or may be written over.

        The network's input and its result never are.
        """
        last = {value: index for index, step in enumerate(self.steps) for value in step.reads}
        kept = (INPUT, self.output)
        return tuple(
            tuple(dict.fromkeys(v for v in step.reads if last[v] == index and v not in kept))
            for index, step in enumerate(self.steps)
        )

    def to_data(self) -> dict[str, Any]:
        """The plan as dicts, lists, strings and numbers."""
        return {"steps": [{"kind": type(step).__name__, **asdict(step)} for step in self.steps], "output": self.output}


def plan_from_data(data: Mapping[str, Any]) -> Plan:
    """The plan that :meth:`Plan.to_data` described.

    Raises:
        ValueError: the data describe no plan: an unknown kind or field, or a value that is read before it is written.
    """
    plan = Plan(tuple(_step_from_data(item) for item in data["steps"]), data["output"])
    _check_order(plan.steps, plan.output)
    return plan


def _step_from_data(item: Mapping[str, Any]) -> Step:
    options: dict[str, Any] = dict(item)
    kind = _KINDS.get(options.pop("kind", ""))
    if kind is None or not options.keys() <= {field.name for field in fields(kind)}:
        raise ValueError(f"no step of a plan is {dict(item)!r}")
    pairs = {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    step = kind(**(options | pairs))
    if ACTIVATIONS.get(getattr(step, "activation", "identity")) != len(getattr(step, "scalars", ())):
        raise ValueError(f"no activation of a plan ends {step}")
    return step


def _check_order(steps: Iterable[Step], output: int) -> None:
    written = {INPUT}
    for step in steps:
        if not written.issuperset(step.reads) or step.output in written:
            raise ValueError(f"the plan reads a value before it is written, or writes one twice: {step}")
        written.add(step.output)
    if output not in written:
        raise ValueError(f"the plan's result is value {output}, which no step writes")
