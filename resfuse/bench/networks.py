"""Networks as users train and serve them: images/s, memory, ratios to eager and to every peer.

The fused network first has to pass the parity bound, and every variant's outputs must be those of the same network in
float32: a wrong one is not timed. Each variant lives in a process of its own, as users run it: what one leaves in the
allocator does not slow or speed up another. The processes are sampled in turn.

With `parts`, training rows also say what a step spends outside convolutions and the optimizer: its time, less that of
its convolutions run bare (:mod:`resfuse.bench.convolutions`: forward and both gradients, by the kernels that the
variant uses, in a process of their own), less that of the optimizer's step; the median over the rounds. Products and
passes share kernels in the fused network, so no profile of it can tell them apart; eager's part is taken in the same
way. Products that only folding needs count as outside. A small difference of large times: it may come out below zero.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resfuse.bench import blocks, parity, peers
from resfuse.bench.gate import PEER_BOUND, Gate, Refusals, RefusedError
from resfuse.bench.records import Record
from resfuse.bench.timing import Samples, Tick, milliseconds
from resfuse.bench.units import speed_up
from resfuse.bench.worker import SHOWN, Worker
from resfuse.bench.workload import Task, batch_of, build, nothing_dropped

WARMUP = 3
_CHECKED = (8, 64)  # images, and their side


class Cell(NamedTuple):
    """One row, for each dtype. Mode memory takes a few training steps and times nothing."""

    model: str
    mode: str
    batch: int
    size: int


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Attributes:
        cells: rows, for each dtype.
        dtypes: names, as "float32".
        variants: of :data:`resfuse.bench.peers.PEERS` and OURS; those that a row cannot have, it says why.
        rounds: samples of each.
        device: "cpu" or "cuda".
        parts: time bare convolutions and the optimizer too.
        quick: few rounds of small shapes; tables leave such rows out.
    """

    cells: Sequence[Cell]
    dtypes: Sequence[str] = ("float32", "bfloat16")
    variants: Sequence[str] = ("eager", "compile", "fused")
    rounds: int = 9
    device: str = "cpu"
    parts: bool = False
    quick: bool = False

    @property
    def rows(self) -> list[tuple[Cell, str]]:
        """Cell and dtype of every row, a network's together, so that each is checked once."""
        networks = dict.fromkeys((cell.model, dtype) for cell in self.cells for dtype in self.dtypes)
        return [(cell, dtype) for model, dtype in networks for cell in self.cells if cell.model == model]


def check(network: str, dtype: str, device: str = "cpu") -> str | None:
    """Refuse a fused network whose training step, outputs or gradients, is less exact than the bound allows.

    float32 gradients that break it on one batch are judged by five, see :mod:`resfuse.bench.parity`. Where gradients
    prove nothing, because stock's are that inexact, or their medians are luck, its blocks are judged one by one too.

    Returns:
        str | None: that the whole network's gradients could not prove anything, and what was done.

    Raises:
        RefusedError: a result is wrong.
    """

    def judge(seed: int) -> list[parity.Verdict]:
        batch = batch_of(*_CHECKED, device, seed=seed)
        return parity.judge_fused(build(network, "eager", device), *batch, getattr(torch, dtype))

    judged = judge(1)
    doubtful: list[parity.Verdict] = []
    why = ""
    if dtype == "float32" and not all(verdict.holds for verdict in judged):
        batches = [judged, *(judge(seed) for seed in range(2, 6))]
        judged = parity.over_batches(batches, torch.float32)
        doubtful = [verdict for verdict in judged if verdict.quantity.startswith("gradients") and not verdict.holds]
        if doubtful:
            best = parity.over_batches(batches, torch.float32, min)
            judged = [low if median in doubtful else median for median, low in zip(judged, best, strict=True)]
            why = "gradients of the whole network were judged by the best of five batches, their medians being luck"
    whole = next(verdict for verdict in judged if verdict.quantity == "gradients")
    vague = [verdict for verdict in judged if verdict.proves_nothing and whole.proves_nothing]
    parity.refuse_a_wrong_result([verdict for verdict in judged if verdict not in vague], f"{network} {dtype}")
    if vague:
        why = f"gradients of the whole network prove nothing in {dtype}, stock's are off by {whole.stock:.2f}"
    if not why:
        return None
    count = blocks.check_all(network, dtype, device, (_CHECKED[0], 3, _CHECKED[1], _CHECKED[1]))
    if count == 0:
        parity.refuse_a_wrong_result([*doubtful, *vague], f"{network} {dtype}")
    others = f"its {count} distinct blocks were judged one by one" if count else "it has no block that stands alone"
    return f"{why}: {others}"


