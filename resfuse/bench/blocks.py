"""Blocks of a network, measured one by one: forward, backward, both, and inference, stock and fused, in turn.

A block is a module that :func:`resfuse.fuse` swaps; blocks of one class, with the same layers and the same input, are
measured once. Their results are checked first, as a whole network's are: outputs, gradients and running statistics
against the same block in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resfuse import explain, fuse
from resfuse.bench.gate import PEER_BOUND, Gate, Refusals, RefusedError
from resfuse.bench.memory import keep_freed_memory, model_tensors, peak_allocated_bytes, saved_memory
from resfuse.bench.parity import FACTOR, FLOOR, relative_l2
from resfuse.bench.peers import ratios
from resfuse.bench.records import Record
from resfuse.bench.timing import Tick, milliseconds
from resfuse.bench.units import speed_up
from resfuse.bench.workload import lower_precision, stock

MODES = ("forward", "backward", "step", "inference")
VARIANTS = ("eager", "compile", "fused")
WARMUP = 2
_SEEDS = 5  # operands that are tried at most


class UnluckyError(RefusedError):
    """A float32 gradient of ours breaks its bound, which one ReLU whose input is within rounding of zero can do."""


class Block(NamedTuple):
    """One distinct block of a network: its class, the names of all that are alike, and the shape of its input."""

    kind: str
    names: tuple[str, ...]
    input: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What a run measures; attributes as in :class:`resfuse.bench.networks.Plan`, variants of VARIANTS.

    Attributes:
        only: class names of blocks; empty for all.
    """

    model: str = "resnet50"
    batch: int = 16
    size: int = 224
    modes: Sequence[str] = MODES
    dtypes: Sequence[str] = ("float32", "bfloat16")
    variants: Sequence[str] = ("eager", "fused")
    only: Sequence[str] = ()
    rounds: int = 9
    device: str = "cpu"
    quick: bool = False


