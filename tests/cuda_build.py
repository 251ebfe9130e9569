"""What the compiler made of the CUDA kernels: resources from ptxas's report, access widths from the machine code.

A kernel's register budget stands in the header of its file: `// registers: kernel_function_name <= N`. As a script this
builds what setup.py builds by default, prints the table, and exits with 1 where a kernel is over it.
"""

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import setuptools

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# of setup.py's extensions only the CUDA library
BUILD_CUDA = """
import runpy, setuptools
setup = setuptools.setup
setuptools.setup = lambda ext_modules, **options: setup(ext_modules=ext_modules[1:], **options)
runpy.run_path("setup.py", run_name="__main__")
"""


class Kernel(NamedTuple):
    """One instantiation of a __global__ function on one architecture."""

    source: str
    name: str  # of the function, without namespace and template arguments
    instance: str  # demangled, with template arguments and without parameters
    architecture: str
    registers: int
    shared: int  # bytes, static
    stack: int
    spilled: int


def load_setup():
    """setup.py as a module that builds nothing."""
    with mock.patch.object(setuptools, "setup", lambda **_: None):
        spec = importlib.util.spec_from_file_location("resfuse_setup", ROOT / "setup.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def find_nvcc():
    homes = [os.environ.get("CUDA_HOME", ""), *sorted(map(str, Path("/usr/local").glob("cuda*")), reverse=True)]
    found = [path for home in homes if home and (path := Path(home, "bin", "nvcc")).is_file()]
    on_path = shutil.which("nvcc")
    return found[0] if found else Path(on_path) if on_path else None


def find_disassembler():
    """cuobjdump: of the toolkit, of NVIDIA's own wheels, or of Triton's."""
    beside = find_nvcc()
    folders = [str(beside.parent)] if beside else []
    for package, inside in (("nvidia", "*/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            folders += map(str, Path(place).glob(inside))
    return shutil.which("cuobjdump", path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))


def build(folder):
    """Build the CUDA library into `folder` for the default architectures; its path and that of the objects."""
    nvcc = find_nvcc()
    environment = {**os.environ, "CUDA_HOME": str(nvcc.parents[1]), "RESFUSE_CUDA": "1"}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    command = [sys.executable, "-c", BUILD_CUDA, "build_ext", "--build-lib", folder, "--build-temp", folder]
    with mock.patch.dict(os.environ, environment, clear=True):
        objects = load_setup().object_folder(str(nvcc))
    objects.mkdir(parents=True, exist_ok=True)
    with (objects / "lock").open("w") as lock:  # other processes of a test run wait, and find the objects made
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the CUDA library does not build:\n{done.stdout}{done.stderr}")
    return Path(folder, "resfuse", "_cuda.so"), objects


def demangled(names):
    """Names by their mangled form, without parameters."""
    names = list(dict.fromkeys(names))
    said = subprocess.check_output(["c++filt", "--no-params"], input="\n".join(names), text=True).splitlines()
    return dict(zip(names, (line.replace("(anonymous namespace)::", "") for line in said), strict=True))


def function_name(instance):
    """map_kernel of resfuse::cuda::map_kernel<resfuse::Half, 8>."""
    return instance.partition("<")[0].split()[-1].split("::")[-1]


REPORT = re.compile(
    r"Compiling entry function '(?P<symbol>\S+)' for '(?P<architecture>\w+)'\n"
    r"(?P<functions>(?:.*Function properties for .*\n.*bytes stack frame.*\n)+)"
    r".*Used (?P<registers>\d+) registers(?P<rest>.*)"
)


def parse(log, source=""):
    """The kernels of one ptxas report. A function that was not inlined counts with its kernel."""
    found = [match.groupdict() for match in REPORT.finditer(log)]
    names = demangled(entry["symbol"] for entry in found) if found else {}
    kernels = []
    for entry in found:
        instance = names[entry["symbol"]]
        frames = [list(map(int, numbers)) for numbers in re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry["functions"]
        )]  # fmt: skip
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        kernels.append(
            Kernel(
                source, function_name(instance), instance, entry["architecture"], int(entry["registers"]),
                int(shared[1]) if shared else 0, sum(f[0] for f in frames), sum(f[1] + f[2] for f in frames),
            )
        )  # fmt: skip
    assert len(kernels) == log.count("Compiling entry function"), "a report in another form"
    return kernels


def kernels_in(objects):
    """The kernels of every source's report; an object whose source is gone may lie beside them."""
    return [k for source in SOURCES for k in parse((objects / f"{source.stem}.log").read_text(), source.name)]


def budgets(source):
    """Registers by kernel function, from the comments of a file and of the headers beside it."""
    texts = [path.read_text() for path in [*sorted(source.parent.glob("*.cuh")), source]]
    return {m[1]: int(m[2]) for text in texts for m in re.finditer(r"^// registers: (\w+) <= (\d+)$", text, re.M)}


def all_budgets():
    """Budgets by source file."""
    return {source.name: budgets(source) for source in SOURCES}


def faults(kernels, budget_of):
    """What the gate refuses, in words. budget_of: budgets by source file."""
    found, without = [], {}
    for k in kernels:
        where, budget = f"{k.source}: {k.instance} on {k.architecture}", budget_of[k.source].get(k.name)
        if k.stack or k.spilled:
            found.append(f"{where} has a stack frame of {k.stack} bytes and spills {k.spilled}")
        if budget is None:
            without[k.source, k.name] = max(k.registers, without.get((k.source, k.name), 0))
        elif k.registers > budget:
            found.append(f"{where} takes {k.registers} registers, {budget} allowed")
    return found + [
        f"{source}: {name} has no budget: its header must say `// registers: {name} <= {most}`"
        for (source, name), most in without.items()
    ]


def table(kernels, budget_of):
    """A line for each kernel and architecture: the most of its instantiations."""
    lines = [
        f"{'kernel':46} {'arch':7} {'forms':>5} {'registers':>9} {'budget':>6} {'shared':>7} {'stack':>5} {'spill':>5}"
    ]
    groups = {}
    for k in kernels:
        groups.setdefault((k.source, k.name, k.architecture), []).append(k)
    for (source, name, architecture), forms in groups.items():
        most = [max(getattr(k, field) for k in forms) for field in ("registers", "shared", "stack", "spilled")]
        budget = budget_of[source].get(name, "none")
        lines.append(
            f"{f'{source} {name}':54} {architecture:7} {len(forms):5} {most[0]:9} {budget:>6} {most[1]:7} {most[2]:5} "
            f"{most[3]:5}"
        )
    return "\n".join(lines)


def accesses(binary, architecture):
    """By kernel instance, how often each global load and store of a width stands in the machine code.

    Widths as the instructions name them: LDG.128, STG.U16, and LDG.32 where they name none.
    """
    command = [find_disassembler(), "--dump-sass", "--gpu-architecture", architecture, str(binary)]
    code = subprocess.check_output(command, text=True)
    found, symbol = {}, None
    for match in re.finditer(r"Function : (\S+)|\b(LDG|STG)((?:\.\w+)+)", code):
        if match[1]:
            symbol, found[match[1]] = match[1], Counter()
        else:
            width = re.search(r"\.([US]?(?:8|16)|64|128)\b", match[3])
            found[symbol][f"{match[2]}.{width[1] if width else 32}"] += 1
    names = demangled(found) if found else {}
    return {names[symbol]: counts for symbol, counts in found.items()}


WIDTHS = {"Half": 8, "BFloat16": 8, "float": 4, "double": 2}  # values in 16 bytes
_ELEMENT = re.compile(rf"\b({'|'.join(WIDTHS)})\b")
_WIDTH = re.compile(r", (\d+)>$")


def element(instance):
    """The type whose values a vector kernel takes 16 bytes of at once; None for any other kernel.

    A kernel's width is its last template argument, its type the first that is named.
    """
    kind, width = _ELEMENT.search(instance), _WIDTH.search(instance)
    return kind[1] if kind and width and int(width[1]) == WIDTHS[kind[1]] else None


def narrow(found):
    """Vector kernels whose accesses are not 128 bits wide, in words; a kernel of 16-bit values is held to its scalar
    form: what that reads or writes in 16 bits, the vector form does in 128, except a tail."""
    wrong = []
    for instance, counts in found.items():
        kind = element(instance)
        if kind is None:
            continue
        if not counts["LDG.128"]:
            wrong.append(f"{instance} loads {dict(counts)}")
        scalar = found.get(_WIDTH.sub(", 1>", instance), Counter())
        for access in ("LDG", "STG") if kind in ("Half", "BFloat16") else ():
            if scalar[f"{access}.U16"] and counts[f"{access}.128"] < max(1, counts[f"{access}.U16"]):
                wrong.append(f"{instance} has {dict(counts)}, its scalar form {dict(scalar)}")
    return wrong


def main():
    """Build, print the table and what is wrong."""
    if find_nvcc() is None:
        sys.exit("needs nvcc: set CUDA_HOME")
    _, objects = build(ROOT / "build" / "cuda-report")
    kernels = kernels_in(objects)
    print(table(kernels, all_budgets()))
    sys.exit("\n".join(faults(kernels, all_budgets())) or 0)


if __name__ == "__main__":
    main()