class Checks:
    """:func:`check`, once for each network and dtype; what it found is told, or raised, every time."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.found: dict[tuple[str, str], Record | RefusedError] = {}

    def __call__(self, network: str, dtype: str) -> Record:
        """What a row says about its check: {"note": ...}, or nothing.

        Raises:
            RefusedError: the network is wrong.
        """
        if (network, dtype) not in self.found:
            try:
                note = check(network, dtype, self.device)
                self.found[network, dtype] = {} if note is None else {"note": note}
            except RefusedError as error:
                self.found[network, dtype] = error
        found = self.found[network, dtype]
        if isinstance(found, RefusedError):
            raise found
        return found


def exact_outputs(task: Task) -> Tensor:
    """What the first images of a task give in stock float32: (SHOWN, classes), float64."""
    model = build(task.model, "eager", task.device).train(task.mode != "inference")
    images, _ = batch_of(task.batch, task.size, task.device)
    with torch.no_grad(), nothing_dropped(model):
        return model(images)[:SHOWN].double().cpu()


def measure(
    cell: Cell,
    dtype: str,
    variants: Sequence[str],
    rounds: int,
    *,
    device: str = "cpu",
    parts: bool = False,
    threads: int = 0,
    tick: Tick = lambda _: None,
) -> Record:
    """Time one cell, all variants in turn, or take its memory; the record without its environment.

    Args:
        cell, dtype, variants, rounds, device, parts: as in :class:`Plan`.
        threads (int): of each process; 0 leaves torch's choice.
        tick (Callable[[float], object]): told the share of the work done since it was called last.

    Raises:
        RefusedError: a variant computes something else.
        RuntimeError: a process ended; it has printed why.
    """
    missing = {v: why for v in variants if (why := peers.why_missing(v, cell.mode, device, dtype)) is not None}
    record: Record = {**cell._asdict(), "dtype": dtype, "missing": missing}
    base = Task(cell.model, "eager", cell.mode, dtype, cell.batch, cell.size, device, threads)
    names = [name for name in variants if name not in missing]
    if not names:
        return {**record, "variants": {}, "ratios": {}}
    with contextlib.ExitStack() as processes:
        workers = {n: processes.enter_context(Worker(base._replace(variant=n))) for n in names}
        if cell.mode == "memory":
            return {**record, "variants": _memory(workers, tick), "ratios": {}}
        gate = _checked(base, workers)
        extra = _parts(base, names, processes, gate) if parts and cell.mode == "training" else {}
        samples = _sampled(gate, {**workers, **extra}, rounds, tick)
        found = {name: {**milliseconds(samples[name]), "error": gate.errors[name]} for name in workers}
        for name, row in found.items():
            row["images_per_s"] = round(1e3 * cell.batch / row["median_ms"], 2)
            row |= workers[name].memory()
    record |= {"variants": found, "ratios": peers.ratios(samples, list(workers))}
    if extra:
        record |= {"parts": {n: milliseconds(samples[n]) for n in extra}, "outside_ms": outside(samples)}
    return record


def _memory(workers: dict[str, Worker], tick: Tick) -> dict[str, Any]:
    for worker in WARMUP * list(workers.values()):
        worker()
        tick(1 / WARMUP / len(workers))
    return {name: worker.memory() for name, worker in workers.items()}


def _checked(base: Task, workers: dict[str, Worker]) -> Gate:
    """A gate that all workers have passed with their outputs."""
    gate, exact = Gate(f"{base.model} {base.mode} {base.dtype}"), exact_outputs(base)
    for name, worker in workers.items():
        gate.check(name, parity.relative_l2(worker.outputs(), exact), PEER_BOUND, "outputs")
    return gate


def _sampled(gate: Gate, workers: dict[str, Worker], rounds: int, tick: Tick) -> Samples:
    share = 1 / (len(workers) * (rounds + WARMUP))
    before = {name: w.prepare for name, w in workers.items() if w.task.mode in ("forward", "backward")}
    return gate.interleave(workers, rounds=rounds, warmup=WARMUP, tick=lambda: tick(share), before=before)


def _parts(base: Task, names: Sequence[str], processes: contextlib.ExitStack, gate: Gate) -> dict[str, Worker]:
    """What is subtracted from a training step: for eager and fused the bare convolutions, and the optimizer."""
    split = [name for name in names if name in ("eager", "fused")]
    tasks = {f"{name} convolutions": base._replace(variant=name, mode="convolutions") for name in split}
    if tasks:
        tasks["optimizer"] = base._replace(mode="optimizer")
    for name in tasks:
        gate.exempt(name)
    return {name: processes.enter_context(Worker(task)) for name, task in tasks.items()}


def outside(samples: Samples) -> dict[str, float]:
    """Milliseconds of a training step outside convolutions and optimizer, by variant: see the head of this file."""
    return {
        name: round(
            1e3 * statistics.median(a - b - c for a, b, c in zip(step, bare, samples["optimizer"], strict=True)), 6
        )
        for name, step in samples.items()
        if (bare := samples.get(f"{name} convolutions")) is not None
    }


def run(plan: Plan, where: Record, tick: Tick = lambda _: None) -> Iterator[Record]:
    """Measure row after row.

    Args:
        plan (Plan): what.
        where (Record): the environment record.
        tick (Callable[[float], object]): told the share of a row done since it was called last.

    Yields:
        Record: a row, as soon as it is measured.

    Raises:
        RefusedError: at the end, where results were wrong; their rows were left out.
    """
    fixed = {"suite": "models", "quick": plan.quick, "environment": where, "backend": "native",
             "layout": "channels_last"}  # fmt: skip
    checks, refusals = Checks(plan.device), Refusals()
    ours = any(name in peers.OURS for name in plan.variants)
    for cell, dtype in plan.rows:
        with refusals.skip():
            note = checks(cell.model, dtype) if ours else {}
            found = measure(cell, dtype, plan.variants, plan.rounds, device=plan.device, parts=plan.parts, tick=tick)
            yield {**fixed, **found, **note}
    refusals.end()


def lines(record: Record) -> list[str]:
    """One row as text: a head, and a line for each variant."""
    text = [f"{record['model']} {record['mode']} {record['dtype']}, batch {record['batch']} of {record['size']}"]
    for name, row in record["variants"].items():
        time = (
            f"{row['images_per_s']:8.1f} images/s  {row['median_ms']:9.1f} ms ({row['p20_ms']:.1f}-{row['p80_ms']:.1f})"
            if "median_ms" in row
            else ""
        )
        sizes = ("saved", "saved_bytes"), ("peak", "peak_rss_bytes"), ("GPU", "peak_bytes")
        memory = [f"{label} {row[key] / 1e6:.0f} MB" for label, key in sizes if key in row]
        rest = [f"outside {record['outside_ms'][name]:.1f} ms"] if name in record.get("outside_ms", {}) else []
        gains = [
            f"{speed_up(ratio)} {key.partition('/')[2]}"
            for key, ratio in record["ratios"].items()
            if key.startswith(f"{name}/")
        ]
        text.append(f"  {name:20} {'  '.join([time, *memory, *rest, *gains])}")
    text += [f"  {name:20} not measured: {why}" for name, why in record.get("missing", {}).items()]
    return [*text, *(f"  {record[key]}" for key in ("note",) if key in record)]
