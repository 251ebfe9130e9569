"""`resfuse doctor`: what this installation has, why it has not the rest, and whether it computes right."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from resfuse.bench.diagnosis import diagnose
from resfuse.bench.environment import describe
from resfuse.cli.common import OK, WRONG, console, say


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Also fail where the CPU's native kernels are missing.")
    ] = False,
) -> None:
    """Say what is installed, which backends load and why not the others, and test them on small shapes.

    Exits with 1 if a self-test fails; with --strict also if the CPU has no native kernels.
    """
    found = diagnose()
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _show(found)
    native = any(b["available"] for b in found["backends"] if (b["backend"], b["device"]) == ("native", "cpu"))
    raise typer.Exit(OK if found["healthy"] and (native or not strict) else WRONG)


def _show(found: dict[str, Any]) -> None:
    say(describe(found["environment"]))
    _head("Backends")
    for status in found["backends"]:
        state = "[green]available[/]" if status["available"] else f"missing: {status['reason']}"
        _line(f"{status['backend']:10} {status['device']:5} {state}")
    _head("Processor")
    cpu = found["cpu"]
    _line(f"{cpu['capability']}; features that matter: {', '.join(cpu['features']) or 'none'}")
    _line(f"{cpu['cores']} cores, torch uses {cpu['threads']} threads; huge pages: {cpu['huge_pages'] or 'unknown'}")
    for dtype, who in cpu["convolutions"].items():
        _line(f"convolutions in {dtype} by {who}")
    _head("GPU")
    _line(_gpu(found["gpu"]))
    _head("Packages")
    _line(", ".join(f"{name} {version}" for name, version in found["packages"].items() if version))
    absent = [name for name, version in found["packages"].items() if not version]
    _line(f"not installed, and not needed by the core: {', '.join(absent)}" if absent else "all that any extra needs")
    _head("Caches")
    for cache in found["caches"]:
        _line(f"{cache['name']:9} {cache['files']:5} files {cache['bytes'] / 1e6:8.1f} MB  {cache['path']}")
    _head("Self-test")
    for test in found["self_test"]:
        mark = "[green]passed[/]" if test["passed"] else "[bold red]FAILED[/]"
        _line(f"{test['name']:22} {mark} {test['detail']} ({test['seconds']:.1f} s)")


def _gpu(gpu: dict[str, Any]) -> str:
    if not gpu["available"]:
        return f"none: {gpu['reason']}"
    return (
        f"{gpu['name']} ({gpu['capability']}), {gpu['memory_bytes'] / 1e9:.0f} GB, CUDA {gpu['cuda']}, "
        f"cuDNN {gpu['cudnn']}"
    )


def _head(text: str) -> None:
    console.print(f"[bold]{text}[/]")


def _line(text: str) -> None:
    console.print(f"  {text}", highlight=False, soft_wrap=True)
