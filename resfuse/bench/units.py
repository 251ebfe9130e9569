"""Units, measured: time, bandwidth from a stated byte count beside a copy's, and the time of stock torch operators.

Every result is first checked against float64; a wrong one is not timed. Ours, stock torch and the copy are sampled in
turn, all channels_last, all into memory that is mapped: the copy's target exists, and the allocator keeps what outputs
free, where it can be told so. In fresh memory page faults cost more than the pass, and a copy there is no measure of
bandwidth; :mod:`resfuse.bench.networks` has them.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from resfuse import ops
from resfuse.backends import why_not_raw
from resfuse.bench import conv_cases as convolving
from resfuse.bench.conv_cases import ConvInputs, form_of
from resfuse.bench.gate import PEER_BOUND, Gate, Refusals
from resfuse.bench.memory import keep_freed_memory
from resfuse.bench.parity import FACTOR, FLOOR, relative_l2
from resfuse.bench.records import Record
from resfuse.bench.roofline import PASSES, POOL_PASSES
from resfuse.bench.shapes import ConvShape, batch_norm_shapes, conv_shapes
from resfuse.bench.timing import compare, interleave, milliseconds, summarise
from resfuse.bench.unit_cases import STEM_CHANNELS, Case, Inputs, Results, cases
from resfuse.bench.unit_peers import unit_peer
from resfuse.bench.workload import stock

CONVOLUTIONS = convolving.UNITS + convolving.EXPANDING
UNITS = (*dict.fromkeys([unit for unit, _ in (*PASSES, *POOL_PASSES)]), "finalize", *CONVOLUTIONS)
_QUICK = {"batch": 2, "size": 64, "rounds": 7}


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Attributes:
        device: "cpu" or "cuda".
        backend: whose kernels: "native", or "triton", with whose convolutions its composition is measured.
        dtypes: names, as "float32".
        model: the network whose activations and convolutions give the shapes.
        batch, size: of the network's input.
        shape: one activation (N, C, H, W) in place of the network's; leaves convolutions out.
        units: of UNITS; empty for all of them.
        everything: every distinct shape, not one a map size.
        peers: names of further implementations to time beside stock: of :data:`resfuse.bench.unit_peers.PACKAGES`.
        peer_seconds: no peer is made ready later than this after the start; rows say where one is missing.
        rounds: samples of each.
        quick: few rounds of small shapes; tables leave such rows out.
    """

    device: str = "cpu"
    backend: str = "native"
    dtypes: Sequence[str] = ("float32", "bfloat16")
    model: str = "resnet50"
    batch: int = 16
    size: int = 224
    shape: tuple[int, ...] | None = None
    units: Sequence[str] = ()
    everything: bool = False
    peers: Sequence[str] = ()
    peer_seconds: float = math.inf
    rounds: int = 15
    quick: bool = False

    @classmethod
    def chosen(cls, quick: bool = False, **options: Any) -> Plan:
        """A plan whose options that are None are the defaults, of a quick run where it is one."""
        given = {name: value for name, value in options.items() if value is not None}
        return cls(quick=quick, **{**(_QUICK if quick else {}), **given})


def check(case: Case, i: Inputs | ConvInputs, gate: Gate) -> Results:
    """Let `ours`, `stock` and the others of a case pass the gate.

    Ours must be at most FACTOR times as far from float64 as plain torch in the same dtype, plus the floor. Who rounds
    as he likes, must be the same function.

    Returns:
        the results in float64.

    Raises:
        RefusedError: a result is wrong.
    """
    exact, plain = case.expected(i.of(torch.float64)), case.expected(i.of(i.x.dtype))
    for k, (mine, other, truth) in enumerate(zip(case.ours(), plain, exact, strict=True)):
        bound = FACTOR * relative_l2(other, truth) + FLOOR[i.x.dtype]
        gate.check("resfuse", _error(mine, truth), bound, f"output {k}")
    for name, beside in _beside(case).items():
        check_peer(name, beside(), exact, gate)
    return exact


def _beside(case: Case) -> dict[str, Callable[[], Results]]:
    """What a case has to be timed beside ours."""
    return ({} if case.stock is None else {"stock": case.stock}) | case.others


def check_peer(name: str, found: Results, exact: Results, gate: Gate) -> None:
    """Let another implementation pass if it is the same function.

    Raises:
        RefusedError: it is not.
    """
    for k, (theirs, truth) in enumerate(zip(found, exact, strict=True)):
        gate.check(name, _error(theirs, truth), PEER_BOUND, f"output {k}")


def _error(found: Tensor, exact: Tensor) -> float:
    return relative_l2(found, exact) if found.shape == exact.shape else float("inf")


