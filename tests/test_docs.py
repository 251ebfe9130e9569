"""The README's code runs as it is printed, and its tables are those of the committed results."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_readme_has_code():
    assert len(python_blocks()) >= 1


@pytest.mark.parametrize("code", python_blocks(), ids=lambda code: code.splitlines()[0])
def test_readme_code_runs(code, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    said = "54 layers folded, 0 modules stock" if "resfuse.fold(" in code else "17 of 17 blocks fused"
    assert said in run.stdout


def test_readme_tables_are_generated_from_the_results():
    run = subprocess.run([sys.executable, "benchmarks/report.py", "--check"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("target", ["demo", "test", "venv", "bench", "gpu-check", "gate", "lint"])
def test_the_makefile_has_the_targets_that_the_readme_names(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"make {target}" in README


def test_architecture_names_only_files_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    house = re.search(r"## The house\n\n```\n(.*?)```", text, re.DOTALL).group(1)
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    files = [*ROOT.iterdir(), *(path for folder in folders for path in folder.rglob("*"))]
    there = "\n".join(f"/{path.relative_to(ROOT).as_posix()}\n" for path in files)
    names = re.findall(r"\b[\w/]+\.(?:py|h|cpp|cuh)\b", house)
    assert len(names) > 100 and [name for name in names if f"/{name}\n" not in there] == []
