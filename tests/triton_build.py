"""What Triton made of the kernels, without a GPU: each launch of an operator on meta tensors, compiled for a target.

A launch is recorded where it would start and compiled as Triton would compile it there, with the same specialisation.
Resources and instructions are read from the machine code. As a script this compiles everything that a ResNet-50 asks
for, for all targets, prints the table, and exits with 1 where the gate refuses a kernel.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from cuda_build import find_disassembler
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from resfuse._triton import LAUNCHERS

TARGETS = (80, 90, 100)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MOST_REGISTERS = 255


class Launch(NamedTuple):
    """One launch of a kernel, as its launcher made it."""

    kernel: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]


class Compiled(NamedTuple):
    """A kernel for one target, and what its machine code says."""

    unit: str
    kernel: str
    target: int
    dtype: str
    warps: int
    registers: int
    shared: int  # bytes
    spilled: int  # bytes of local memory, a stack frame included
    dots: int  # products in Triton's own code: such kernels are held to the tensor cores and asynchronous copies
    wide: int  # loads and stores of 128 bits
    narrow: int
    instructions: dict[str, int]


def launches(call: Callable[[], Any]) -> list[Launch]:
    """The kernels that a call launches; none of them runs."""
    found = []

    def record(self, *args, grid, warmup, **options):
        found.append(Launch(self, args, options))

    with mock.patch.object(JITFunction, "run", record):
        call()
    return found


def source_of(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile: types, specialised arguments, constants and options."""
    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, dict(launch.options), bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# what the gate and the table count, by the beginning of an instruction's name
TENSOR_CORES = ("HGMMA", "UTCHMMA", "UTCQMMA", "HMMA")
COUNTED = (*TENSOR_CORES, "LDGSTS", "UBLKCP", "UTMALDG", "LDG", "STG", "LDL", "STL")


def instructions(code: str) -> dict[str, int]:
    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", code, re.M)
    return {kind: names.count(kind) for kind in COUNTED if kind in names}


def widths(code: str) -> tuple[int, int]:
    """How many loads and stores of global memory take 128 bits, and how many take fewer."""
    found = re.findall(r"\b(?:LDG|STG)((?:\.\w+)+)", code)
    wide = sum(".128" in access for access in found)
    return wide, len(found) - wide