def measure(case: Case, i: Inputs | ConvInputs, rounds: int, peer_names: Sequence[str] = ()) -> Record:
    """Check and time one row; the record without its environment.

    Raises:
        RefusedError: a result is wrong; nothing has been timed.
    """
    gate = Gate(f"{case.unit} {case.form}, {tuple(i.x.shape)} {i.x.dtype}")
    exact = check(case, i, gate)
    source, target = i.x.detach(), torch.zeros_like(i.x)
    functions: dict[str, Callable[[], object]] = {"resfuse": case.ours, "copy": lambda: target.copy_(source)}
    gate.check("copy", _error(target.copy_(source), source), 0.0)
    functions |= _beside(case)
    for name in peer_names:
        rival = unit_peer(name, case, i)
        if rival is not None:
            check_peer(name, rival(), exact, gate)
            functions[name] = rival
    del exact
    samples = gate.interleave(functions, rounds=rounds, warmup=2, seconds_per_sample=0.004)
    bandwidth = {
        name: count / summarise(samples[name]).median / 1e9
        for name, count in (("resfuse", case.bytes), ("copy", 2 * i.x.numel() * i.x.element_size()))
    }
    ratios = {f"resfuse/{n}": compare(samples, "resfuse", n)._asdict() for n in functions if n not in _OURS}
    return {
        "unit": case.unit,
        "form": case.form,
        **case.more,
        "bytes": case.bytes,
        "flops": case.flops,
        "times": {name: milliseconds(values) for name, values in samples.items()},
        "gb_per_s": round(bandwidth["resfuse"], 2),
        "copy_gb_per_s": round(bandwidth["copy"], 2),
        "share_of_copy": round(bandwidth["resfuse"] / bandwidth["copy"], 4),
        "over_stock": ratios.get("resfuse/stock"),
        "ratios": ratios,
    }


_OURS = ("resfuse", "copy")
_SHOWN = (*_OURS, "stock")


def activation_shapes(plan: Plan) -> list[tuple[int, ...]]:
    """What the network normalises: every distinct shape, or the widest of each map size; or the plan's own one."""
    if plan.shape is not None:
        return [plan.shape]
    build = partial(stock, plan.model)
    found = [s.shape for s in batch_norm_shapes(build, (plan.batch, 3, plan.size, plan.size))]
    if plan.everything:
        return found
    return [max((s for s in found if s[2] == side), key=lambda s: s[1]) for side in sorted({s[2] for s in found})[::-1]]


def convolution_shapes(plan: Plan) -> list[ConvShape]:
    """What the network convolves after its first layer: every distinct geometry, or the widest of each map and form.

    One that expands, and so is measured as more units, is not of one form with one that does not.
    """
    if plan.shape is not None or (plan.backend == "native" and plan.device != "cpu"):
        return []  # on a GPU conv_stats has no native kernel
    convs = conv_shapes(partial(stock, plan.model), (plan.batch, 3, plan.size, plan.size))[1:]
    if plan.backend == "triton":
        return _pointwise_of_each_stage(convs)
    found: dict[Any, ConvShape] = {}
    for conv in convs:
        key: Any = conv[1:] if plan.everything else (form_of(conv), convolving.units_of(conv), conv.output[2])
        if key not in found or conv.output[1] * conv.input[1] > found[key].output[1] * found[key].input[1]:
            found[key] = conv
    return list(found.values())


def _pointwise_of_each_stage(convs: Sequence[ConvShape]) -> list[ConvShape]:
    """Those that Triton's fused kernel is made for, 1x1 of stride 1: the most frequent that widens at each map, and the
    most frequent that does not."""
    pointwise = [conv for conv in convs if conv.weight[2:] == (1, 1) and conv.input[2:] == conv.output[2:]]
    frequency = Counter(conv[1:] for conv in pointwise)
    found: dict[tuple[int, bool], ConvShape] = {}
    for conv in pointwise:
        key = (conv.output[2], conv.output[1] > conv.input[1])
        if frequency[conv[1:]] > (frequency[found[key][1:]] if key in found else 0):
            found[key] = conv
    return list(found.values())


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """GFLOP/s of a product of two square matrices by torch: the roof of what is computed."""
    size = 1024 if device == "cpu" else 8192  # a GPU is not filled by less
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    samples = interleave({"mm": lambda: a @ b}, rounds=7, warmup=2)["mm"]
    return round(2 * size**3 / min(samples) / 1e9, 1)


def _wanted(plan: Plan, unit: str) -> bool:
    return not plan.units or unit in plan.units


def _convolves(plan: Plan, dtype: torch.dtype) -> bool:
    """Whether the backend has convolutions in this dtype, and they are wanted."""
    if plan.backend == "native":
        served = dtype in ops.tile_dtypes
    else:
        served = why_not_raw(plan.device, dtype, requested=plan.backend) is None
    return served and any(_wanted(plan, unit) for unit in CONVOLUTIONS)


