"""`make gpu-check`: build for this machine's NVIDIA GPU, test, look for memory errors and races, and measure.

One command for a machine that may have torch and nvcc and nothing else: no network, no environment of its own. Each
stage is a process with a time limit; all of them end within nine minutes. A stage that fails or runs out of time does
not keep the others from running, unless they need what it makes. Measurements, and a record of each stage, are JSON
lines in gpu.jsonl, in $OUT or benchmarks/results; what the stages print goes to gpu-check.log, in $OUT or build.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 530
PROBE = """
import json, torch
found = {"torch": torch.__version__, "gpu": torch.cuda.is_available()}
if found["gpu"]:
    found["gpu"] = torch.cuda.get_device_name()
    found["architecture"] = "{}.{}".format(*torch.cuda.get_device_capability())
    found["gigabytes"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
print(json.dumps(found))
"""
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


def sanitizer(tool: str) -> list[str]:
    """compute-sanitizer's command for our kernels only, as far as this version can tell them by name."""
    path = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [path, "--tool", tool, "--error-exitcode", "9"]
    if Path(path).is_file():
        said = subprocess.run([path, "--help"], capture_output=True, text=True).stdout
        command += ["--kernel-name", "kernel_substring=resfuse"] if "--kernel-name" in said else []
    return [*command, sys.executable, "tests/gpu_small_shapes.py"]


def plan(architecture: str, results: Path) -> list[Stage]:
    """What runs, in this order."""
    python, output = sys.executable, ["--output", str(results)]
    build = {"TORCH_CUDA_ARCH_LIST": architecture, "RESFUSE_CUDA": "1", "MAX_JOBS": str(os.cpu_count())}
    nvcc = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    if "CUDA_HOME" not in os.environ and nvcc.is_file():
        build["CUDA_HOME"] = str(nvcc.parents[1])
    files = sorted(str(f.relative_to(ROOT)) for f in ROOT.glob("tests/test_gpu*.py"))
    of_triton = [file for file in files if "triton" in file]
    files = ["tests/test_build.py", *(file for file in files if file not in of_triton)]
    options = ["-m", "gpu", "-p", "no:cacheprovider", "--tb=short", "--maxfail=20"]
    options += ["--continue-on-collection-errors"]  # a test module may need a package that is missing here
    options += ["-n", str(min(8, (os.cpu_count() or 2) // 2))] if has("xdist") else []
    tests = [python, "-m", "pytest", *files, *options]
    triton_tests = [python, "-m", "pytest", *of_triton, *options]
    no_pytest = None if has("pytest") else "pytest is not installed"
    no_triton = no_pytest or (None if has("triton") else "Triton is not installed")
    # the sanitizer sees the end of an allocation only where torch does not share one among tensors
    exact = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    memory, race = sanitizer("memcheck"), sanitizer("racecheck")
    no_sanitizer = no_pytest if Path(memory[0]).is_file() else "compute-sanitizer is not found"
    units = [python, "benchmarks/bench_units.py", "--device", "cuda", "--batch", "256", "--dtypes", "bfloat16"]
    models = [python, "benchmarks/bench_gpu.py", *output]
    order = ["eager", "fused", "eager-graph", "fused-graph", "compile", "compile-graph", "fused-compile-graph"]
    return [
        Stage("build", [python, "setup.py", "build_ext", "--inplace"], 120, environment=build),
        Stage("tests", tests, 90, no_pytest, "build", {"OMP_NUM_THREADS": "1"}),
        Stage("triton", triton_tests, 80, no_triton, "build", {"OMP_NUM_THREADS": "1"}),
        Stage("memcheck", memory, 30, no_sanitizer, "build", exact),
        Stage("racecheck", race, 30, no_sanitizer, "build", exact),
        Stage("units", [*units, "--rounds", "5", *output], 40, None, "build"),
        Stage("batch 256", [*models, "--batch", "256", "--rounds", "10", "--variants", *order], 100, None, "build"),
        Stage("batch 16", [*models, "--batch", "16", "--rounds", "30", "--variants", *order[:4]], 40, None, "build"),
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
    for stage in stages:
        left = deadline - time.monotonic()
        reason = stage.missing
        if reason is None and stage.needs and states.get(stage.needs) != "passed":
            reason = f"{stage.needs} has not passed"
        if reason is None and left < 1:
            reason = "no time is left"
        print(f"gpu-check: {stage.name}{f' skipped: {reason}' if reason else ''}", flush=True)
        result = run(stage, min(stage.limit, left), log) if reason is None else Result(stage.name, "skipped", 0, reason)
        states[stage.name] = result.state
        results.append(result)
        record(result)
    return results


def summary(results: Sequence[Result], rows: Sequence[dict[str, Any]]) -> str:
    """The table that is printed last: stages, then units, then networks, as far as they were measured."""
    lines = [f"{r.name:12} {r.state:12} {r.seconds:6.1f} s  {r.note}" for r in results]
    shares: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in (row for row in rows if row.get("suite") == "units"):
        shares.setdefault((row["unit"], row["form"]), []).append(row)
    for (unit, form), cells in shares.items():
        share, rate = (statistics.median(c[key] for c in cells) for key in ("share_of_copy", "gb_per_s"))
        least = min(c["share_of_copy"] for c in cells)
        lines.append(f"{unit:17} {form:9} {rate:8.0f} GB/s  {share:4.0%} of a copy, at least {least:4.0%}")
    networks = [row for row in rows if row.get("suite") == "gpu-models"]
    for row in networks:
        stock = [r for r in networks if r["variant"] == "eager" and r["batch"] == row["batch"]]
        ratio = f"{row['images_per_s'] / stock[0]['images_per_s']:5.2f}x eager" if stock else ""
        lines.append(f"batch {row['batch']:3} {row['variant']:20} {row['images_per_s']:9.1f} images/s {ratio}")
    return "\n".join(lines)


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
    stages = plan(gpu["architecture"], results)
    if options.stages:
        stages = [s._replace(needs=None) for s in stages if s.name in options.stages]
    if options.dry_run:
        for stage in stages:
            print(f"{stage.name:10} {stage.limit:4} s  {stage.missing or ' '.join(stage.command)}")
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
