"""What Triton made of the kernels, without a GPU: each launch of an operator on meta tensors, compiled for a target.

A launch is recorded where it would start and compiled as Triton would compile it there, with the same specialization;
one that spills is compiled again, as it would be there (resfuse/_triton/kernel.py).
Resources and instructions are read from the machine code. As a script this compiles all cases for all targets, prints
the table, and exits with 1 where the gate refuses a kernel.
"""

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
import triton_sass
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton_cases import CASES, DTYPES, MORE_CASES
from triton_sass import TENSOR_CORES
from triton_steps import choosing

from resfuse._triton import LAUNCHERS
from resfuse._triton.kernel import Kernel, remedies

TARGETS = (80, 90, 100)
MOST_REGISTERS = 255
# HGMMA multiplies no fewer rows than this
FEWEST_ROWS = 64
# Triton takes rows of such lengths for aligned, and reads others value by value, which no asynchronous copy does
ALIGNED_CHANNELS = 16


class Launch(NamedTuple):
    """One launch of a kernel, as its launcher made it."""

    kernel: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]

    def argument(self, name: str) -> Any:
        """By its name in the kernel; None where it has none."""
        return self.options.get(name, dict(zip(self.kernel.arg_names, self.args, strict=False)).get(name))


class Compiled(NamedTuple):
    """A kernel for one target, and what its machine code says."""

    unit: str
    kernel: str
    target: int
    dtype: str  # of its first operand
    warps: int
    registers: int
    shared: int  # bytes
    spilled: int  # bytes of local memory, a stack frame included
    dots: int  # products in Triton's own code: such kernels are held to the tensor cores and asynchronous copies
    rows: int  # of a product's tile
    aligned: bool  # whether the rows of its operands are
    fed: int  # innermost loops that multiply and copy asynchronously
    starved: int  # those that only multiply
    wide: int  # loads and stores of 128 bits
    narrow: int
    instructions: dict[str, int]
    again: bool = False  # compiled with a remedy, since it spilled


def launches(call: Callable[[], Any]) -> list[Launch]:
    """The kernels that a call launches; none of them runs."""
    found = []

    def record(self, grid, *args, **options):
        found.append(Launch(self.jit, args, options))

    with mock.patch.object(Kernel, "_launch", record):
        call()
    return found


