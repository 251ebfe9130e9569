"""Benchmarks a sceptic would trust: what is equal shows no difference, a planted slowdown is found, on any machine.

Whole runs of the measuring library on a machine whose clock a test moves: with a drift that everything shares, with a
noise of every call, and of another speed in the second run. No real time is asserted.
"""

import json
import math
import random

import pytest
import torch
from bench_rows import network_row, quantiles, serving_row, unit_row
from stand_in import Machine
from typer.testing import CliRunner

from resfuse import backends, cli
from resfuse.bench import gate, units
from resfuse.bench.comparison import FASTER, SLOWER, UNDECIDED, compare_runs, differences
from resfuse.bench.records import append

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        backends.missing("bn_act", "native", "cpu", torch.float32) is not None, reason="the native library is missing"
    ),
]
WHERE = {"device_name": "Some CPU", "threads": 2, "torch": "2.13.0"}
PLAN = units.Plan.chosen(
    shape=(1, 4, 3, 3), dtypes=("float32",), rounds=15, units=("moments", "add_relu", "scale_shift_act")
)


@pytest.fixture
def run(monkeypatch):
    """A run of some units on a stand-in machine."""

    def measured(costs=None, *, environment=WHERE, **machine):
        stand_in = Machine(costs, **{"drift": 0.3, "noise": 0.03, **machine})
        monkeypatch.setattr(gate, "interleave", stand_in.interleave)
        monkeypatch.setattr(units, "matmul_rate", lambda *_: 1.0)
        return list(units.run(PLAN, environment))

    return measured


def verdicts(before, after):
    return [change.verdict for change in compare_runs([before], [after])]


def test_within_a_run_the_same_thing_twice_has_a_ratio_whose_interval_contains_1(run):
    ratios = [row["over_stock"] for seed in range(8) for row in run(seed=seed)]
    assert len(ratios) == 40
    assert sum(ratio["low"] <= 1 <= ratio["high"] for ratio in ratios) >= 38


@pytest.mark.parametrize("speed", [1.0, 0.5], ids=["as-fast", "half-as-fast"])
def test_two_runs_of_the_same_thing_differ_in_nothing(run, speed):
    pairs = [(run(seed=seed), run(seed=seed + 100, speed=speed)) for seed in range(8)]
    changes = [change for before, after in pairs for change in compare_runs([before], [after])]
    assert len(changes) == 40 and {change.against for change in changes} == {"stock"}
    assert sum(change.low <= 1 <= change.high for change in changes) >= 38
    assert sum(change.verdict == UNDECIDED for change in changes) >= 38


@pytest.mark.parametrize("speed", [1.0, 3.0], ids=["as-fast", "three-times-as-fast"])
def test_a_planted_slowdown_of_20_percent_is_found(run, speed):
    changes = compare_runs([run(seed=1)], [run({"resfuse": 1.2e-3}, seed=2, speed=speed)])
    assert [change.verdict for change in changes] == [SLOWER] * 5
    assert all(change.low <= 1.2 <= change.high for change in changes)
    assert {change.verdict for change in compare_runs([run({"resfuse": 1.2e-3}, seed=2)], [run(seed=1)])} == {FASTER}


def placed(run, seed, costs=None):
    """A run whose times are off by what holds for the whole run, as a buffer's place in memory does."""
    luck = random.Random(1000 + seed)
    costs = {"resfuse": 1e-3, "stock": 1e-3, **(costs or {})}
    return run({name: cost * math.exp(luck.gauss(0, 0.1)) for name, cost in costs.items()}, seed=seed)


def test_what_differs_from_run_to_run_is_in_the_interval_of_several(run):
    single, several = [], []
    for first in range(0, 48, 6):
        runs = [placed(run, seed) for seed in range(first, first + 6)]
        several += compare_runs(runs[:3], runs[3:])
        single += compare_runs(runs[:1], runs[3:4])
    wrong = [sum(change.verdict != UNDECIDED for change in changes) for changes in (single, several)]
    assert len(single) == len(several) == 40
    assert wrong[0] > 20 and wrong[1] <= 2  # one run a side cannot know
    assert {change.runs for change in several} == {(3, 3)}
    slower = [placed(run, seed, {"resfuse": 2e-3}) for seed in range(60, 63)]
    assert {change.verdict for change in compare_runs([placed(run, seed) for seed in range(3)], slower)} == {SLOWER}
    assert {change.runs for change in compare_runs(runs[:2], slower[:1])} == {(2, 1)}


def test_noise_larger_than_a_difference_leaves_it_undecided(run):
    changes = compare_runs([run(seed=1, noise=0.5)], [run({"resfuse": 1.02e-3}, seed=2, noise=0.5)])
    assert [change.verdict for change in changes].count(UNDECIDED) >= 4


