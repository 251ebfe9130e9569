"""Tuning: the candidates of convolution units measured on this GPU, as the table that :mod:`resfuse.choices` reads.

Shapes are those of models, run without memory. Both candidates get the same tensors; a shape for which their results
differ by more than roundings is not timed, and the run stops.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resfuse import choices, models, ops
from resfuse.bench.environment import environment
from resfuse.bench.shapes import conv_shapes
from resfuse.bench.timing import Samples, interleave, summarise

DTYPES = (torch.bfloat16, torch.float16)
_ROUNDS, _SECONDS = 7, 0.02
_ROUNDINGS = 8  # results of two candidates differ by no more, relative in the L2 norm, in units of the dtype's eps

Functions = Mapping[str, Callable[[], Any]]
Timer = Callable[[Functions], Samples]


class Case(NamedTuple):
    """A convolution at one size: what a row of the table is about."""

    conv: choices.Conv
    input: tuple[int, ...]
    output: tuple[int, ...]
    reads_image: bool  # nothing normalises its input

    @property
    def pixels(self) -> int:
        """Of the output, over all images."""
        return self.output[0] * self.output[2] * self.output[3]


def cases(names: Iterable[str], batch: int, size: int) -> list[Case]:
    """The distinct convolutions of networks of :mod:`resfuse.models`."""
    found: dict[Case, None] = {}
    for name in names:
        shapes = conv_shapes(lambda name=name: models.get_model(name), (batch, 3, size, size))  # type: ignore[misc]
        for i, shape in enumerate(shapes):
            conv = choices.Conv.of(shape.weight, shape.stride, shape.padding, shape.dilation, shape.groups)
            found[Case(conv, shape.input, shape.output, i == 0)] = None
    return list(found)


def operands(case: Case, dtype: torch.dtype, device: str) -> dict[str, tuple[Any, ...]]:
    """The arguments of both units: random tensors, y's moments and their gradients among them."""
    conv = case.conv

    def image(shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)

    def vectors(*size: int) -> Tensor:
        return torch.rand(*size, device=device) + 0.5

    x, y, grad = image(case.input), image(case.output), image(case.output)
    fan = conv.channels // conv.groups * conv.kernel[0] * conv.kernel[1]
    weight = torch.randn(conv.out_channels, conv.channels // conv.groups, *conv.kernel, device=device) / fan**0.5
    prologue = (None, None) if case.reads_image else (vectors(2, conv.channels), vectors(conv.channels))
    source = (x, *prologue, weight.contiguous(memory_format=torch.channels_last), True)
    pairs = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    moments = (y, None, *(vectors(conv.out_channels) for _ in range(3)), False)
    backward = (grad, *moments, *source, *pairs, None, not case.reads_image, True)
    return {"conv_stats": (*source, *pairs, True), "conv_stats_backward": backward}


def check_agreement(unit: str, case: Case, results: Mapping[str, Sequence[Tensor]]) -> None:
    """That the candidates computed the same thing.

    Raises:
        RuntimeError: they did not.
    """
    first, second = results.values()
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        error = (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)
        allowed = _ROUNDINGS * torch.finfo(first[0].dtype if first[0].numel() else first[1].dtype).eps
        if not error <= allowed and a.numel() > 0:
            raise RuntimeError(
                f"{unit} of {case.input} with {case.conv}: result {index} of the candidates {', '.join(results)} "
                f"differs by {error:.1e}, allowed {allowed:.1e}: nothing is timed"
            )


def time_candidates(functions: Functions) -> Samples:
    """Interleaved samples on the GPU."""
    return interleave(functions, rounds=_ROUNDS, seconds_per_sample=_SECONDS)


def measure(
    case: Case, dtype: torch.dtype, device: str, candidates: Mapping[str, Any], timer: Timer = time_candidates
) -> list[dict[str, Any]]:
    """A row of the table for each unit: the candidates' results are compared, then timed."""
    rows = []
    for unit, arguments in operands(case, dtype, device).items():
        functions = {
            name: functools.partial(getattr(candidate, unit), *arguments) for name, candidate in candidates.items()
        }
        check_agreement(unit, case, {name: function() for name, function in functions.items()})
        samples = timer(functions)
        row: dict[str, Any] = {"unit": unit, "dtype": str(dtype).removeprefix("torch."), "conv": case.conv.as_list()}
        row["pixels"] = case.pixels
        row |= {f"{name}_ms": round(1e3 * summarise(samples[name]).median, 6) for name in functions}
        rows.append(row)
    return rows


def _measured(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row of the table is about."""
    return row["unit"], row["dtype"], tuple(row["conv"]), row["pixels"]


def write(device: str, rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any], directory: Path) -> Path:
    """The table of a device, by its name: these rows, and of one that is there what they do not measure again.

    The record is the last run's.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / choices.file_name(device)
    kept = json.loads(path.read_text())["rows"] if path.is_file() else []
    merged = list({_measured(row): row for row in (*kept, *rows)}.values())
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps({"device": device, "environment": dict(record), "rows": merged}, indent=1) + "\n")
    whole.replace(path)
    choices.table_of.cache_clear()
    return path


def tune(
    device: str = "cuda",
    names: Sequence[str] = ("resnet50",),
    dtypes: Sequence[torch.dtype] = DTYPES,
    *,
    batch: int = 64,
    size: int = 224,
    tick: Callable[[], object] = lambda: None,
) -> Path:
    """Measure the candidates over networks' convolutions; each row is kept in the user's cache directory at once.

    Args:
        device (str): "cuda", or "cuda:1".
        names (Sequence[str]): networks, as :func:`resfuse.models.list_models` names them.
        dtypes (Sequence[torch.dtype]): of the activations.
        batch, size (int): images, and their height and width; a measurement speaks for maps up to twice larger.
        tick (Callable[[], object]): called after every shape, for a progress bar.

    Returns:
        Path: the table, to which this run has added; calls in later processes read it.

    Raises:
        RuntimeError: there is no GPU or no Triton kernel for it, or it has no room for ours, or candidates disagree.
        ValueError: a network has no such name.
    """
    kind = torch.device(device).type
    if kind != "cuda" or not torch.cuda.is_available():
        raise RuntimeError(f"tune measures kernels on a GPU, and there is none as {device!r}: nothing was measured")
    if (reason := ops.missing_triton["cuda"]) is not None:
        raise RuntimeError(f"tune needs Triton's kernels: {reason}")
    if not choices.has_room(torch.cuda.current_device() if (index := torch.device(device).index) is None else index):
        raise RuntimeError(f"tune has nothing to choose from: {device!r} has too little shared memory for our products")
    from resfuse._triton.candidates import CANDIDATES

    name, record, directory = torch.cuda.get_device_name(device), environment("cuda"), choices.user_directory()
    path = write(name, (), record, directory)
    for case in cases(names, batch, size):
        for dtype in dtypes:
            path = write(name, measure(case, dtype, device, CANDIDATES), record, directory)
        tick()
    return path