def rows(plan: Plan, dtype: torch.dtype) -> Iterator[tuple[Case, Inputs | ConvInputs]]:
    """What is measured in one dtype, made one after another: one shape's operands live at a time."""
    if any(_wanted(plan, unit) for unit in UNITS if unit not in CONVOLUTIONS):
        for shape in activation_shapes(plan):
            i = Inputs(shape, dtype, plan.device, plan.backend)
            yield from ((case, i) for case in cases(i) if _wanted(plan, case.unit))
    if _convolves(plan, dtype):
        for conv in convolution_shapes(plan):
            j = ConvInputs(conv, dtype, plan.device, plan.backend)
            yield from ((case, j) for case in convolving.conv_cases(j, conv) if _wanted(plan, case.unit))


def count(plan: Plan) -> int:
    """How many rows a run of a plan has."""
    shapes = activation_shapes(plan)
    passes = [unit for unit in (*(unit for unit, _ in PASSES), "finalize") if _wanted(plan, unit)]
    pools = [unit for unit, _ in POOL_PASSES if _wanted(plan, unit)]
    each = len(shapes) * len(passes) + sum(shape[1] == STEM_CHANNELS for shape in shapes) * len(pools)
    each_conv = map(convolving.units_of, convolution_shapes(plan))
    products = sum(_wanted(plan, unit) for units in each_conv for unit in units)
    return sum(each + (products if _convolves(plan, getattr(torch, name)) else 0) for name in plan.dtypes)


def why_nothing(plan: Plan) -> str:
    """Why a plan has no row."""
    if plan.shape is not None:
        return "convolutions take their shapes from a network: leave out --shape"
    if plan.device != "cpu":
        return f"convolutions have no native kernels on {plan.device}"
    return f"convolutions have tile kernels in {', '.join(map(_name, ops.tile_dtypes)) or 'no dtype on this processor'}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(plan: Plan, where: Record, tick: Callable[[float], object] = lambda _: None) -> Iterator[Record]:
    """Measure row after row.

    Args:
        plan (Plan): what.
        where (Record): the environment record.
        tick (Callable[[float], object]): told the share of a row done; a unit's row is one piece.

    Yields:
        Record: a row, as soon as it is measured.

    Raises:
        RefusedError: at the end, where results were wrong; their rows were left out.
    """
    refusals = Refusals()
    memory = "kept" if plan.device == "cuda" or keep_freed_memory() else "fresh"  # torch keeps a GPU's
    start = time.monotonic()
    for name in plan.dtypes:
        dtype = getattr(torch, name)
        rate = matmul_rate(dtype, plan.device)
        for case, i in rows(plan, dtype):
            fixed = {"suite": "units", "quick": plan.quick, "environment": where, "memory": memory,
                     "backend": plan.backend, "layout": "channels_last", "dtype": name, "shape": list(i.x.shape),
                     "matmul_gflop_per_s": rate}  # fmt: skip
            peers = plan.peers if time.monotonic() - start < plan.peer_seconds else ()
            with refusals.skip():
                record = {**fixed, **measure(case, i, plan.rounds, peers)}
                record |= under_the_roof(record)
                if plan.peers and not peers and case.stock is not None:
                    record["missing"] = dict.fromkeys(plan.peers, f"{plan.peer_seconds:.0f} s of the run had passed")
                tick(1.0)
                yield record
    refusals.end()


def under_the_roof(record: Record) -> Record:
    """The time that a measured copy and a measured product allow a row's bytes and operations, and ours as its share.

    Bytes are every operand once, so a copy out of a cache or a short one can put a row above 1.
    """
    median = record["times"]["resfuse"]["median_ms"]
    least = max(record["share_of_copy"] * median, record["flops"] / record["matmul_gflop_per_s"] / 1e6)
    return {"roofline_ms": round(least, 6), "share_of_roofline": round(least / median, 4)}


HEAD = (
    f"{'unit':24} {'form':13} {'dtype':9} {'shape':>15} {'ms (p20-p80)':>24} {'GB/s':>7} {'of copy':>8} "
    f"{'stock ms':>9}  speed-up (95 %)"
)


def line(record: Record) -> str:
    """One row as text, under HEAD."""
    ours, stock = record["times"]["resfuse"], record["times"].get("stock")
    time = f"{ours['median_ms']:.3f} ({ours['p20_ms']:.3f}-{ours['p80_ms']:.3f})"
    text = (
        f"{record['unit'].removeprefix('scale_shift_relu_'):24} {record['form']:13} {record['dtype']:9} "
        f"{'x'.join(map(str, record['shape'])):>15} {time:>24} {record['gb_per_s']:7.1f} {record['share_of_copy']:8.0%}"
    )
    others = [f"{name} {found['median_ms']:.3f} ms" for name, found in record["times"].items() if name not in _SHOWN]
    beside = "" if stock is None else f"{stock['median_ms']:9.3f}  {speed_up(record['over_stock'])}"
    return "  ".join(part for part in (f"{text} {beside}".rstrip(), *others))


def speed_up(ratio: Record) -> str:
    """A ratio of times as how many times faster, with its interval where there is one."""
    interval = "" if ratio.get("low") is None else f" ({1 / ratio['high']:.2f} to {1 / ratio['low']:.2f})"
    return f"{1 / ratio['of_medians']:.2f}x{interval}"
