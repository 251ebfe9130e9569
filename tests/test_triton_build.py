"""The compile gate of Triton's kernels, for one target and dtype: `make gate` asks for all of them."""

import os

import pytest

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process compiles nothing", allow_module_level=True)

import triton_build
from cuda_build import find_disassembler

pytestmark = pytest.mark.skipif(find_disassembler() is None, reason="needs cuobjdump, which is in Triton's wheel")


@pytest.fixture(scope="module")
def kernels():
    return triton_build.build([90], ["bfloat16"])


def test_no_kernel_spills_and_every_product_uses_the_tensor_cores(kernels, record_property):
    record_property("table", triton_build.table(kernels))
    assert triton_build.faults(kernels) == []


def test_every_operator_is_compiled(kernels):
    in_place = {name for name in triton_build.LAUNCHERS if name.endswith("_")}
    assert triton_build.LAUNCHERS.keys() - in_place == {
        name for case in triton_build.CASES for name, _ in case_of(case)
    }


def case_of(case):
    return case(triton_build.DTYPES["bfloat16"])


def test_the_page_has_every_kernel(kernels):
    """`make gate` writes it."""
    page = triton_build.PAGE.read_text()
    missing = {k.kernel for k in kernels if f"| {k.kernel} | sm_{k.target} |" not in page}
    assert not missing, "run `make gate`"


def test_passes_are_vectors_of_128_bits(kernels):
    """A pass over channels_last memory loads each activation in the widest accesses there are."""
    passes = {"add_relu_kernel", "moments_kernel", "scale_shift_act_kernel", "reduce_kernel", "apply_kernel"}
    found = [k for k in kernels if k.kernel in passes]
    assert {k.kernel for k in found} == passes
    assert all(k.wide > 0 for k in found), triton_build.table(found)
    assert all(k.narrow == 0 for k in found if k.kernel == "add_relu_kernel")


def kernel(**changes):
    base = triton_build.Compiled("unit", "kernel", 90, "bfloat16", 4, 100, 0, 0, 1, 1, 0, {"HGMMA": 1, "LDGSTS": 1})
    return base._replace(**changes)


def test_the_gate_refuses_what_it_should():
    assert triton_build.faults([kernel()]) == []
    assert "spills: 8 bytes" in triton_build.faults([kernel(spilled=8)])[0]
    assert "without HGMMA" in triton_build.faults([kernel(instructions={"LDGSTS": 1})])[0]
    assert "asynchronously" in triton_build.faults([kernel(instructions={"HGMMA": 1})])[0]
    assert triton_build.faults([kernel(instructions={}, dots=0)]) == []
    assert triton_build.faults([kernel(instructions={}, dtype="float32")]) == []


def test_instructions_are_counted():
    code = """
        /*0080*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0090*/              @!P0 LDG.E.128 R8, desc[UR4][R2.64] ;
        /*00a0*/                   HGMMA.64x64x16.F32.BF16 R24, R24, gdesc[UR8], RZ ;
        /*00b0*/              @UP1 STG.E desc[UR4][R2.64], R5 ;
    """
    assert triton_build.instructions(code) == {"HGMMA": 1, "LDG": 2, "STG": 1}
    assert triton_build.widths(code) == (2, 1)
