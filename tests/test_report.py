"""The report made of the benchmarks' records: what is shown, never a time."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from bench_rows import block_row, network_row, scaling_row, serving_row, unit_row
from PIL import Image

from resfuse import backends
from resfuse.bench import figures, series, tables
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
        "suite": "units", "quick": False, "environment": WHERE, "unit": "moments", "form": "", "dtype": "float32",
        "shape": shape, "gb_per_s": 20.0, "share_of_copy": 0.8, "over_stock": over_stock, **changes,
    }  # fmt: skip


def test_report_renders_the_newest_records():
    old, new, quick = model_record(200.0), model_record(50.0), model_record(1.0, quick=True)
    units = [
        unit_record([1, 2, 3, 3], {"of_medians": 0.5, "paired": 0.5}),
        unit_record([1, 2, 5, 5], {"of_medians": 2.0, "paired": 2.0}),
    ]
    text = tables.render([old, new, quick], units)
    assert "| resnet50 | training | float32 | 16 | 160.0 | 320.0 | 2.00x | 1.60x |\n" in text
    assert "| resnet50 | training | float32 | 16 | 20.0 | 5.0 | 0.25 |\n" in text
    assert "| resnet50 | training | float32 | 16 | 100 | 100 | 1.00 | 1000 | 1000 | 1.00 |\n" in text
    assert "| moments |  | float32 | 20 | 80% (80% to 80%) | 1.00x (0.50 to 2.00) |" in text
    assert "Some CPU" in text and "commit 012345678" in text and "1x2x3x3, 1x2x5x5" in text
    assert tables.render([], []) == "" and tables.render([quick], []) == ""


def test_report_shows_losses_intervals_and_what_is_missing():
    row = model_record(125.0, missing={"openvino": "it is not installed"})
    row["ratios"]["fused/eager"] |= {"low": 1.0, "high": 1.6}
    text = tables.summary([row])
    assert "| 0.80x [0.62, 1.00] | 0.64x | 1.00 |" in text
    assert "OpenVINO was not measured: it is not installed." in text
    assert tables.summary([memory_record()]) == tables.summary([model_record(quick=True)]) == ""


def test_the_readme_has_the_fastest_of_the_other_peers():
    row = model_record(125.0, mode="inference")
    row["ratios"] |= {f"fused/{peer}": {"of_medians": ratio, "paired": ratio} for peer, ratio in
                      (("openvino", 1.25), ("freeze", 0.5), ("eager-contiguous", 2.0))}  # fmt: skip
    row["ratios"]["fused-compile/onnxruntime"] = {"of_medians": 9.0, "paired": 9.0}
    head, _, training, inference = tables.summary([row, model_record()]).splitlines()[:4]
    assert head.endswith("| to eager | to torch.compile | to the fastest other | saved for backward, to eager |")
    assert training.endswith("| 2.00x | 1.60x |  | 1.00 |")
    assert inference.endswith("| 0.80x | 0.64x | 0.50x eager, contiguous | 1.00 |")


def test_report_shows_what_was_not_measured_as_empty():
    record = model_record()
    del record["variants"]["compile"], record["ratios"]["fused/compile"], record["outside_ms"]
    for row in record["variants"].values():
        del row["saved_bytes"], row["peak_rss_bytes"]
    other = model_record(model="resnet18")
    text = tables.render([record, other], [])
    assert "| resnet50 | training | float32 | 16 | 160.0 | 320.0 | 2.00x |  |\n" in text
    assert "| resnet50 | training | float32 | 16 |  |  |  |  |  |  |\n" in text
    assert text.count("| 20.0 | 5.0 |") == 1


def test_report_shows_memory_taken_alone_in_its_own_table():
    speed, memory = tables.render([model_record(), memory_record()], []).split("### Memory")
    assert "| resnet50 | memory | float32 | 32 | 100 | 50 | 0.50 | 1000 | 600 | 0.60 |" in memory
    assert "memory" not in speed and "images/s" not in memory
    assert "images/s" not in tables.render([memory_record()], [])


def test_report_shows_blocks_serving_and_growth():
    growth = [scaling_row("batch", n, 4.0 * n, 2.0 * n, n * 10**9) for n in (1, 2)]
    text = tables.render([], [], [block_row()], growth, [serving_row()])
    assert ("| Bottleneck layer1.1 | resnet50 | forward | float32 | 16x256x56x56 | 20.00 | 12.00 | 1.67x [1.59, 1.75] "
            "| 90.0 | 40.0 | 0.44 | 200.0 | 130.0 | 0.65 |") in text  # fmt: skip
    assert "| resnet50 | float32 | 1 | OpenVINO | 111.1 | 9.00 | 14.40 | 0.50 | 200 | 0.90x [0.86, 0.95] |" in text
    assert "| resnet50 | float32 | 1 | resfuse.fold | 100.0 | 10.00 | 16.00 | 0.50 | 200 |  |" in text
    assert "| batch | resnet50 training, float32 | resfuse | 1: 2, 2: 2 | 1 to 2 |" in text


def test_convolutions_are_shown_by_their_arithmetic():
    row = unit_row("conv_stats", "3x3", ms=2.0) | {"weight": [64, 64, 3, 3], "flops": 180_000_000, "bytes": 1000}
    text = tables.render([], [row, unit_row()])
    assert "| conv_stats | 3x3 | float32 | 90 (90 to 90) | 75% (75% to 75%) | 2.00x (2.00 to 2.00) |" in text
    assert text.count("| moments |") == text.count("| conv_stats |") == 1


def test_a_run_of_part_of_the_table_keeps_the_other_rows():
    later = {**WHERE, "date": "2026-02-02T03:04:05+00:00"}
    small = model_record(100.0, model="resnet18")
    text = tables.summary([model_record(100.0), small, model_record(50.0, environment=later)])
    assert "| resnet18 | training | float32 | 16 | 160.0 | 160.0 |" in text
    assert "| resnet50 | training | float32 | 16 | 160.0 | 320.0 |" in text and text.count("| resnet50 |") == 1
    first = [unit_record([1, 2, 3, 3], None, unit=unit) for unit in ("moments", "add_relu")]
    again = unit_record([1, 2, 5, 5], None, share_of_copy=0.9, environment=later)
    text = tables.render([], [*first, again])
    assert "| moments |  | float32 | 20 | 90% (90% to 90%) |" in text, "shapes of two runs are not mixed"
    assert "| add_relu |  | float32 | 20 | 80% (80% to 80%) |" in text


def test_report_says_where_outputs_went():
    fresh, kept = (unit_record([1, 2, 3, 3], None, unit=unit) for unit in ("moments", "add_relu"))
    kept["memory"] = "kept"
    only_fresh, both = tables.render([], [fresh]), tables.render([], [fresh, kept])
    assert "Outputs go to fresh memory" in only_fresh and "the allocator keeps" not in only_fresh
    parts = [part for part in both.split("\n\n") if part.startswith("| unit")]
    assert ["add_relu" in part for part in parts] == [True, False]
    assert both.index("the allocator keeps") < both.index("moments") < both.index("Outputs go to fresh memory")


@pytest.fixture
def checkout(tmp_path):
    """A root with pages that have markers and nothing between them, and results of one network."""
    report = load_script("report")
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/benchmarks.md", "docs/cuda.md", "docs/triton.md"):
        (tmp_path / name).write_text(f"before\n{report.START}\nwas here before\n{report.END}\nafter\n")
    append(tmp_path / "benchmarks/results/models.jsonl", network_row({"eager": 100.0, "fused": 50.0}))
    return tmp_path


def test_report_check_says_what_is_stale(checkout, capsys):
    def run(*more):
        found = report.main(["--root", str(checkout), *more])
        return found, capsys.readouterr().out

    report, results = load_script("report"), checkout / "benchmarks" / "results"
    found, said = run("--check")
    assert found == 1 and "README.md: not that of" in said and "docs/figures/networks.png" in said
    assert "was here" in (checkout / "README.md").read_text() and not (checkout / "docs/figures").exists()
    assert run() == (0, "") and run("--check") == (0, "")
    written = (checkout / "README.md").read_text()
    assert all(f"docs/figures/{name}.png" in written for name in ("networks", "networks-dark", "memory"))
    assert (
        "serving" not in written
        and written.startswith("before\n")
        and written.endswith("\nafter\n")
        and "was here" not in written
    )
    append(results / "models.jsonl", network_row({"eager": 100.0, "fused": 40.0}))
    assert run("--check")[0] == 1 and run()[0] == 0
    predicted = {"unit": "moments", "form": "", "shape": [1], "calls": 1, "bytes": 1, "microseconds": 1.0}
    where = {"gpu": "Some GPU", "copy_gb_per_s": 1.0, "model": "resnet50", "batch": 2, "dtype": "bfloat16"}
    append(results / "predicted.jsonl", {**where, **predicted})
    found, said = run("--check")
    assert found == 1 and said.count("\n") == 1 and "cuda.md" in said


def test_report_draws_what_the_rows_hold_and_removes_the_rest(checkout):
    report, folder = load_script("report"), checkout / "docs" / "figures"
    rows = report.drawn(checkout / "benchmarks" / "results")
    figures.write([*rows, serving_row()], folder)
    kinds = ("networks", "memory", "serving")
    assert {path.stem for path in folder.iterdir()} == {kind + theme for kind in kinds for theme in ("", "-dark")}
    for path in folder.iterdir():
        with Image.open(path) as picture:
            assert picture.size[0] > 700 and len(picture.convert("RGB").getcolors()) > 20
    assert {path.name for path in figures.stale(rows, folder)} == {"serving.png", "serving-dark.png"}
    before = (folder / "networks.png").stat().st_mtime_ns
    assert {path.stem.removesuffix("-dark") for path in figures.write(rows, folder)} == {"networks", "memory"}
    assert not (folder / "serving.png").exists() and (folder / "networks.png").stat().st_mtime_ns == before
    assert figures.stale(rows, folder) == []
    (panel,) = figures.networks(rows)
    (bars,) = panel.rows.values()
    assert [(bar.peer, bar.value, bar.text) for bar in bars] == [("eager", 1.0, "160/s"), ("fused", 2.0, "320/s")]


def test_report_writes_all_results_as_a_page(checkout, tmp_path):
    pytest.importorskip("plotly")
    page = tmp_path / "page.html"
    assert load_script("report").main(["--root", str(checkout), "--html", str(page)]) == 0
    assert "resnet50" in page.read_text() and "was here" in (checkout / "README.md").read_text()


@pytest.mark.parametrize("text", ["", "{0}", "{1}{0}", "{0}{1}{0}"], ids=["none", "one", "swapped", "twice"])
def test_report_refuses_a_text_without_its_markers(text):
    report = load_script("report")
    with pytest.raises(ValueError, match="once each"):
        report.replace_block(text.format(report.START, report.END), "new")


@pytest.mark.parametrize("another", [{"device_name": "Another CPU"}, {"capability": "AVX2"}])
def test_machines_have_tables_and_panels_of_their_own(another):
    """The machine that was measured last comes first, and no row takes the place of another machine's."""
    first, other = model_record(100.0), model_record(50.0)
    other["environment"] = {**other["environment"], **another, "date": "2099-01-01T00:00:00"}
    names = [series.machine_of(row) for row in (other, first)]
    text = tables.summary([first, other])
    ours = tuple(text.index(f"Measured on {name}") for name in names)
    assert ours[0] < ours[1] and text.count("| network |") == 2
    page = tables.render([first, other], [])
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings == [f"## {name}" for name in names]
    assert "## " not in tables.render([first], []).replace("### ", "")
    first["suite"] = other["suite"] = "models"
    titles = [panel.title for panel in figures.networks([first, other])]
    assert titles == [f"Training step, {name}" for name in names]
    assert [panel.title for panel in figures.networks([other])] == ["Training step"]