def source_of(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile: types, specialized arguments, constants and options."""
    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, dict(launch.options), bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def compiled(unit: str, launch: Launch, target: int) -> Compiled:
    """As a launch runs it."""
    for more in remedies(launch.options):
        found = compiled_once(unit, launch._replace(options={**launch.options, **more}), target)._replace(
            again=more != {}
        )
        if not found.spilled:
            break
    return found


def compiled_once(unit: str, launch: Launch, target: int) -> Compiled:
    gpu = GPUTarget("cuda", target, 32)
    source, options = source_of(launch, gpu)
    result = triton.compile(source, target=gpu, options=options)
    code = triton_sass.disassembled(result.asm["cubin"])
    registers, local = triton_sass.resources(code)
    dtype = str(launch.args[0].dtype).removeprefix("torch.")
    lengths = [launch.argument(name) or 0 for name in ("channels", "out_channels", "branch_channels")]
    return Compiled(
        unit, launch.kernel.__name__, target, dtype, result.metadata.num_warps, registers, result.metadata.shared,
        local, result.asm["ttir"].count("tt.dot "), launch.argument("BLOCK_M") or 0,
        not any(length % ALIGNED_CHANNELS for length in lengths), *triton_sass.multiplying_loops(code),
        *triton_sass.widths(code), triton_sass.instructions(code),
    )  # fmt: skip


def distinct_launches(target, dtype, cases) -> list[tuple[str, Launch]]:
    """What the operators of the cases launch, every kernel once for each set of constants and types."""
    found, gpu = {}, GPUTarget("cuda", target, 32)
    for case in cases:
        for name, args in case.calls(DTYPES[dtype]):
            with choosing(case.choose):
                launched = launches(lambda name=name, args=args: LAUNCHERS[name](*args))
            for launch in launched:
                source, options = source_of(launch, gpu)
                found.setdefault((source.hash(), str(sorted(options.items()))), (name, launch))
    return list(found.values())


def build(target, dtype, cases=None) -> list[Compiled]:
    """Every kernel of every case; of all by default."""
    found = distinct_launches(target, dtype, cases or CASES + MORE_CASES)
    return [compiled(name, launch, target) for name, launch in found]


def faults(kernels: list[Compiled]) -> list[str]:
    """What the gate refuses, in words."""
    wrong = []
    for k in kernels:
        where = f"{k.unit}: {k.kernel} in {k.dtype} on sm_{k.target}"
        if k.spilled:
            wrong.append(f"{where} spills: {k.spilled} bytes of local memory")
        if k.registers > MOST_REGISTERS:
            wrong.append(f"{where} takes {k.registers} registers")
        if k.dots and k.dtype != "float32":
            wrong += [f"{where} {fault}" for fault in faults_of_product(k)]
    return wrong


def faults_of_product(k: Compiled) -> list[str]:
    """What the gate refuses of a product of 16-bit operands."""
    wrong = []
    if k.target == 90 and k.rows >= FEWEST_ROWS:
        if not k.instructions.get("HGMMA"):
            wrong.append("multiplies without HGMMA")
        if k.instructions.get("HMMA"):
            wrong.append("multiplies with HMMA too")
    if k.aligned:
        if not k.fed:
            wrong.append("copies nothing asynchronously while it multiplies")
        if k.starved:
            wrong.append(f"copies nothing asynchronously in {k.starved} loops that multiply")
    return wrong


def table(kernels: list[Compiled]) -> str:
    """A line for each kernel: registers, memory and the instructions that count."""
    lines = [f"{'operator and kernel':74} {'dtype':9} {'sm':>4} {'warps':>5} {'regs':>4} {'shared':>7} {'spill':>5}"]
    for k in kernels:
        counts = " ".join(f"{name}:{count}" for name, count in k.instructions.items())
        name = f"{k.unit} {k.kernel}"
        lines.append(
            f"{name:74} {k.dtype:9} {k.target:4} {k.warps:5} {k.registers:4} {k.shared:7} {k.spilled:5}  {counts}"
        )
    return "\n".join(lines)


PAGE = Path(__file__).parents[1] / "docs" / "triton.md"
START, END = "<!-- gate:start -->", "<!-- gate:end -->"


def summary(kernels: list[Compiled], dtypes: list[str]) -> str:
    """The page's table: for each kernel and target the most of its forms and dtypes, how many of them are compiled
    again, and the products' instructions."""
    lines = [
        "| kernel | target | forms | again | registers | shared bytes | spilled | tensor core instructions |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    groups: dict[tuple[str, int], list[Compiled]] = {}
    for k in kernels:
        groups.setdefault((k.kernel, k.target), []).append(k)
    for (name, target), forms in sorted(groups.items()):
        used = sorted({n for k in forms for n in k.instructions if n in TENSOR_CORES})
        most = (max(getattr(k, field) for k in forms) for field in ("registers", "shared", "spilled"))
        counts = f"{len(forms)} | {sum(k.again for k in forms) or ''}"
        lines.append(f"| {name} | sm_{target} | {counts} | {' | '.join(map(str, most))} | {', '.join(used)} |")
    caption = f"Compiled by Triton {triton.__version__} for networks in {', '.join(dtypes)}; none of it ran."
    return "\n".join([*lines, "", caption, ""])


def write_page(kernels: list[Compiled], dtypes: list[str]) -> None:
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(f"{before}{START}\n{summary(kernels, dtypes)}{END}{rest.partition(END)[2]}")


def check_triton(folder: Path) -> None:
    """Stop unless the Triton that was imported lies in this folder."""
    if folder.resolve() not in Path(triton.__file__).resolve().parents:
        sys.exit(f"{folder} was to have Triton, but {triton.__file__} was imported: is it there, and on PYTHONPATH?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=int, action="append", choices=TARGETS, help="all of them by default")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="all of them by default")
    parser.add_argument("--triton", type=Path, help="the folder on PYTHONPATH that Triton must come from")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--docs", action="store_true", help="also write the table of docs/triton.md")
    chosen = parser.parse_args()
    if chosen.triton:
        check_triton(chosen.triton)
    pairs = list(product(chosen.target or TARGETS, chosen.dtype or DTYPES))
    with ProcessPoolExecutor(chosen.jobs) as pool:
        built = pool.map(build, *zip(*pairs, strict=True))
        kernels = [kernel for each in built for kernel in each]
    print(table(kernels))
    print(f"{len(kernels)} kernels, compiled by Triton {triton.__version__}")
    if chosen.docs:
        write_page(kernels, list(chosen.dtype or DTYPES))
    sys.exit("\n".join(faults(kernels)) or 0)


if __name__ == "__main__":
    main()
