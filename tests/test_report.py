"""The report made of the benchmarks' records: what is shown, never a time."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from resfuse import backends
from resfuse.bench.records import append

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
needs_native = pytest.mark.skipif(
    backends.missing("bn_act", "native", "cpu", torch.float32) is not None, reason="the native library is missing"
)


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WHERE = {
    "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef", "dirty": False, "device_name": "Some CPU",
    "capability": "AVX512", "threads": 2, "torch": "2.13.0",
}  # fmt: skip


def model_record(fused_ms=50.0, quick=False, **changes):
    times = {"eager": 100.0, "compile": 80.0, "fused": fused_ms}
    variants = {
        name: {"median_ms": ms, "images_per_s": round(16e3 / ms, 2), "saved_bytes": 10**8, "peak_rss_bytes": 10**9}
        for name, ms in times.items()
    }
    ratios = {f"fused/{b}": {"of_medians": fused_ms / times[b], "paired": 0.5} for b in ("eager", "compile")}
    cell = {"model": "resnet50", "mode": "training", "dtype": "float32", "batch": 16, "size": 224}
    found = {"variants": variants, "ratios": ratios, "outside_ms": {"eager": 20.0, "fused": 5.0}}
    return {"quick": quick, "environment": WHERE, **cell, **found, **changes}


def memory_record(**changes):
    variants = {"eager": {"saved_bytes": 10**8, "peak_rss_bytes": 10**9},
                "fused": {"saved_bytes": 5 * 10**7, "peak_rss_bytes": 6 * 10**8}}  # fmt: skip
    record = model_record(mode="memory", batch=32, variants=variants, ratios={}, **changes)
    del record["outside_ms"]
    return record


def unit_record(shape, over_stock, **changes):
    return {
        "quick": False, "environment": WHERE, "unit": "moments", "form": "", "dtype": "float32", "shape": shape,
        "gb_per_s": 20.0, "share_of_copy": 0.8, "over_stock": over_stock, **changes,
    }  # fmt: skip


def test_report_renders_the_newest_records():
    report = load_script("report")
    old, new, quick = model_record(200.0), model_record(50.0), model_record(1.0, quick=True)
    units = [
        unit_record([1, 2, 3, 3], {"of_medians": 0.5, "paired": 0.5}),
        unit_record([1, 2, 5, 5], {"of_medians": 2.0, "paired": 2.0}),
    ]
    text = report.render([old, new, quick], units)
    assert "| resnet50 | training | float32 | 16 | 160.0 | 200.0 | 320.0 | 2.00x | 1.60x | 20.0 | 5.0 | 0.25 |" in text
    assert "| resnet50 | training | float32 | 16 | 100 | 100 | 1.00 | 1000 | 1000 | 1.00 |\n" in text
    assert "| moments |  | float32 | 20 | 80% (80% to 80%) | 1.00x (0.50 to 2.00) |" in text
    assert "Some CPU" in text and "commit 012345678" in text and "1x2x3x3, 1x2x5x5" in text
    assert report.render([], []) == "" and report.render([quick], []) == ""


def test_report_shows_what_was_not_measured_as_empty():
    record = model_record()
    del record["variants"]["compile"], record["ratios"]["fused/compile"], record["outside_ms"]
    for row in record["variants"].values():
        del row["saved_bytes"], row["peak_rss_bytes"]
    text = load_script("report").render([record], [])
    assert "| 16 | 160.0 |  | 320.0 | 2.00x |  |  |  |  |\n" in text
    assert "| 16 |  |  |  |  |  |  |\n" in text


def test_report_shows_memory_taken_alone_in_its_own_table():
    report = load_script("report")
    speed, memory = (part for part in report.render([model_record(), memory_record()], []).split("\n\n") if "|" in part)
    assert "| resnet50 | memory | float32 | 32 | 100 | 50 | 0.50 | 1000 | 600 | 0.60 |" in memory
    assert "memory" not in speed and "images/s" not in memory
    assert "images/s" not in report.render([memory_record()], [])


def test_a_run_of_part_of_the_table_keeps_the_other_rows():
    report = load_script("report")
    later = {**WHERE, "date": "2026-02-02T03:04:05+00:00"}
    small = model_record(100.0, model="resnet18")
    text = report.render([model_record(100.0), small, model_record(50.0, environment=later)], [])
    assert "| resnet18 | training | float32 | 16 | 160.0 | 200.0 | 160.0 |" in text
    assert "| resnet50 | training | float32 | 16 | 160.0 | 200.0 | 320.0 |" in text and text.count("| resnet50 |") == 2
    first = [unit_record([1, 2, 3, 3], None, unit=unit) for unit in ("moments", "add_relu")]
    again = unit_record([1, 2, 5, 5], None, share_of_copy=0.9, environment=later)
    text = report.render([], [*first, again])
    assert "| moments |  | float32 | 20 | 90% (90% to 90%) |" in text, "shapes of two runs are not mixed"
    assert "| add_relu |  | float32 | 20 | 80% (80% to 80%) |" in text


def test_report_says_where_outputs_went():
    report = load_script("report")
    fresh, kept = (unit_record([1, 2, 3, 3], None, unit=unit) for unit in ("moments", "add_relu"))
    kept["memory"] = "kept"
    only_fresh, both = report.render([], [fresh]), report.render([], [fresh, kept])
    assert "Outputs go to fresh memory" in only_fresh and "the allocator keeps" not in only_fresh
    tables = [part for part in both.split("\n\n") if part.startswith("| unit")]
    assert ["add_relu" in table for table in tables] == [True, False]
    assert both.index("the allocator keeps") < both.index("moments") < both.index("Outputs go to fresh memory")


def test_report_check_says_whether_the_tables_are_stale(tmp_path, capsys):
    report = load_script("report")
    readme, page, results = tmp_path / "README.md", tmp_path / "cuda.md", tmp_path / "results"
    arguments = ["--readme", str(readme), "--cuda-page", str(page), "--results", str(results)]
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    page.write_text(f"{report.START}\n{report.END}\n")
    append(results / "models.jsonl", model_record())
    assert report.main([*arguments, "--check"]) == 1 and "stale" not in readme.read_text()
    assert "run python benchmarks/report.py" in capsys.readouterr().out
    assert "old" in readme.read_text()
    assert report.main(arguments) == 0
    written = readme.read_text()
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "old" not in written
    assert report.main([*arguments, "--check"]) == 0
    append(results / "models.jsonl", model_record(40.0))
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    predicted = {"unit": "moments", "form": "", "shape": [1], "calls": 1, "bytes": 1, "microseconds": 1.0}
    where = {"gpu": "Some GPU", "copy_gb_per_s": 1.0, "model": "resnet50", "batch": 2, "dtype": "bfloat16"}
    append(results / "predicted.jsonl", {**where, **predicted})
    assert report.main([*arguments, "--check"]) == 1


@pytest.mark.parametrize("text", ["", "{0}", "{1}{0}", "{0}{1}{0}"], ids=["none", "one", "swapped", "twice"])
def test_report_refuses_a_text_without_its_markers(text):
    report = load_script("report")
    with pytest.raises(ValueError, match="once each"):
        report.replace_block(text.format(report.START, report.END), "new")
