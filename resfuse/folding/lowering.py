"""From a plan's steps to `run_plan`'s: shapes, borders, which kernel convolves, chunks of images, packed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse import ops
from resfuse.folding import plan as plans
from resfuse.folding.program import PANEL, Chunk, Pair, Step, StepKind, Value, encode, pixel_step

_NARROW = 16  # channels of an input below which a row of taps is multiplied as one run
_CHUNK_BYTES = 1 << 20  # of what a step reads and writes, for as many images as are taken at once
_TRANSFORMED = 4 * PANEL  # output channels whose weights are transformed at once
_MIN_PIECES = 32  # of a Winograd convolution: below, its larger weight is read for too few products


class Lowering:
    """Steps of a plan that run in one call; `lower` makes their program for one set of input shapes.

    Args:
        steps (Sequence[plans.Step]): steps that the tile engine knows.
        reads (Sequence[int]), writes (Sequence[int]): the values that the caller gives and takes, in order.
        tensors (Mapping[str, Tensor]): what the steps name.
    """

    def __init__(
        self, steps: Sequence[plans.Step], reads: Sequence[int], writes: Sequence[int], tensors: Mapping[str, Tensor]
    ) -> None:
        self.steps, self.reads, self.writes, self.tensors = steps, reads, writes, tensors
        # kept beside the tensors, whose memory may lie on disk until they are packed
        weights = [step.weight for step in steps if isinstance(step, plans.Convolution | plans.Linear)]
        self.weights = {name: tensors[name].shape for name in weights}
        # what kernels multiply: without AVX512_BF16 bfloat16 networks are computed in float32
        self.dtype = ops.tile_operands[tensors[weights[0]].dtype]
        self.constants: list[Tensor] = []
        self._indices: dict[tuple[str, ...], int] = {}

    def weight(self, name: str) -> Tensor:
        """A convolution's or linear layer's weight, as it is packed."""
        return self.tensors[name].to(self.dtype)

    def constant(self, key: tuple[str, ...], make: Callable[[], Tensor]) -> int:
        """The index of a constant that is made once."""
        if key not in self._indices:
            made = make()  # it may fail, and is then asked for again
            self._indices[key] = len(self.constants)
            self.constants.append(made)
        return self._indices[key]

    def lower(self, shapes: Sequence[torch.Size]) -> tuple[list[Tensor], list[int], list[int]]:
        """What `run_plan` takes beside inputs of these shapes: constants, program, sizes of the outputs."""
        draft = _Draft(self, shapes)
        sizes = [size for value in self.writes for size in (draft.images, *draft.shapes[value])]
        return self.constants, draft.encode(), sizes


def _output_size(size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    height, width = ((size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1))
    if min(height, width) < 1:
        raise RuntimeError(f"a window of {kernel} with dilation {dilation} is larger than {size} padded by {padding}")
    return height, width


def _check_channels(step: plans.Step, wanted: int, channels: int) -> None:
    if wanted != channels:
        raise RuntimeError(f"{step.names[0]} takes {wanted} channels, and its input has {channels}")


def _padded(vector: Tensor) -> Tensor:
    return F.pad(vector.detach().float(), (0, -len(vector) % PANEL))


def _winograd_weight(weight: Tensor) -> Tensor:
    """G g G^T by position, each packed: (Lavin and Gray) for F(2x2, 3x3). Little is held beside the result."""
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    packed, begin = torch.empty(0), 0
    for some in weight.split(_TRANSFORMED):
        positions = []
        for down in g:
            taps = _combined(down, some.unbind(2))
            for across in g:
                position = _combined(across, taps.unbind(2)).to(weight.dtype)
                positions.append(ops.pack_weight(position[:, :, None, None], 1))
        part = torch.stack(positions)
        if begin == 0:
            packed = part.new_empty(len(part), part.shape[1] // _panels(some) * _panels(weight))
        packed[:, begin : begin + part.shape[1]] = part
        begin += part.shape[1]
    return packed.flatten()


def _panels(weight: Tensor) -> int:
    """Of this processor's vectors, to which packed output channels are padded."""
    return -(-len(weight) // (2 * ops.tile_lanes))


def _combined(factors: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """The sum of factor * part, in float64."""
    total = torch.zeros_like(parts[0], dtype=torch.float64)
    for factor, part in zip(factors.tolist(), parts, strict=True):
        if factor != 0:
            total.add_(part, alpha=factor)
    return total


def _narrow_weight(weight: Tensor, channels: int) -> Tensor:
    """A row of taps as one run of channels: (K, kW * channels, kH, 1)."""
    wide = F.pad(weight, (0, 0, 0, 0, 0, channels - weight.shape[1]))
    return ops.pack_weight(wide.permute(0, 3, 1, 2).reshape(len(wide), -1, wide.shape[2], 1).contiguous(), 1)


def _with_window(step: Step, pool: plans.MaxPool) -> Step:
    return replace(step, pool_kernel=pool.kernel_size, pool_stride=pool.stride, pool_padding=pool.padding)


class _Draft:
    """One program in the making."""

    def __init__(self, lowering: Lowering, shapes: Sequence[torch.Size]) -> None:
        self.lowering = lowering
        self.dtype, self.images = lowering.dtype, shapes[0][0]
        self.readers: dict[int, list[plans.Step]] = {}
        for step in lowering.steps:
            for value in step.reads:
                self.readers.setdefault(value, []).append(step)
        self.shapes: dict[int, tuple[int, int, int]] = {}
        for value, shape in zip(lowering.reads, shapes, strict=True):
            self.shapes[value] = (shape[1], shape[2], shape[3])
        for step in lowering.steps:
            made = self.shapes[step.output] = self._shape(step)
            if min(made) < 1:
                name = step.names[0] if step.names else type(step).__name__
                raise RuntimeError(f"the input of {name} is too small: {self.shapes[step.input]} would become {made}")
            if isinstance(step, plans.Ending) and step.residual is not None:
                step.check_sum((self.images, *made), (self.images, *self.shapes[step.residual]))
        self.values: list[Value] = []
        self.index: dict[int, int] = {}
        self.steps: list[Step] = []
        self._projections = self._find_projections()
        self._lower()

    # shapes and layout

    def _shape(self, step: plans.Step) -> tuple[int, int, int]:
        channels, height, width = self.shapes[step.input]
        if isinstance(step, plans.Convolution):
            weight = self.lowering.weights[step.weight]
            kernel = (weight[2], weight[3])
            _check_channels(step, weight[1] * step.groups, channels)
            return weight[0], *_output_size((height, width), kernel, step.stride, step.padding, step.dilation)
        if isinstance(step, plans.MaxPool):
            return channels, *_output_size((height, width), step.kernel_size, step.stride, step.padding, (1, 1))
        if isinstance(step, plans.AdaptivePool):
            return channels, 1, 1
        if isinstance(step, plans.Linear):
            weight = self.lowering.weights[step.weight]
            _check_channels(step, weight[1], channels)
            return weight[0], 1, 1
        if isinstance(step, plans.ScaleShiftAct) and step.scale is not None:
            _check_channels(step, len(self.lowering.tensors[step.scale]), channels)
        return channels, height, width

    def _winograd(self, step: plans.Convolution) -> bool:
        """Whether F(2x2, 3x3) computes a convolution."""
        weight = self.lowering.weights[step.weight]
        _, height, width = self.shapes[step.input]
        return (
            tuple(weight[2:]) == (3, 3)
            and (step.stride, step.padding, step.dilation, step.groups) == ((1, 1), (1, 1), (1, 1), 1)
            and min(weight[:2]) >= PANEL
            and self.images * -(-height // 2) * -(-width // 2) >= _MIN_PIECES
        )

    def _halo(self, value: int) -> int:
        """The border that a value's convolutions read."""
        borders = (s for s in self.readers.get(value, []) if isinstance(s, plans.Convolution) and s.input == value)
        return max((max(s.padding) for s in borders if not self._winograd(s)), default=0)

    def _narrow(self, value: int) -> int:
        """Values between the pixels of an input with few channels whose convolutions read rows of taps; else 0."""
        channels, _, width = self.shapes[value]
        readers = self.readers.get(value, [])
        if value not in self.lowering.reads or channels >= _NARROW:
            return 0
        if not all(isinstance(s, plans.Convolution) and s.groups == 1 and s.dilation[1] == 1 for s in readers):
            return 0
        convolutions = [s for s in readers if isinstance(s, plans.Convolution) and s.input == value]
        if len(convolutions) < len(readers):
            return 0
        halo, unit = self._halo(value), 4 // self.dtype.itemsize
        whole = [(width + 2 * halo) * channels, *(s.stride[1] * channels for s in convolutions)]
        whole += [(halo - s.padding[1]) * channels for s in convolutions]
        return channels if all(size % unit == 0 for size in whole) else channels + channels % unit

    def _value(self, value: int) -> int:
        """The index of a value's place, made at its first use."""
        if value not in self.index:
            channels, height, width = self.shapes[value]
            step = self._narrow(value) or pixel_step(channels, self.dtype.itemsize)
            self.index[value] = len(self.values)
            self.values.append(Value(0, 0, self.images, height, width, channels, step, self._halo(value)))
        return self.index[value]

    # steps

    def _lower(self) -> None:
        for index, value in enumerate(self.lowering.reads):
            self.steps.append(Step(StepKind.LOAD, input=index, output=self._value(value)))
        fused: set[int] = set()
        for step in self.lowering.steps:
            if step.output in fused:
                continue
            if isinstance(step, plans.Flatten):
                self.index[step.output] = self._value(step.input)
            elif step.output in self._projections:
                continue
            elif isinstance(step, plans.Convolution):
                pool = self._pool_behind(step)
                if pool is not None:
                    fused.add(pool.output)
                self.steps.append(self._convolution(step, pool))
            else:
                self.steps.append(self._other(step))
        for index, value in enumerate(self.lowering.writes):
            self.steps.append(Step(StepKind.STORE, input=self._value(value), output=index))

    def _pool_behind(self, step: plans.Convolution) -> plans.MaxPool | None:
        """The pool that alone reads a convolution: its rows need not be written."""
        readers = self.readers.get(step.output, [])
        if (
            len(readers) != 1
            or step.output in self.lowering.writes
            or step.residual is not None
            or self._winograd(step)
        ):
            return None
        return readers[0] if isinstance(readers[0], plans.MaxPool) else None

    def _find_projections(self) -> dict[int, plans.Convolution]:
        """The 1x1 convolutions that only another one adds, and which can be a part of its product, by output."""
        made = {s.output: s for s in self.lowering.steps if isinstance(s, plans.Convolution)}
        found = {}
        for step in made.values():
            other = made.get(-1 if step.residual is None else step.residual)
            if other is None or other.output in self.lowering.writes or len(self.readers[other.output]) > 1:
                continue
            plain = other.activation == "identity" and other.residual is None and other.input not in self.lowering.reads
            plain = plain and self.shapes[other.output] == self.shapes[step.output]
            if plain and self._pointwise(other) and self._pointwise(step) and step.stride == (1, 1):
                found[other.output] = other
        return found

    def _pointwise(self, step: plans.Convolution) -> bool:
        weight = self.lowering.weights[step.weight]
        return weight[2:] == (1, 1) and step.padding == (0, 0) and step.groups == 1 and weight[1] % 2 == 0

    def _vector(self, name: str | None, like: int) -> int:
        tensors = self.lowering.tensors
        if name is None:
            return self.lowering.constant(("zeros", str(like)), lambda: _padded(torch.zeros(like)))
        return self.lowering.constant((name,), lambda: _padded(tensors[name]))

    def _sum(self, first: str | None, second: str | None, like: int) -> int:
        if first is None or second is None:
            return self._vector(first or second, like)
        tensors = self.lowering.tensors
        return self.lowering.constant((first, "+", second), lambda: _padded(tensors[first] + tensors[second]))

    def _convolution(self, step: plans.Convolution, pool: plans.MaxPool | None) -> Step:
        channels, _, *kernel = self.lowering.weights[step.weight]
        result = Step(
            StepKind.CONVOLUTION,
            input=self._value(step.input),
            output=self._value(step.output if pool is None else pool.output),
            bias=self._vector(step.bias, channels),
            relu=step.activation == "relu",
            groups=step.groups,
            run=self.shapes[step.input][0],
            kernel=(kernel[0], kernel[1]),
            stride=step.stride,
            padding=step.padding,
            dilation=step.dilation,
            size=self.shapes[step.output][1:],
        )
        if step.residual in self._projections:
            result = self._with_projection(result, step, self._projections[step.residual])
        else:
            residual = -1 if step.residual is None else self._value(step.residual)
            result = replace(self._with_weight(result, step), residual=residual)
        if pool is None:
            return result
        return _with_window(replace(result, kind=StepKind.CONVOLUTION_POOL), pool)

    def _with_weight(self, result: Step, step: plans.Convolution) -> Step:
        """The kernel that convolves, and its weight, packed as it reads it."""
        name, narrow = step.weight, self._narrow(step.input)
        constant, read = self.lowering.constant, self.lowering.weight
        if self._winograd(step):
            weight = constant((name, "winograd"), lambda: _winograd_weight(read(name)))
            return replace(result, kind=StepKind.WINOGRAD, weight=weight)
        if narrow:
            weight = constant((name, "narrow", str(narrow)), lambda: _narrow_weight(read(name), narrow))
            run, dilation = result.kernel[1] * narrow, (step.dilation[0], 1)
            return replace(result, weight=weight, run=run, kernel=(result.kernel[0], 1), dilation=dilation)
        weight = constant((name,), lambda: ops.pack_weight(read(name), step.groups))
        return replace(result, weight=weight)

    def _with_projection(self, result: Step, step: plans.Convolution, other: plans.Convolution) -> Step:
        """One product over the channels of both: [x | projected] [weight | projection]^T."""
        read = self.lowering.weight
        weight = self.lowering.constant(
            (step.weight, other.weight),
            lambda: ops.pack_weight(torch.cat([read(step.weight), read(other.weight)], 1), 1),
        )
        bias = self._sum(step.bias, other.bias, self.lowering.weights[step.weight][0])
        second = self._value(other.input)
        return replace(result, weight=weight, bias=bias, second=second, second_stride=other.stride)

    def _other(self, step: plans.Step) -> Step:
        place = Step(StepKind.MAP, input=self._value(step.input), output=self._value(step.output))
        if isinstance(step, plans.MaxPool):
            return _with_window(replace(place, kind=StepKind.MAX_POOL), step)
        if isinstance(step, plans.AdaptivePool):
            return replace(place, kind=StepKind.GLOBAL_POOL)
        if isinstance(step, plans.Linear):
            return self._linear(place, step)
        assert isinstance(step, plans.ScaleShiftAct)
        scale, shift = (-1 if name is None else self._vector(name, 0) for name in (step.scale, step.shift))
        residual = -1 if step.residual is None else self._value(step.residual)
        return replace(place, residual=residual, weight=scale, bias=shift, relu=step.activation == "relu")

    def _linear(self, place: Step, step: plans.Linear) -> Step:
        """A 1x1 convolution of maps of one pixel."""
        name, read = step.weight, self.lowering.weight
        lanes, channels = self.lowering.weights[name]
        weight = self.lowering.constant((name,), lambda: ops.pack_weight(read(name)[:, :, None, None], 1))
        bias, relu = self._vector(step.bias, lanes), step.activation == "relu"
        return replace(place, kind=StepKind.CONVOLUTION, weight=weight, bias=bias, relu=relu, run=channels)

    # chunks

    def encode(self) -> list[int]:
        """The program, its steps grouped so that what one writes is still in cache when the next reads it."""
        chunks: list[Chunk] = []
        for index in range(len(self.steps)):
            size = max(self._chunk_images(self.steps[index]), chunks[-1].images if chunks else 1)
            if chunks and chunks[-1].images == size:
                chunks[-1] = Chunk(chunks[-1].first, index + 1, size)
            else:
                chunks.append(Chunk(index, index + 1, size))
        self._mark_local(chunks)
        return encode(self.images, self.values, chunks, self.steps, self.dtype.itemsize)

    def _chunk_images(self, step: Step) -> int:
        """As many images as fit into cache, or as make a step's weights the smaller part of what it reads."""
        places = [self.values[value] for value in {*step.reads(), *step.writes()}]
        pixels = sum(v.pixel_step * v.height * v.width for v in places)
        weights = self.lowering.constants[step.weight] if step.weight >= 0 else None
        parts = max(_CHUNK_BYTES // self.dtype.itemsize, 0 if weights is None else weights.numel())
        wanted = min(max(parts // pixels, 1), self.images)
        return self.images if 2 * wanted > self.images else 1 << (wanted.bit_length() - 1)

    def _mark_local(self, chunks: Sequence[Chunk]) -> None:
        """Values that live within a chunk hold its images only."""
        used: dict[int, set[int]] = {}
        for number, chunk in enumerate(chunks):
            for step in self.steps[chunk.first : chunk.last]:
                for value in (*step.reads(), *step.writes()):
                    used.setdefault(value, set()).add(number)
        for value, numbers in used.items():
            if len(numbers) == 1:
                place = self.values[value]
                place.local, place.images = 1, chunks[numbers.pop()].images
