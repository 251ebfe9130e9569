"""Units on ResNet-50's activations: time, bandwidth from a stated byte count beside a copy's, and stock torch's time.

Every result is first checked against float64; a wrong one is not timed. Ours, stock torch and the copy are sampled in
turn, all channels_last, all into memory that is mapped: the copy's target exists, and the allocator keeps what outputs
free, where it can be told so. In fresh memory page faults cost more than the pass, and a copy there is no measure of
bandwidth; bench_models.py has them. Appends to benchmarks/results/units.jsonl, which holds CPUs: a GPU's rows need
--output.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse import BatchNorm2dParameters, functional, models, ops, reference
from resfuse.bench.environment import native_environment
from resfuse.bench.memory import keep_freed_memory
from resfuse.bench.parity import FACTOR, FLOOR, relative_l2
from resfuse.bench.records import append
from resfuse.bench.roofline import bytes_moved
from resfuse.bench.shapes import batch_norm_shapes
from resfuse.bench.timing import compare, interleave, milliseconds, summarise

RESULTS = Path(__file__).parent / "results" / "units.jsonl"
FORMS = ("none", "identity", "raw")
EPS = 1e-5
STEM_CHANNELS, STEM_POOL = 64, (3, 2, 1)


class Inputs:
    """Activations and vectors of one shape and dtype; `of` gives the same values in another dtype."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
        source = {"generator": torch.Generator(device).manual_seed(0), "device": device}
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
            wanted = dtype if value.dim() == 4 or dtype == torch.float64 else torch.float32
            setattr(other, name, value.to(wanted, copy=True).requires_grad_())
        return other

    def affine(self, form: str) -> tuple[Tensor | None, ...]:
        """scale, shift, residual, residual_scale, residual_shift of a form."""
        residual = None if form == "none" else self.residual
        raw = (self.raw_scale, self.raw_shift) if form == "raw" else (None, None)
        return self.scale, self.shift, residual, *raw


Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One row: a unit in one form.

    Attributes:
        unit, form: names, of :data:`resfuse.bench.roofline.PASSES`.
        ours: what is timed, ready to call.
        expected: the same from reference.py, for inputs of any dtype.
        stock: the same mathematics by stock torch operators, or None where stock has no such unit.
    """

    unit: str
    form: str
    ours: Callable[[], Results]
    expected: Callable[[Inputs], Results]
    stock: Callable[[], Any] | None = None


def cases(i: Inputs) -> Iterator[Case]:
    """All rows for one set of inputs."""
    yield Case(
        "moments", "", lambda: ops.moments(i.x), lambda j: reference.moments(j.x),
        lambda: torch.var_mean(i.x, (0, 2, 3), correction=0),
    )  # fmt: skip
    yield Case(
        "add_relu", "", lambda: (ops.add_relu(i.x, i.residual),),
        lambda j: (reference.add_relu(j.x, j.residual),), lambda: torch.relu_(i.x + i.residual),
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

    def stock() -> Tensor:
        z = frozen(i.x, i.scale, i.shift)
        if form == "identity":
            z += i.residual
        elif form == "raw":
            z += frozen(i.residual, i.raw_scale, i.raw_shift)
        return torch.relu_(z)

    zero, one = torch.zeros_like(i.scale), torch.ones_like(i.scale)
    return Case(
        "scale_shift_act", form,
        lambda: (ops.scale_shift_act(i.x, *i.affine(form), True),),
        lambda j: (reference.scale_shift_act(j.x, *j.affine(form)),), stock,
    )  # fmt: skip


def _dz(i: Inputs, form: str) -> Tensor:
    out = reference.scale_shift_act(i.x, *i.affine(form))
    return torch.where(out > 0, i.grad, 0)


def _reduce(i: Inputs, form: str) -> Case:
    out = reference.scale_shift_act(i.x, *i.affine(form)) if form == "identity" else None
    raw = (i.residual, i.raw_scale, i.raw_shift, i.raw_mean) if form == "raw" else (None,) * 4

    def ours() -> Results:
        sums, dz = ops.scale_shift_act_backward_reduce(i.grad, i.x, i.scale, i.shift, i.mean, *raw, out, True)
        return (sums, dz) if form == "identity" else (sums,)

    def expected(j: Inputs) -> Results:
        wanted = [j.shift, j.scale] + ([j.raw_scale] if form == "raw" else [])
        result = reference.scale_shift_act(j.x, *j.affine(form))
        grads = torch.autograd.grad(result, wanted, j.grad.detach())
        # the kernels sum around the mean
        centered = [grads[0], *(g - m * grads[0] for g, m in zip(grads[1:], (j.mean, j.raw_mean), strict=False))]
        sums = torch.stack(centered)
        return (sums, _dz(j, form)) if form == "identity" else (sums,)

    return Case("backward_reduce", form, ours, expected)


def _apply(i: Inputs, form: str) -> Case:
    masked = form == "identity"  # the first pass has left the masked gradient
    grad = _dz(i, form) if masked else i.grad
    moments = (i.grad_mean, i.grad_var)
    raw = (i.residual, i.raw_scale, i.raw_shift, i.raw_mean, *moments) if form == "raw" else (None,) * 6

    def ours() -> Results:
        found = ops.scale_shift_act_backward_apply(
            grad, i.x, i.scale, i.shift, i.mean, *moments, *raw, not masked
        )  # fmt: skip
        return found if form == "raw" else found[:1]

    def expected(j: Inputs) -> Results:
        wanted = [j.x, j.residual] if form == "raw" else [j.x]
        out = reference.scale_shift_act(j.x, *j.affine(form))
        ends = [out, *(end for tensor in wanted for end in reference.moments(tensor))]
        starts = [j.grad, *[j.grad_mean, j.grad_var] * len(wanted)]
        return torch.autograd.grad(ends, wanted, [start.detach() for start in starts])

    return Case("backward_apply", form, ours, expected)


def _pool(i: Inputs) -> Iterator[Case]:
    """The stem's tail, and its backward through the pixels that the forward pass has selected."""
    out, indices = ops.scale_shift_relu_maxpool(i.x, i.scale, i.shift, *STEM_POOL)

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
    yield Case(
        unit, "", lambda: ops.scale_shift_relu_maxpool(i.x, i.scale, i.shift, *STEM_POOL)[:1],
        lambda j: (pooled(j),),
    )  # fmt: skip
    yield Case(
        f"{unit} backward_reduce", "",
        lambda: (ops.scale_shift_relu_maxpool_backward_reduce(*backward, *STEM_POOL),), sums,
    )  # fmt: skip
    moments = (i.grad_mean, i.grad_var)
    yield Case(
        f"{unit} backward_apply", "",
        lambda: (ops.scale_shift_relu_maxpool_backward_apply(*backward, *moments, *STEM_POOL),), grad_x,
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

    ours, theirs = i.of(i.x.dtype), i.of(i.x.dtype)
    yield Case(
        "bn_act forward", form, lambda: (fused(ours, functional.bn_act),),
        lambda j: (fused(j, reference.bn_act),), lambda: stock(theirs),
    )  # fmt: skip
    our_end, their_end = fused(ours, functional.bn_act), stock(theirs)
    yield Case(
        "bn_act backward", form, lambda: backward(ours, our_end),
        lambda j: backward(j, fused(j, reference.bn_act), False), lambda: backward(theirs, their_end),
    )  # fmt: skip


def check(case: Case, i: Inputs) -> None:
    """Refuse a result that is further from float64 than FACTOR times plain torch in the same dtype, plus the floor."""
    exact, plain, ours = case.expected(i.of(torch.float64)), case.expected(i.of(i.x.dtype)), case.ours()
    for k, (mine, other, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        error, bound = relative_l2(mine, truth), FACTOR * relative_l2(other, truth) + FLOOR[i.x.dtype]
        if not error <= bound or mine.shape != truth.shape:
            name = f"{case.unit} {case.form}, output {k}, {tuple(i.x.shape)} {i.x.dtype}"
            raise SystemExit(f"refusing to time a wrong result: {name} is off by {error:.2e}, allowed {bound:.2e}")


def measure(case: Case, i: Inputs, rounds: int) -> dict[str, Any]:
    """Time one row; the record without its environment."""
    source, target = i.x.detach(), torch.zeros_like(i.x)
    functions: dict[str, Callable[[], object]] = {"resfuse": case.ours, "copy": lambda: target.copy_(source)}
    if case.stock is not None:
        functions["stock"] = case.stock
    samples = interleave(functions, rounds=rounds, warmup=2, seconds_per_sample=0.004)
    moved = bytes_moved(case.unit, case.form, i.x.shape, i.x.element_size())
    bandwidth = {
        name: count / summarise(samples[name]).median / 1e9
        for name, count in (("resfuse", moved), ("copy", 2 * i.x.numel() * i.x.element_size()))
    }
    return {
        "unit": case.unit,
        "form": case.form,
        "bytes": moved,
        "times": {name: milliseconds(values) for name, values in samples.items()},
        "gb_per_s": round(bandwidth["resfuse"], 2),
        "copy_gb_per_s": round(bandwidth["copy"], 2),
        "share_of_copy": round(bandwidth["resfuse"] / bandwidth["copy"], 4),
        "over_stock": compare(samples, "resfuse", "stock")._asdict() if case.stock is not None else None,
    }


def shapes(batch: int, size: int, everything: bool) -> list[tuple[int, ...]]:
    """What ResNet-50 normalises: every distinct shape, or the widest of each map size."""
    found = [s.shape for s in batch_norm_shapes(models.resnet50, (batch, 3, size, size))]
    if everything:
        return found
    return [max((s for s in found if s[2] == side), key=lambda s: s[1]) for side in sorted({s[2] for s in found})[::-1]]


def show(record: dict[str, Any]) -> None:
    """Print one row."""
    times = record["times"]
    stock = (
        f"{times['stock']['median_ms']:9.3f} {1 / record['over_stock']['of_medians']:6.2f}x"
        if record["over_stock"]
        else ""
    )
    ours, name = times["resfuse"], record["unit"].removeprefix("scale_shift_relu_")
    print(
        f"{name:23} {record['form']:9} {record['dtype']:9} {'x'.join(map(str, record['shape'])):>15} "
        f"{ours['median_ms']:9.3f} ({ours['p20_ms']:.3f}-{ours['p80_ms']:.3f})".ljust(88)
        + f"{record['gb_per_s']:7.1f} {record['share_of_copy']:8.0%} {stock}",
        flush=True,
    )


def main() -> None:
    """Measure every row and append its record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224, help="side of the network's input")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--only", nargs="+", metavar="UNIT", help="these units' rows alone; the results keep the others"
    )
    parser.add_argument("--all-shapes", action="store_true", help="every distinct shape, not one a map size")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="small and few; the report leaves such records out")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.quick:
        options.batch, options.size, options.rounds = 2, 64, 3
    where = native_environment(options.dtypes, options.device)
    memory = "kept" if options.device == "cuda" or keep_freed_memory() else "fresh"  # torch keeps a GPU's
    print(f"{'unit':23} {'residual':9} {'dtype':9} {'shape':>15} {'ms (p20-p80)':>22}".ljust(88)
          + f"{'GB/s':>7} {'of copy':>8} {'stock ms':>9} speed-up")  # fmt: skip
    for shape in shapes(options.batch, options.size, options.all_shapes):
        for name in options.dtypes:
            inputs = Inputs(shape, getattr(torch, name), options.device)
            fixed = {"suite": "units", "quick": options.quick, "environment": where, "memory": memory,
                     "backend": "native", "layout": "channels_last", "dtype": name, "shape": list(shape)}  # fmt: skip
            for case in cases(inputs):
                if options.only is not None and case.unit not in options.only:
                    continue
                check(case, inputs)
                record = {**fixed, **measure(case, inputs, options.rounds)}
                append(options.output, record)
                show(record)


if __name__ == "__main__":
    main()
