"""What the machine code of a Triton kernel says: resources, instructions, widths of accesses, and its loops."""

import re
import subprocess
import tempfile
from typing import NamedTuple

from cuda_build import find_disassembler

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)([^;]*);", re.M)
# what the gate and the table count, by the beginning of an instruction's name
TENSOR_CORES = ("HGMMA", "UTCHMMA", "UTCQMMA", "HMMA")
ASYNCHRONOUS = ("LDGSTS", "UBLKCP", "UTMALDG")
COUNTED = (*TENSOR_CORES, *ASYNCHRONOUS, "LDG", "STG", "LDL", "STL")


class Resources(NamedTuple):
    """What ptxas gave a kernel."""

    registers: int
    local: int  # bytes of local memory, a stack frame included


def disassembled(cubin: bytes) -> str:
    """A kernel's resources and machine code, as cuobjdump prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [find_disassembler(), "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(code: str) -> Resources:
    registers, stack, _, local = map(int, _RESOURCES.search(code).groups())
    return Resources(registers, stack + local)


def instructions(code: str) -> dict[str, int]:
    """How many there are of each kind that counts."""
    names = [name for _, name, _ in _INSTRUCTION.findall(code)]
    return {kind: names.count(kind) for kind in COUNTED if kind in names}


def widths(code: str) -> tuple[int, int]:
    """How many loads and stores of global memory take 128 bits, and how many take fewer."""
    found = re.findall(r"\b(?:LDG|STG)((?:\.\w+)+)", code)
    wide = sum(".128" in access for access in found)
    return wide, len(found) - wide


def innermost_loops(code: str) -> list[list[str]]:
    """The instructions of each loop without another inside: from where a branch backward leads up to the branch.

    A branch to itself, with which every kernel ends, is none.
    """
    found = [(int(at, 16), name, rest) for at, name, rest in _INSTRUCTION.findall(code)]
    loops = []
    for at, name, rest in found:
        target = re.search(r"\b0x([0-9a-f]+)\s*$", rest) if name == "BRA" else None
        if target and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    inner = [
        (first, last)
        for first, last in loops
        if not any(first <= a and b <= last for a, b in loops if (a, b) != (first, last))
    ]
    return [[name for at, name, _ in found if first <= at <= last] for first, last in sorted(set(inner))]


def multiplying_loops(code: str) -> tuple[int, int]:
    """How many innermost loops that multiply on tensor cores copy asynchronously, and how many do not."""
    loops = [set(loop) for loop in innermost_loops(code) if not set(loop).isdisjoint(TENSOR_CORES)]
    fed = sum(not loop.isdisjoint(ASYNCHRONOUS) for loop in loops)
    return fed, len(loops) - fed
