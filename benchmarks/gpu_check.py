"""`make gpu-check`: build for this machine's NVIDIA GPU, test, look for memory errors and races, and measure.

One command for a machine that may have torch and nvcc, or torch and Triton, and nothing else: no network, no
environment of its own. Each stage is a process with a time limit, and gets what earlier ones left of theirs; all of
them end within ten minutes. A stage that fails or runs out of time does not keep the others from running, unless they
need what it makes. Measurements, and a record of each stage, are JSON lines in gpu.jsonl, in $OUT or
benchmarks/results; what the stages print goes to gpu-check.log, and the table that `tune` measures to resfuse/choices,
in $OUT or build.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 590
PROBE = """
import json, torch
found = {"torch": torch.__version__, "gpu": torch.cuda.is_available()}
if found["gpu"]:
    found["gpu"] = torch.cuda.get_device_name()
    found["architecture"] = "{}.{}".format(*torch.cuda.get_device_capability())
    found["gigabytes"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
print(json.dumps(found))
"""
# what `resfuse tune` does, without the packages of the command line; the batch is that of the networks
TUNE = """
import json, torch
from resfuse.bench.tune import tune
path = tune(dtypes=(torch.bfloat16,), batch=256)
rows = json.loads(path.read_text())["rows"]
fused = sum(row["fused_ms"] < row["composed_ms"] for row in rows)
print(f"the fused kernel is the faster in {fused} of {len(rows)} rows of {path.name}")
"""
# of Triton's tests, what the interpreter cannot show: a GPU's own affairs, and bfloat16 in one layout; the whole takes
# many processes, since every test compiles
TRITON_ALONE = "graph or compiled or billion or autocast"
TRITON_TESTS = f"{TRITON_ALONE} or bfloat16 and not contiguous and not small"
# units that are passes, and those that are convolutions, as bench_units.py names them
PASSES = (
    "moments", "add_relu", "scale_shift_act", "backward_reduce", "backward_apply", "bn_act forward", "bn_act backward",
    "scale_shift_relu_maxpool", "scale_shift_relu_maxpool backward_reduce", "scale_shift_relu_maxpool backward_apply",
    "finalize",
)  # fmt: skip
CONVOLUTIONS = (
    "conv_stats", "conv_stats backward", "conv_act",
    "second_moments", "expand_bn_act forward", "expand_bn_act backward",
)  # fmt: skip
# variants of networks as bench_gpu.py names them, those that take long to compile last; and whose kernels they need
VARIANTS = (
    "eager", "fused", "triton", "eager-graph", "fused-graph", "triton-graph", "compile", "compile-graph",
    "fused-compile-graph",
)  # fmt: skip
KERNELS = {"fused": "native", "triton": "triton"}
TAIL = 25  # lines of a failed stage that are shown


class Stage(NamedTuple):
    """One process: its limit in seconds, why it cannot run here, and the stage whose work it needs."""

    name: str
    command: Sequence[str]
    limit: int
    missing: str | None = None
    needs: str | None = None
    environment: dict[str, str] = {}  # noqa: RUF012  a NamedTuple's default, never written


class Result(NamedTuple):
    """How a stage ended: "passed", "failed", "out of time" or "skipped"; a note is its last line, or why it skipped."""

    name: str
    state: str
    seconds: float
    note: str


def probe(python: str = sys.executable) -> dict[str, Any]:
    """The GPU as a process of its own sees it: this one must not hold its memory.

    Raises:
        SystemExit: there is no torch, or torch finds no GPU; in one line.
    """
    done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"gpu-check: {(done.stderr.strip().splitlines() or ['torch does not start'])[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if not found["gpu"]:
        raise SystemExit(f"gpu-check: torch {found['torch']} finds no NVIDIA GPU")
    return found


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def sanitizer(tool: str, backend: str) -> list[str]:
    """compute-sanitizer's command; for our own kernels only, as far as this version can tell them by name.

    Triton's have the names of their functions, which nothing sets apart from torch's.
    """
    path = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [path, "--tool", tool, "--error-exitcode", "9"]
    if backend == "native" and Path(path).is_file():
        said = subprocess.run([path, "--help"], capture_output=True, text=True).stdout
        command += ["--kernel-name", "kernel_substring=resfuse"] if "--kernel-name" in said else []
    return [*command, sys.executable, "tests/gpu_small_shapes.py", "cuda", backend]


def toolkit() -> str | None:
    """The CUDA toolkit whose nvcc compiles csrc/cuda; None where there is none."""
    found = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or (str(Path(found).parents[1]) if found else "/usr/local/cuda")
    return home if Path(home, "bin", "nvcc").is_file() else None


def plan(architecture: str, results: Path, kept: Path) -> list[Stage]:
    """What runs, in this order; the table of `tune` is kept in a folder, and the stages after it choose by it."""
    cuda = toolkit()
    build = {"RESFUSE_CUDA": "1" if cuda else "0", "MAX_JOBS": str(os.cpu_count())}
    build |= {"TORCH_CUDA_ARCH_LIST": architecture, "CUDA_HOME": cuda} if cuda else {}
    missing = {
        "native": None if cuda else "nvcc is not found",
        "triton": None if has("triton") else "Triton is not installed",
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    stages = [Stage("build", command, 95, environment=build)]
    stages += checks(missing) + measurements(missing, ["--output", str(results)], {"XDG_CACHE_HOME": str(kept)})
    return [stages[0], *(stage._replace(needs="build") for stage in stages[1:])]


def checks(missing: Mapping[str, str | None]) -> list[Stage]:
    """Tests, and the sanitizer's tools."""
    no_pytest = None if has("pytest") else "pytest is not installed"
    absent = {backend: no_pytest or reason for backend, reason in missing.items()}
    files = sorted(str(f.relative_to(ROOT)) for f in ROOT.glob("tests/test_gpu*.py"))
    of_triton = [file for file in files if "triton" in file]
    of_cuda = ["tests/test_build.py", *(file for file in files if file not in of_triton)]
    options = ["-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "--maxfail=20"]
    options += ["--continue-on-collection-errors"]  # a test module may need a package that is missing here
    options += ["-n", str(min(8, (os.cpu_count() or 2) // 2))] if has("xdist") else []
    test = [sys.executable, "-m", "pytest", *options]
    chosen = ["-k", TRITON_TESTS if has("xdist") else TRITON_ALONE]
    alone = {"OMP_NUM_THREADS": "1"}
    stages = [
        Stage("tests", [*test, *of_cuda], 60, absent["native"], environment=alone),
        Stage("triton", [*test, *of_triton, *chosen], 75, absent["triton"], environment=alone),
    ]
    # the sanitizer sees the end of an allocation only where torch does not share one among tensors
    exact = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for backend, prefix, limits in (("native", "", (20, 20)), ("triton", "triton ", (35, 20))):
        for tool, limit in zip(("memcheck", "racecheck"), limits, strict=True):
            command = sanitizer(tool, backend)
            reason = absent[backend] or (None if Path(command[0]).is_file() else "compute-sanitizer is not found")
            stages.append(Stage(prefix + tool, command, limit, reason, environment=exact))
    return stages


def measurements(missing: Mapping[str, str | None], output: Sequence[str], choices: dict[str, str]) -> list[Stage]:
    """Units of both backends, Triton's convolutions beside their rivals, the table of choices, and networks."""
    python, no_triton = sys.executable, missing["triton"]
    units = [python, "benchmarks/bench_units.py", "--device", "cuda", "--batch", "256", "--dtypes", "bfloat16", *output]
    passes, products = [*units, "--rounds", "5", "--only", *PASSES], [*units, "--rounds", "7", "--only", *CONVOLUTIONS]
    rivals = ["--backend", "triton", "--peers", "max-autotune", "--peer-seconds", "30"]
    variants = [v for v in VARIANTS if missing.get(KERNELS.get(v.partition("-")[0], "")) is None]
    models = [python, "benchmarks/bench_gpu.py", *output]
    large = [*models, "--batch", "256", "--rounds", "10", "--variants", *variants]
    small = [*models, "--batch", "16", "--rounds", "30", "--variants", *(v for v in variants if "compile" not in v)]
    nothing = no_triton if missing["native"] else None
    return [
        Stage("units", passes, 20, missing["native"]),
        Stage("triton units", [*passes, "--backend", "triton"], 25, no_triton),
        Stage("convolutions", [*products, *rivals], 55, no_triton),
        Stage("tune", [python, "-c", TUNE], 45, no_triton, environment=choices),
        Stage("batch 256", large, 95, nothing, environment=choices),
        Stage("batch 16", small, 25, nothing, environment=choices),
    ]


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a stage and the processes that it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)  # it leads a group of its own
            process.wait(timeout=3)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def run(stage: Stage, limit: float, log: Path) -> Result:
    """Run one stage for `limit` seconds at most; what it prints is appended to `log`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **stage.environment}
    start, before = time.monotonic(), log.stat().st_size if log.exists() else 0
    with log.open("ab") as file:
        try:
            process = subprocess.Popen(
                stage.command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        except OSError as error:
            return Result(stage.name, "failed", 0.0, str(error))
        try:
            state = "passed" if process.wait(timeout=limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "out of time"
            end(process)
    said = log.read_bytes()[before:].decode(errors="replace").splitlines()
    if state != "passed":
        print(*said[-TAIL:], sep="\n")
    note = next((line.strip("= \n") for line in reversed(said) if line.strip("= ")), "")
    return Result(stage.name, state, round(time.monotonic() - start, 1), note[:100])


def check(
    stages: Sequence[Stage], log: Path, seconds: float, record: Callable[[Result], None] = lambda result: None
) -> list[Result]:
    """Run the stages one after another; each is recorded as it ends, and none starts after `seconds` in all."""
    deadline = time.monotonic() + seconds
    states: dict[str, str] = {}
    results = []
    for position, stage in enumerate(stages):
        left = deadline - time.monotonic()
        later = sum(other.limit for other in stages[position + 1 :] if other.missing is None)
        reason = stage.missing
        if reason is None and stage.needs and states.get(stage.needs) != "passed":
            reason = f"{stage.needs} has not passed"
        if reason is None and left < 1:
            reason = "no time is left"
        print(f"gpu-check: {stage.name}{f' skipped: {reason}' if reason else ''}", flush=True)
        limit = min(max(stage.limit, left - later), left)  # what earlier stages left is not lost
        result = run(stage, limit, log) if reason is None else Result(stage.name, "skipped", 0, reason)
        states[stage.name] = result.state
        results.append(result)
        record(result)
    return results


def summary(results: Sequence[Result], rows: Sequence[dict[str, Any]]) -> str:
    """The table that is printed last: stages, then units, then networks, as far as they were measured."""
    lines = [f"{r.name:16} {r.state:12} {r.seconds:6.1f} s  {r.note}" for r in results]
    units = [row for row in rows if row.get("suite") == "units"]
    shares: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in (row for row in units if row["unit"] not in CONVOLUTIONS):
        shares.setdefault((row["backend"], row["unit"], row["form"]), []).append(row)
    for (backend, unit, form), cells in shares.items():
        share, rate = (statistics.median(c[key] for c in cells) for key in ("share_of_copy", "gb_per_s"))
        least = min(c["share_of_copy"] for c in cells)
        name = f"{backend} {unit.removeprefix('scale_shift_relu_')}"
        lines.append(f"{name:30} {form:9} {rate:8.0f} GB/s  {share:4.0%} of a copy, at least {least:4.0%}")
    lines += [convolution(row) for row in units if row["unit"] in CONVOLUTIONS]
    networks = [row for row in rows if row.get("suite") == "gpu-models"]
    for row in networks:
        stock = [r for r in networks if r["variant"] == "eager" and r["batch"] == row["batch"]]
        ratio = f"{row['images_per_s'] / stock[0]['images_per_s']:5.2f}x eager" if stock else ""
        lines.append(f"batch {row['batch']:3} {row['variant']:20} {row['images_per_s']:9.1f} images/s {ratio}")
    return "\n".join(lines)


def convolution(row: Mapping[str, Any]) -> str:
    """A row of a convolution in one line: ours as a share of the roofline, then its rivals."""
    (_, channels, height, _), times = row["shape"], row["times"]
    shape = f"{channels} to {row['weight'][0]} at {height}"
    rivals = [f"{name} {found['median_ms']:.3f}" for name, found in times.items() if name not in ("resfuse", "copy")]
    rivals += [f"{name} not measured: {reason}" for name, reason in row.get("missing", {}).items()]
    ours = f"{times['resfuse']['median_ms']:7.3f} ms, {row['share_of_roofline']:4.0%} of the roofline"
    return f"{row['unit']:20} {shape:19} {ours}; {', '.join(rivals)}"


def places(out: str | None) -> tuple[Path, Path]:
    """The JSON lines and the log."""
    results, log = (Path(out), Path(out)) if out else (ROOT / "benchmarks" / "results", ROOT / "build")
    for folder in (results, log):
        folder.mkdir(parents=True, exist_ok=True)
    return results / "gpu.jsonl", log / "gpu-check.log"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; 1 where a stage failed or ran out of time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the stages and their limits, and run none")
    parser.add_argument("--stages", nargs="+", help="run these only")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no stage runs longer than this after the start")
    options = parser.parse_args(arguments)
    results, log = places(os.environ.get("OUT"))
    gpu = {"gpu": "none", "architecture": "9.0"} if options.dry_run else probe()
    stages = plan(gpu["architecture"], results, log.parent)
    if options.stages:
        stages = [s._replace(needs=None) for s in stages if s.name in options.stages]
    if options.dry_run:
        for stage in stages:
            print(f"{stage.name:16} {stage.limit:4} s  {stage.missing or ' '.join(' '.join(stage.command).split())}")
        return 0
    print(f"gpu-check: {gpu['gpu']}, sm_{gpu['architecture'].replace('.', '')}, torch {gpu['torch']}")
    rows = results.read_text().count("\n") if results.exists() else 0
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def record(result: Result) -> None:
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"suite": "gpu-check", "started": started, **gpu, **result._asdict()}) + "\n")

    found = check(stages, log, options.seconds, record)
    print(f"\n{summary(found, [json.loads(line) for line in results.read_text().splitlines()[rows:]])}")
    print(f"rows in {results}, output in {log}")
    return int(any(result.state in ("failed", "out of time") for result in found))


if __name__ == "__main__":
    raise SystemExit(main())
