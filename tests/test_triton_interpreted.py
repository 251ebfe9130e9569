"""Triton's kernels without a GPU: the tests of triton_interpreted/ in a process whose Triton interprets.

TRITON_INTERPRET has to be set before Triton is imported, and an interpreting process cannot compile: so another one.
`TRITON_INTERPRET=1 pytest tests/triton_interpreted` runs the same tests by hand.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")

HERE = Path(__file__).parent
FILES = sorted((HERE / "triton_interpreted").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout, done.stdout[-2000:]


def test_there_are_files_to_run():
    assert FILES  # an empty parametrisation would be skipped, not fail
