"""The units under pytest-benchmark, for its statistics, its history and its comparisons: `make benchmark`.

No part of the test suite. Every unit is checked before it is timed, as everywhere. For example:

    pytest benchmarks/test_units_benchmark.py --benchmark-autosave -k conv_stats
    pytest-benchmark compare
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from resfuse import backends
from resfuse.bench.gate import Gate
from resfuse.bench.memory import keep_freed_memory
from resfuse.bench.units import Plan, check, rows

DTYPES = ("float32", "bfloat16")
PLAN = Plan.chosen(batch=4, size=112)


def parameters() -> Iterator[Any]:
    """A case for each implementation of each row, with the id that a history keeps."""
    for name in DTYPES:
        if backends.missing("bn_act", "native", "cpu", getattr(torch, name)) is None:
            for case, i in rows(PLAN, getattr(torch, name)):
                shape = "x".join(map(str, i.x.shape))
                for who in ("resfuse", "stock") if case.stock else ("resfuse",):
                    label = f"{case.unit} {case.form} {shape} {name}".replace("  ", " ")
                    yield pytest.param(case, i, who, label, id=f"{label} {who}")


@pytest.fixture(scope="session", autouse=True)
def kept_memory() -> None:
    """As in bench_units.py: outputs go to memory that the allocator keeps."""
    keep_freed_memory()


@pytest.mark.parametrize(("case", "operands", "who", "label"), parameters())
def test_unit(benchmark: Any, case: Any, operands: Any, who: str, label: str) -> None:
    check(case, operands, Gate(label))
    benchmark.group = label
    benchmark.extra_info.update(bytes=case.bytes, flops=case.flops, torch=torch.__version__)
    benchmark(case.ours if who == "resfuse" else case.stock)