def distinct_blocks(model: str, input_shape: tuple[int, ...]) -> list[Block]:
    """The blocks of a network that `fuse` swaps, each kind and input once, in the order of the forward pass.

    Those that read or give more than one tensor, as DenseNet's layers, are left out, and so is the network itself,
    whose fused part is its stem.
    """
    with torch.device("meta"):
        blocks = explain(fuse(stock(model))).blocks
    names = {block.name for block in blocks if block.fused and block.name}
    found: dict[tuple[str, tuple[int, ...]], list[str]] = {}

    def hook_of(name: str, layers: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            x = inputs[0] if len(inputs) == 1 else None
            if isinstance(x, Tensor) and x.dim() == 4 and isinstance(output, Tensor):
                found.setdefault((layers, tuple(x.shape)), []).append(name)

        return hook

    with torch.device("meta"), torch.no_grad():
        network = stock(model)
        for name, module in network.named_modules():
            if name in names:
                module.register_forward_hook(hook_of(name, str(module)))
        network(torch.empty(input_shape))
    return [
        Block(layers.partition("(")[0], tuple(dict.fromkeys(alike)), shape) for (layers, shape), alike in found.items()
    ]


class _Runner:
    """One variant of a block with its operands: everything that is timed, and what a step leaves."""

    def __init__(self, module: nn.Module, x: Tensor, grad: Tensor, dtype: str) -> None:
        self.module, self.x, self.grad, self.dtype = module, x.requires_grad_(), grad, dtype
        self.kept: list[Tensor] = []

    def run(self) -> Tensor:
        with lower_precision(self.x.device.type, self.dtype):
            return self.module(self.x)

    def forward(self) -> None:
        self.kept.append(self.run())

    def clear(self) -> None:
        self.kept.clear()

    def ahead_of_backward(self) -> None:
        self.x.grad = None
        self.module.zero_grad(set_to_none=True)
        self.kept[:] = [self.run()]

    def backward(self) -> None:
        out = self.kept.pop()
        out.backward(self.grad.to(out.dtype))

    def step(self) -> None:
        self.ahead_of_backward()
        self.backward()

    def inference(self) -> Tensor:
        with torch.inference_mode():
            return self.run()

    def results(self, mode: str) -> dict[str, Tensor]:
        """What a call gives, and for training what it leaves: outputs, gradients, running statistics."""
        if mode == "inference":
            return {"outputs": self.inference()}
        self.ahead_of_backward()
        found = {"outputs": self.kept[0].detach()}
        self.backward()
        assert self.x.grad is not None
        gradients = {f"gradient of {n}": p.grad for n, p in self.module.named_parameters() if p.grad is not None}
        running = {n: b.clone() for n, b in self.module.named_buffers() if b.is_floating_point()}
        return {**found, "gradient of the input": self.x.grad, **gradients, **running}


def runners(plan: Plan, block: Block, mode: str, dtype: str, seed: int = 0) -> dict[str, _Runner]:
    """Every variant of a block, and as "exact" the same in float64: same weights, same operands."""
    torch.manual_seed(seed)
    module = dict(stock(plan.model).named_modules())[block.names[0]].train(mode != "inference")
    x = torch.randn(block.input).to(getattr(torch, dtype)).float()  # as the block before leaves it
    grad = torch.randn(module(x).shape)
    found = {}
    for name in ("exact", *plan.variants):
        precision = torch.float64 if name == "exact" else torch.float32
        place: Any = {"device": plan.device, "dtype": precision, "memory_format": torch.channels_last}
        own = copy.deepcopy(module).to(**place)
        if name == "fused":
            fuse(own, backend="native", strict=True)
        run: Any = torch.compile(own) if name == "compile" else own
        found[name] = _Runner(run, x.to(copy=True, **place), grad.to(copy=True, **place), _autocast(name, dtype))
    return found


def _autocast(name: str, dtype: str) -> str:
    """What a variant runs in: float64 as it is."""
    return "float32" if name == "exact" else dtype


def check(found: dict[str, _Runner], mode: str, dtype: str, gate: Gate) -> None:
    """Let every variant pass: ours within FACTOR times stock's error plus the floor, the others as the same function.

    Raises:
        UnluckyError: a float32 gradient of ours is; it may be a ReLU's whose input is within rounding of zero.
        RefusedError: another result is wrong.
    """
    exact = found["exact"].results(mode)
    errors = {
        name: {key: relative_l2(value, exact[key]) for key, value in runner.results(mode).items() if key in exact}
        for name, runner in found.items()
        if name != "exact"
    }
    plain = errors["eager"]
    for name, each in errors.items():
        if each.keys() != plain.keys():
            gate.check(name, float("inf"), PEER_BOUND, "gradients are missing")
        for key, error in each.items():
            ours = FACTOR * _stock_error(plain, key) + FLOOR[getattr(torch, dtype)]
            try:
                gate.check(name, error, ours if name == "fused" else PEER_BOUND, key)
            except RefusedError as refused:
                if name == "fused" and dtype == "float32" and key.startswith("gradient"):
                    raise UnluckyError(str(refused)) from None
                raise


def _stock_error(plain: dict[str, float], key: str) -> float:
    """Stock's error: of a gradient the largest of them, since a few ReLUs near zero decide by luck which one has it."""
    return max(e for k, e in plain.items() if k.startswith("gradient")) if key.startswith("gradient") else plain[key]


def checked_runners(
    plan: Plan, block: Block, mode: str, dtype: str, subject: str
) -> tuple[dict[str, _Runner], Gate, Record]:
    """Runners that have passed, on the first operands on which no ReLU decides a gradient by luck; their gate; and what
    a row says about operands that were given up, as {"note": ...}, or nothing.

    Raises:
        RefusedError: a result is wrong, a float32 gradient on all that were tried.
    """
    for seed in range(_SEEDS):
        found, gate = runners(plan, block, mode, dtype, seed), Gate(subject)
        try:
            check(found, mode, dtype, gate)
        except UnluckyError:
            if seed + 1 == _SEEDS:
                raise
        else:
            break
    note = f"gradients were off on {seed} of {seed + 1} operands, by a ReLU near zero; others were taken"
    return found, gate, {"note": note} if seed else {}


def check_all(model: str, dtype: str, device: str, input_shape: tuple[int, ...]) -> int:
    """Check a step of every distinct block of a network alone, where nothing amplifies rounding; how many there are.

    Raises:
        RefusedError: a result is wrong.
    """
    plan = Plan(model, device=device)
    found = distinct_blocks(model, input_shape)
    for block in found:
        checked_runners(plan, block, "step", dtype, f"{model} {block.kind} {block.names[0]} {dtype}")
    return len(found)


def measure(plan: Plan, block: Block, mode: str, dtype: str, tick: Tick = lambda _: None) -> Record:
    """Check and time one row; the record without its environment.

    Raises:
        RefusedError: a result is wrong; nothing has been timed.
    """
    found, gate, note = checked_runners(plan, block, mode, dtype, f"{block.kind} {block.names[0]} {mode} {dtype}")
    timed = {name: runner for name, runner in found.items() if name != "exact"}
    ahead = {"forward": _Runner.clear, "backward": _Runner.ahead_of_backward}
    calls = {name: getattr(runner, mode) for name, runner in timed.items()}
    share = 1 / (len(calls) * (plan.rounds + WARMUP))
    samples = gate.interleave(
        calls, rounds=plan.rounds, warmup=WARMUP, tick=lambda: tick(share), seconds_per_sample=0.02,
        before={name: ahead[mode].__get__(runner) for name, runner in timed.items()} if mode in ahead else {},
    )  # fmt: skip
    variants = {}
    for name, runner in timed.items():
        runner.clear()
        row = milliseconds(samples[name])
        row["images_per_s"] = round(1e3 * block.input[0] / row["median_ms"], 2)
        row |= _memory(runner, mode)
        variants[name] = row
    return {
        "model": plan.model, "block": block.kind, "name": block.names[0], "names": list(block.names),
        "shape": list(block.input), "batch": plan.batch, "size": plan.size, "mode": mode, "dtype": dtype,
        "variants": variants, "ratios": ratios(samples, list(timed)), **note,
    }  # fmt: skip


def _memory(runner: _Runner, mode: str) -> Record:
    call = runner.inference if mode == "inference" else runner.step
    found: Record = {"peak_bytes": peak_allocated_bytes(call)}
    if mode != "inference":
        kept = [runner.x, *model_tensors(runner.module)]
        found["saved_bytes"] = saved_memory(runner.run, kept).bytes
    return found


def rows(plan: Plan) -> list[tuple[Block, str, str]]:
    """Block, mode and dtype of every row of a plan.

    Raises:
        ValueError: the plan names a kind of block that the network does not have, or the network has none.
    """
    found = distinct_blocks(plan.model, (plan.batch, 3, plan.size, plan.size))
    kinds = list(dict.fromkeys(block.kind for block in found))
    unknown = [name for name in plan.only if name not in kinds]
    if not found:
        raise ValueError(
            f"{plan.model} has no block that stands alone, with one input and one output; bench model measures it whole"
        )
    if unknown:
        raise ValueError(f"{plan.model} has no block {', '.join(unknown)}; it has: {', '.join(kinds)}")
    wanted = [block for block in found if not plan.only or block.kind in plan.only]
    return [(block, mode, dtype) for dtype in plan.dtypes for block in wanted for mode in plan.modes]


def run(plan: Plan, where: Record, tick: Tick = lambda _: None) -> Iterator[Record]:
    """Measure row after row, as :func:`resfuse.bench.networks.run` does; arguments alike."""
    memory = "kept" if plan.device == "cuda" or keep_freed_memory() else "fresh"
    fixed = {"suite": "blocks", "quick": plan.quick, "environment": where, "memory": memory, "backend": "native",
             "layout": "channels_last"}  # fmt: skip
    refusals = Refusals()
    for block, mode, dtype in rows(plan):
        with refusals.skip():
            yield {**fixed, **measure(plan, block, mode, dtype, tick)}
    refusals.end()


def lines(record: Record) -> list[str]:
    """One row as text: a head, and a line for each variant."""
    shape = "x".join(map(str, record["shape"]))
    alike = f" and {len(record['names']) - 1} alike" if len(record["names"]) > 1 else ""
    text = [f"{record['block']} {record['name']}{alike} {record['mode']} {record['dtype']}, {shape}"]
    for name, row in record["variants"].items():
        sizes = ("saved", "saved_bytes"), ("peak", "peak_bytes")
        memory = [f"{label} {row[key] / 1e6:.1f} MB" for label, key in sizes if key in row]
        time = f"{row['median_ms']:9.3f} ms ({row['p20_ms']:.3f}-{row['p80_ms']:.3f})"
        gains = [
            f"{speed_up(r)} {key.partition('/')[2]}" for key, r in record["ratios"].items() if key.startswith(name)
        ]
        text.append(f"  {name:10} {'  '.join([time, *memory, *gains])}")
    return [*text, *(f"  {record[key]}" for key in ("note",) if key in record)]