def compiled(unit: str, launch: Launch, target: int, dtype: str) -> Compiled:
    gpu = GPUTarget("cuda", target, 32)
    source, options = source_of(launch, gpu)
    result = triton.compile(source, target=gpu, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        command = [find_disassembler(), "--dump-resource-usage", "--dump-sass", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, _, local = map(int, _RESOURCES.search(said).groups())
    return Compiled(
        unit, launch.kernel.__name__, target, dtype, result.metadata.num_warps, registers, result.metadata.shared,
        stack + local, result.asm["ttir"].count("tt.dot "), *widths(said), instructions(said),
    )  # fmt: skip


def activation(dtype, channels=64, size=56, batch=32):
    return torch.empty(batch, channels, size, size, dtype=dtype, device="meta", memory_format=torch.channels_last)


def vectors(count, channels=64):
    return [torch.empty(channels, device="meta") for _ in range(count)]


def memory_bound(dtype):
    """The operators of the memory-bound units: (name, arguments)."""
    x, v = activation(dtype), vectors(1)[0]
    parameter = [torch.empty(64, device="meta") for _ in range(4)]
    counter = torch.empty((), dtype=torch.int64, device="meta")
    large = activation(dtype, size=112)
    pooled, indices = activation(dtype), activation(torch.uint8)
    window = ([3, 3], [2, 2], [1, 1])
    none = (None,) * 6
    yield "add_relu", (x, x)
    yield "add_relu_backward", (x, x)
    yield "moments", (x,)
    yield "moments_backward", (v, v, x, v)
    yield "finalize", (v, v, 100, *parameter, counter, 0.1, 1e-5)
    yield "finalize_backward", (v, v, v, parameter[0], 1e-5)
    for residual in ((None, None, None), (x, None, None), (x, v, v)):
        yield "scale_shift_act", (x, v, v, *residual, True)
        yield "scale_shift_act_moments", (x, v, v, *residual, True)
    yield "scale_shift_act_backward_reduce", (x, x, v, v, v, *none[:5], True)
    yield "scale_shift_act_backward_reduce", (x, x, v, v, v, *none[:4], x, True)
    yield "scale_shift_act_backward_reduce", (x, x, v, v, v, x, v, v, v, None, True)
    yield "scale_shift_act_backward_apply", (x, x, v, v, v, v, v, *none, True)
    yield "scale_shift_act_backward_apply", (x, x, v, v, v, v, v, x, v, v, v, v, v, True)
    yield "scale_shift_relu_maxpool", (large, v, v, *window)
    yield "scale_shift_relu_maxpool_backward_reduce", (pooled, indices, large, v, v, v, *window)
    yield "scale_shift_relu_maxpool_backward_apply", (pooled, indices, large, v, v, v, v, v, *window)


_UNIT = ([1, 1], [0, 0], [1, 1], 1)


def _prologue(channels):
    return torch.empty(2, channels, device="meta"), *vectors(1, channels)


def _matrix(rows, columns, dtype, *kernel):
    return torch.empty(rows, columns, *kernel, dtype=dtype, device="meta")


def folding(dtype):
    """Train-time folding of the last convolution of ResNet-50's bottlenecks, and of their projections."""
    for channels, size, stride in ((64, 56, 1), (128, 28, 2), (256, 14, 2)):
        wide, narrow = 4 * channels, channels if stride == 1 else 2 * channels
        x, out = activation(dtype, channels, size), activation(dtype, wide, size)
        shortcut = activation(dtype, narrow, size * stride)
        prologue, strides = _prologue(channels), [stride, stride]
        projection = shortcut, _matrix(wide, narrow, dtype, 1, 1), strides
        weight, shift = _matrix(wide, channels, dtype, 1, 1), *vectors(1, wide)
        folded = (x, *prologue, True, weight, None, shift)
        yield "second_moments", (x, *prologue, True, [1, 1])
        yield "second_moments", (shortcut, None, None, False, strides)
        yield "conv_act", (*folded, out, *[None] * 4, [1, 1], True, *_UNIT, False)
        yield "conv_act", (*folded, out, *_prologue(wide), None, None, [1, 1], True, *_UNIT, True)
        yield "conv_act", (*folded, None, None, None, *projection, True, *_UNIT, False)
        yield "expand_bn_act_backward_weight", (out, out, x, *prologue, True)
        for read, before, strides_of_read in ((x, prologue, [1, 1]), (shortcut, (None, None), strides)):
            c = read.shape[1]
            algebra = _matrix(wide, c, dtype), _matrix(c, c, torch.float32), *vectors(1, c)
            yield "expand_bn_act_backward_input", (out, read, *before, True, *algebra, strides_of_read)


def inference(dtype):
    """Convolutions with a folded normalisation: in, out, kernel, stride, groups, size; the last adds a residual.

    Rows of fewer than 8 channels are too short for asynchronous copies: those of a stem are not among them.
    """
    for channels, wide, kernel, stride, groups, size in (
        (64, 64, 3, 1, 1, 56), (128, 128, 3, 2, 1, 56), (128, 128, 3, 1, 8, 28), (256, 512, 1, 2, 1, 56),
        (256, 64, 1, 1, 1, 56), (64, 256, 1, 1, 1, 56),
    ):  # fmt: skip
        weight = _matrix(wide, channels // groups, torch.float32, kernel, kernel)
        residual = activation(dtype, wide, size) if wide > channels and stride == 1 else None
        geometry = [stride] * 2, [kernel // 2] * 2, [1, 1], groups
        operands = activation(dtype, channels, size), None, None, False, weight, *vectors(2, wide)
        yield "conv_act", (*operands, residual, *[None] * 4, [1, 1], True, *geometry, False)


# (channels, out channels, kernel, stride, size of the map, groups) of convolutions: one step, many, phases of a stride
CONVOLUTIONS = ((64, 64, 1, 1, 56, 1), (256, 64, 1, 1, 56, 1))
MORE_CONVOLUTIONS = (
    (128, 512, 1, 1, 28, 1), (256, 512, 1, 2, 56, 1), (64, 64, 3, 1, 56, 1), (128, 128, 3, 2, 56, 1),
)  # fmt: skip
# groups, and the stem, whose few channels fill no tile and are read one by one: the composition is chosen for them
NARROW = ((128, 128, 3, 1, 28, 32), (3, 64, 7, 2, 224, 1))


def convolutions(dtype, shapes=CONVOLUTIONS):
    """conv_stats and its backward, with a prologue and without, with every way that dY is formed."""
    for channels, out, kernel, stride, size, groups in shapes:
        x = activation(dtype, channels, size)
        weight = torch.empty(out, channels // groups, kernel, kernel, device="meta")
        padding = kernel // 2
        y = activation(dtype, out, (size + 2 * padding - kernel) // stride + 1)
        pairs = [stride] * 2, [padding] * 2, [1, 1], groups
        affine, (mean,) = torch.empty(2, channels, device="meta"), vectors(1, channels)
        y_affine, moments = torch.empty(2, out, device="meta"), vectors(3, out)
        reads = (x, None, None, weight, False) if channels == 3 else (x, affine, mean, weight, True)
        yield "conv_stats", (*reads, *pairs, True)
        yield "conv_stats", (x, None, None, weight, False, *pairs, False)
        if channels == 3:
            yield "conv_stats_backward", (y, y, None, *moments, False, *reads, *pairs, None, False, True)
            continue
        yield "conv_stats_backward", (y, y, None, *moments, False, *reads, *pairs, None, True, True)
        yield "conv_stats_backward", (y, y, y_affine, *moments, True, *reads, *pairs, None, True, True)
        plain = (y, None, None, None, None, None, False, x, None, None, weight, False, *pairs, x, True, True)
        yield "conv_stats_backward", plain


def narrow(dtype):
    return convolutions(dtype, NARROW)


def more_convolutions(dtype):
    return convolutions(dtype, MORE_CONVOLUTIONS)


# what is compiled: functions of a dtype that give operators with arguments on the meta device
CASES: list[Callable[[torch.dtype], Any]] = [memory_bound, folding, inference, convolutions]
# what the script compiles beside them
MORE_CASES: list[Callable[[torch.dtype], Any]] = [more_convolutions, narrow]


def build(targets, dtypes, cases=CASES) -> list[Compiled]:
    """Every kernel of every case once for each set of constants and types."""
    found, seen = [], set()
    for dtype in dtypes:
        calls = [(case, *call) for case in cases for call in case(DTYPES[dtype])]
        for case, name, args in calls:
            for launch in launches(lambda name=name, args=args: LAUNCHERS[name](*args)):
                for target in targets:
                    source, options = source_of(launch, GPUTarget("cuda", target, 32))
                    key = (source.hash(), str(sorted(options.items())), target)
                    if key not in seen:
                        seen.add(key)
                        kernel = compiled(name, launch, target, dtype)
                        # of a narrow product the gate asks only that nothing spills
                        found.append(kernel._replace(dots=0) if case is narrow else kernel)
    return found


def faults(kernels: list[Compiled]) -> list[str]:
    """What the gate refuses, in words."""
    wrong = []
    for k in kernels:
        where = f"{k.unit}: {k.kernel} in {k.dtype} on sm_{k.target}"
        if k.spilled:
            wrong.append(f"{where} spills: {k.spilled} bytes of local memory")
        if k.registers > MOST_REGISTERS:
            wrong.append(f"{where} takes {k.registers} registers")
        if k.dots == 0 or k.dtype == "float32":
            continue
        asynchronous = sum(k.instructions.get(name, 0) for name in ("LDGSTS", "UBLKCP", "UTMALDG"))
        if k.target == 90 and not k.instructions.get("HGMMA"):
            wrong.append(f"{where} multiplies without HGMMA")
        if not asynchronous:
            wrong.append(f"{where} copies nothing asynchronously")
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


def summary(kernels: list[Compiled]) -> str:
    """The page's table: for each kernel and target the most of its forms and dtypes, and the products' instructions."""
    lines = [
        "| kernel | target | forms | registers | shared bytes | spilled | tensor core instructions |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    groups: dict[tuple[str, int], list[Compiled]] = {}
    for k in kernels:
        groups.setdefault((k.kernel, k.target), []).append(k)
    for (name, target), forms in sorted(groups.items()):
        used = sorted({n for k in forms for n in k.instructions if n in TENSOR_CORES})
        most = (max(getattr(k, field) for k in forms) for field in ("registers", "shared", "spilled"))
        lines.append(f"| {name} | sm_{target} | {len(forms)} | {' | '.join(map(str, most))} | {', '.join(used)} |")
    dtypes = ", ".join(dict.fromkeys(k.dtype for k in kernels))
    return "\n".join([*lines, "", f"Compiled by Triton {triton.__version__} for {dtypes}; none of it ran.", ""])


def write_page(kernels: list[Compiled]) -> None:
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(f"{before}{START}\n{summary(kernels)}{END}{rest.partition(END)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=int, action="append", choices=TARGETS, help="all of them by default")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="all of them by default")
    parser.add_argument("--docs", action="store_true", help="also write the table of docs/triton.md")
    chosen = parser.parse_args()
    kernels = build(chosen.target or TARGETS, chosen.dtype or DTYPES, CASES + MORE_CASES)
    print(table(kernels))
    if chosen.docs:
        write_page(kernels)
    sys.exit("\n".join(faults(kernels)) or 0)


if __name__ == "__main__":
    main()
