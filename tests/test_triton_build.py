"""The compile gate of Triton's kernels, for one target and dtype: `make gate` asks for all of them."""

import os
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process compiles nothing", allow_module_level=True)

import torch
import triton
import triton_build
import triton_cases
import triton_sass
from cuda_build import find_disassembler

compiles = pytest.mark.skipif(find_disassembler() is None, reason="needs cuobjdump, which is in Triton's wheel")
TARGET, DTYPE = 90, "bfloat16"


@pytest.fixture(scope="module")
def kernels():
    return triton_build.build(TARGET, DTYPE, triton_cases.CASES)


@compiles
def test_no_kernel_spills_and_every_product_uses_the_tensor_cores(kernels, record_property):
    record_property("table", triton_build.table(kernels))
    assert triton_build.faults(kernels) == []


@compiles
def test_the_page_has_every_kernel(kernels):
    """`make gate` writes it."""
    page = triton_build.PAGE.read_text()
    missing = {k.kernel for k in kernels if f"| {k.kernel} | sm_{k.target} |" not in page}
    assert not missing, "run `make gate`"


@compiles
def test_passes_are_vectors_of_128_bits(kernels):
    """A pass over channels_last memory loads each activation in the widest accesses there are."""
    passes = {"add_relu_kernel", "moments_kernel", "scale_shift_act_kernel", "reduce_kernel", "apply_kernel"}
    found = [k for k in kernels if k.kernel in passes]
    assert {k.kernel for k in found} == passes
    assert all(k.wide > 0 for k in found), triton_build.table(found)
    assert all(k.narrow == 0 for k in found if k.kernel == "add_relu_kernel")


def test_every_operator_is_compiled():
    """Of two that differ in where they write, one."""
    calls = {name.rstrip("_") for case in triton_cases.CASES for name, _ in case.calls(torch.bfloat16)}
    assert calls == {name.rstrip("_") for name in triton_build.LAUNCHERS}


def test_a_step_is_compiled_as_it_runs():
    """A block's first convolution has moments and no prologue, later blocks have more channels than a tile."""
    calls = list(triton_cases.CASES[0].calls(torch.bfloat16))
    first = [args for name, args in calls if name == "conv_stats" and args[1] is None and args[-1]]
    assert first and all(args[0].is_contiguous(memory_format=torch.channels_last) for args in first)
    assert {args[0].shape[1] for name, args in calls if name == "moments"} >= {64, 256, 2048}
    # batches of another size, no multiple of 16, are served by the same kernels
    launched = {kernel_key(*each) for each in triton_build.distinct_launches(TARGET, DTYPE, triton_cases.CASES[:1])}
    others = triton_build.distinct_launches(TARGET, DTYPE, [triton_cases.resnet50(triton_cases.by_the_rule, batch=255)])
    passes = {"moments_kernel", "scale_shift_act_kernel", "merge_moments_kernel", "sum_partials_kernel"}
    assert {kernel_key(*each) for each in others if each[1].kernel.__name__ in passes} <= launched


def test_tiles_in_which_an_older_triton_spills_have_fewer_rows():
    """Those of Triton 3.6: a prologue beside what fills an epilogue, and strided phases of a dY that is computed."""
    cases = [triton_cases.Case(triton_cases.folding), triton_cases.Case(triton_cases.convolutions)]
    crowded, phases = [], []
    for _, launch in triton_build.distinct_launches(TARGET, DTYPE, cases):
        kernel, given = launch.kernel.__name__, lambda name, launch=launch: launch.argument(name) is not None
        if kernel == "conv_act_kernel" and given("affine_ptr") and given("partial_ptr"):
            crowded.append((launch.argument("SINGLE"), launch.argument("BLOCK_M")))
        if kernel == "input_gradient_kernel" and given("y_ptr") and launch.argument("width").result_step > 1:
            phases.append(launch.argument("BLOCK_M"))
    assert set(crowded) == {(True, 128), (False, 64)} and set(phases) == {64}


def kernel_key(name, launch):
    source, options = triton_build.source_of(launch, triton_build.GPUTarget("cuda", TARGET, 32))
    return source.hash(), str(sorted(options.items()))


def kernel(**changes):
    base = triton_build.Compiled(
        "unit", "kernel", 90, "bfloat16", 4, 100, 0, 0, 1, 128, True, 1, 0, 1, 0, {"HGMMA": 1, "LDGSTS": 1}
    )
    return base._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spilled": 8}, "spills: 8 bytes"),
        ({"registers": 256}, "takes 256 registers"),
        ({"instructions": {"LDGSTS": 1}}, "without HGMMA"),
        ({"instructions": {"HGMMA": 1, "HMMA": 4, "LDGSTS": 1}}, "with HMMA too"),
        ({"fed": 0}, "copies nothing asynchronously while"),
        ({"starved": 1}, "copies nothing asynchronously in 1 loops"),
        ({"target": 80, "rows": 16, "starved": 2, "instructions": {"HMMA": 1, "LDGSTS": 1}}, "in 2 loops"),
    ],
)
def test_the_gate_refuses_what_it_should(changes, words):
    (fault,) = triton_build.faults([kernel(**changes)])
    assert words in fault


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dots": 0, "fed": 0, "instructions": {}},
        {"dtype": "float32", "instructions": {}},
        {"rows": 32, "instructions": {"HMMA": 1, "LDGSTS": 1}},  # too few rows for HGMMA
        {"aligned": False, "fed": 0, "starved": 1, "instructions": {"HGMMA": 1}},  # read value by value
        {"target": 80, "instructions": {"HMMA": 1, "LDGSTS": 1}},
    ],
)
def test_the_gate_passes_what_it_should(changes):
    assert triton_build.faults([kernel(**changes)]) == []


CODE = """
        /*0080*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0090*/              @!P0 LDG.E.128 R8, desc[UR4][R2.64] ;
        /*00a0*/                   HGMMA.64x64x16.F32.BF16 R24, R24, gdesc[UR8], RZ ;
        /*00b0*/              @UP1 STG.E desc[UR4][R2.64], R5 ;
"""
# two loops in another; the copies before the second one are not in it
LOOPS = """
        /*0000*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, R24, gdesc[UR8], RZ ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0040*/              @P0  BRA 0x20 ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64] ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, R24, gdesc[UR8], RZ ;
        /*0070*/              @P0  BRA 0x60 ;
        /*0080*/              @P1  BRA 0x10 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
"""


def test_instructions_are_counted():
    assert triton_sass.instructions(CODE) == {"HGMMA": 1, "LDG": 2, "STG": 1}
    assert triton_sass.widths(CODE) == (2, 1)


def test_copies_are_looked_for_in_the_loop_that_multiplies():
    assert triton_sass.innermost_loops(CODE) == []
    assert triton_sass.innermost_loops(LOOPS) == [["HGMMA", "LDGSTS", "BRA"], ["HGMMA", "BRA"]]
    assert triton_sass.multiplying_loops(LOOPS) == (1, 1)


def test_triton_comes_from_the_folder_that_was_named(tmp_path):
    triton_build.check_triton(Path(triton.__file__).parents[1])
    with pytest.raises(SystemExit, match="was imported: is it there, and on PYTHONPATH"):
        triton_build.check_triton(tmp_path)