def test_what_has_no_samples_gets_no_verdict(run):
    before, after = run(seed=1), run({"resfuse": 9e-3}, seed=2)
    for row in before:
        for timing in row["times"].values():
            del timing["values_ms"]
    changes = compare_runs([before], [after])
    assert {change.verdict for change in changes} == {UNDECIDED} and {change.low for change in changes} == {None}
    assert all(change.ratio > 7 for change in changes)


def test_without_a_yardstick_times_themselves_are_compared(run):
    before, after = run(seed=1, drift=0.0), run(seed=2, speed=0.5, drift=0.0)
    for row in before + after:
        del row["times"]["stock"], row["times"]["copy"]
    changes = compare_runs([before], [after])
    assert {change.against for change in changes} == {None} and {change.verdict for change in changes} == {SLOWER}


def test_of_a_cell_measured_twice_the_last_row_counts(run):
    first, again = run(seed=1), run({"resfuse": 2e-3}, seed=2)
    assert verdicts(first + again, run({"resfuse": 2e-3}, seed=3)).count(UNDECIDED) >= 4
    with pytest.raises(ValueError, match="no cell in common: 5 and 0 cells"):
        compare_runs([first], [[]])


def test_serving_is_compared_relative_to_eager_too():
    before, after = ([serving_row(batch) for batch in (1, 8)] for _ in range(2))
    changes = compare_runs([before], [after])
    assert {(change.name, change.against, change.ratio) for change in changes if "8" in change.cell} >= {
        ("folded", "eager", 1.0), ("openvino", "eager", 1.0)
    }  # fmt: skip


def test_what_differs_between_the_machines_is_said(run):
    before, after = run(), run(environment={**WHERE, "torch": "2.14.0"})
    assert differences([before], [after]) == ["torch: 2.13.0 before, 2.14.0 after"]
    assert differences([before], [before]) == []


def test_the_command_says_so_and_fails_where_it_is_asked_to(run, tmp_path):
    before, after = tmp_path / "a.jsonl", tmp_path / "b.json"
    for row in run(seed=1):
        append(before, row)
    after.write_text(json.dumps(run({"resfuse": 1.2e-3}, seed=2, environment={**WHERE, "threads": 1})))

    def invoke(*arguments):
        return CliRunner().invoke(cli.app, ["compare", *map(str, arguments)], env={"COLUMNS": "160"})

    told = invoke(before, after)
    assert told.exit_code == 0 and told.output.count("slower") == 5 + 1 and "5 slower, 0 faster" in told.output
    assert "5 of these are of one run a side" in told.output and "1 in 20" not in told.output
    told = invoke(f"{before},{before}", f"{after},{after}")
    assert "5 compared" in told.output and "one run a side" not in told.output and "1 in 20" in told.output
    assert "The runs differ in threads: 2 before, 1 after." in told.output
    assert invoke(before, after, "--fail").exit_code == 1
    assert invoke(before, before, "--fail").exit_code == 0 and "slower," not in invoke(before, before, "--json").output
    found = json.loads(invoke(before, after, "--json").output)
    assert [change["verdict"] for change in found] == ["slower"] * 5 and found[0]["against"] == "stock"
    (tmp_path / "empty.json").write_text("nonsense")
    for wrong in ("nowhere.json", "empty.json"):
        told = invoke(before, tmp_path / wrong)
        assert told.exit_code == 2 and wrong in told.stderr and told.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"environment": None}, "environment must be an object, got None"),
        ({"times": {"resfuse": {"median_ms": "1"}}}, "times of resfuse must be positive numbers, got '1'"),
        ({"times": {"resfuse": {"median_ms": 0.0}}}, "times of resfuse must be positive numbers, got 0.0"),
        ({"times": {"resfuse": {"median_ms": 1, "values_ms": [1, None]}}}, "must be positive numbers, got None"),
        ({"times": None, "variants": []}, "times must be an object of objects"),
        ({"variants": ["eager"]}, "variants must be an object of objects"),
        ({"suite": "unit"}, "suite must be one of units, blocks, models, scaling, serving, gpu-models, got 'unit'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_malformed_row_is_refused_by_file_and_place(change, said, tmp_path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    append(good, unit_row())
    append(bad, unit_row())
    append(bad, {**unit_row(), **change})
    told = CliRunner().invoke(cli.app, ["compare", str(good), str(bad)])
    assert told.exit_code == 2 and told.stderr.startswith(f"resfuse: {bad}, row 2: ") and said in told.stderr


def test_a_gpus_rows_are_compared_too():
    row = {**network_row({}), "suite": "gpu-models", "variant": "fused", **quantiles(2.0)}
    (change,) = compare_runs([[row]], [[{**row, **quantiles(1.0)}]])
    assert (change.name, change.ratio, change.cell[-2]) == ("fused", pytest.approx(0.5), "fused")
