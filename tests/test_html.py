"""The page of resfuse.bench.html: what it holds, and how it behaves in a real browser without a screen."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
from bench_rows import FIXED, WHERE, block_row, every_kind, network_row, quantiles, ratio, scaling_row, unit_row

from resfuse.bench import series
from resfuse.bench.html import charts, render, sections, unit_charts, write_html

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium under its driver; required, not skipped, where RESFUSE_REQUIRE_BROWSER is 1."""
    selenium = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    for name, path in programs.items():
        if path is None:
            reason = f"needs {name}: apt-get install chromium chromium-driver"
            (pytest.fail if os.environ.get("RESFUSE_REQUIRE_BROWSER") == "1" else pytest.skip)(reason)
    options = selenium.ChromeOptions()
    options.binary_location = programs["chromium"]
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=Service(programs["chromedriver"]))
    driver.set_script_timeout(180)  # of a machine that does much else
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    """The page of every kind of row, loaded, at a desktop's width; its address."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_html(every_kind(), path)
    show(browser, 1200)
    browser.get_log("performance")
    browser.get(path.as_uri())
    return path.as_uri()


def show(browser, width, scheme="light", media="screen"):
    """Emulate a screen or paper, and let the page draw."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    frames = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))"
    browser.execute_async_script(frames)


def drawn(browser):
    """For each chart its title, the marks in its drawing, and the widths of the drawing and of its frame."""
    return browser.execute_script("""
        return [...document.querySelectorAll("[data-chart]")].map((holder) => ({
          title: holder.closest("figure").querySelector("figcaption").textContent,
          traces: holder.data.length,
          marks: holder.querySelectorAll(".bars .point path, .points path, .js-line").length,
          width: holder.querySelector(".main-svg").getBoundingClientRect().width,
          frame: holder.getBoundingClientRect().width,
        }));""")


FORMS = {
    "desktop": (1200, "light", "screen"),
    "phone": (390, "light", "screen"),
    "dark": (1200, "dark", "screen"),
    "print": (794, "dark", "print"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_chart_is_drawn_and_fits(browser, page, form):
    show(browser, *FORMS[form])
    expected = [chart for section in sections.sections(every_kind()) for chart in section.charts]
    found = drawn(browser)
    assert len(found) == len(expected) >= 16
    for chart, holder in zip(expected, found, strict=True):
        assert chart.title in holder["title"]
        assert holder["traces"] == len(chart.traces) <= holder["marks"]
        assert 200 < holder["width"] <= holder["frame"] + 1, chart.title
    assert browser.execute_script("return document.documentElement.scrollWidth") <= FORMS[form][0]
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_no_request_leaves_the_page(browser, page):
    browser.get(page)
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = {event["params"]["request"]["url"] for event in sent if event["method"] == "Network.requestWillBeSent"}
    assert page in addresses
    assert {address.partition(":")[0] for address in addresses} <= {"file", "data", "blob"}
    refused = "const done = arguments[0]; fetch('data:,x').then(() => done('let through'), () => done('refused'))"
    assert browser.execute_async_script(refused) == "refused"
    browser.get_log("browser")  # the refusal, which is reported there


def test_colours_follow_the_scheme_the_button_and_paper(browser, page):
    def ink():
        return browser.execute_script(
            "return [getComputedStyle(document.body).color,"
            " getComputedStyle(document.querySelector('.ytick text')).fill]"
        )

    seen = []
    for width, scheme, media in FORMS.values():
        show(browser, width, scheme, media)
        body, tick = ink()
        assert body == tick
        seen.append(body)
    light, phone, dark, paper = seen
    assert light == phone == paper != dark
    show(browser, 1200)
    for expected in (dark, light):
        browser.execute_script("document.getElementById('theme').click()")
        assert ink() == [expected, expected]


def column(browser, name):
    """The cells of a column of the units' table as they are sorted by, and as text."""
    return browser.execute_script(
        """
        const table = [...document.querySelectorAll("details")].find((d) => d.textContent.includes("units"))
          .querySelector("table");
        const heading = [...table.tHead.rows[0].cells].find((cell) => cell.textContent === arguments[0]);
        return [...table.tBodies[0].rows].filter((row) => !row.hidden)
          .map((row) => row.cells[heading.cellIndex].dataset.value);
        """,
        name,
    )


def click(browser, name):
    browser.execute_script(
        """
        const table = [...document.querySelectorAll("details")].find((d) => d.textContent.includes("units"));
        [...table.querySelectorAll("th button")].find((button) => button.textContent === arguments[0]).click();
        """,
        name,
    )


def test_tables_sort_by_value_and_filter(browser, page):
    before = [float(value) for value in column(browser, "gb_per_s")]
    assert before != sorted(before)
    click(browser, "gb_per_s")
    assert [float(value) for value in column(browser, "gb_per_s")] == sorted(before)
    click(browser, "gb_per_s")
    assert [float(value) for value in column(browser, "gb_per_s")] == sorted(before, reverse=True)
    click(browser, "unit")
    names = column(browser, "unit")
    assert names == sorted(names) and len(set(names)) == 4
    browser.execute_script("""
        const input = [...document.querySelectorAll("details")].find((d) => d.textContent.includes("units"))
          .querySelector("input");
        input.value = "moments BFLOAT16";
        input.dispatchEvent(new Event("input"));""")
    assert column(browser, "unit") == ["moments"] * 2 and set(column(browser, "dtype")) == {"bfloat16"}


def test_the_legend_hides_and_shows_a_peer(browser, page):
    show(browser, 1200)
    script = "const entry = document.querySelector('.legend button'); entry.click(); return entry.ariaPressed"
    whole = drawn(browser)[0]["marks"]
    assert browser.execute_script(script) == "false" and 0 < drawn(browser)[0]["marks"] < whole
    assert browser.execute_script(script) == "true" and drawn(browser)[0]["marks"] == whole


def test_the_rows_can_be_saved(browser, page):
    text = browser.execute_async_script("""
        const done = arguments[0], make = URL.createObjectURL;
        URL.createObjectURL = (blob) => { blob.text().then(done); return make(blob); };
        document.getElementById("download").click();""")
    assert [json.loads(line) for line in text.splitlines()] == every_kind()


def test_charts_are_what_plotly_accepts():
    graph_objects = pytest.importorskip("plotly.graph_objects")
    style = (Path(charts.__file__).parent / "page.css").read_text()
    for section in sections.sections(every_kind()):
        for chart in section.charts:
            text = json.dumps([chart.traces, chart.layout])
            assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= set(re.findall(r"(--[\w-]+):", style))
            graph_objects.Figure(*json.loads(re.sub(r"var\(--[\w-]+\)", "red", text)))


def test_every_unit_is_on_the_roofline_under_its_roofs():
    rows = [unit_row(), unit_row("add_relu", dtype="bfloat16"), unit_row("old") | {"flops": None}]
    chart = unit_charts.roofline("Roofline", rows)
    named = {trace["name"]: trace for trace in chart.traces}
    assert set(named) == {"float32: copy 60 GB/s, product 120 GFLOP/s", "bfloat16: copy 60 GB/s, product 400 GFLOP/s",
                          "moments", "add_relu"}  # fmt: skip
    assert "old" in chart.note
    assert named["moments"]["x"] == [3 / 8] and named["add_relu"]["x"] == [3 / 4]
    for row in rows[:2]:
        assert named[row["unit"]]["y"] == pytest.approx([row["flops"] / 1e6])  # in one millisecond
    roof = named["float32: copy 60 GB/s, product 120 GFLOP/s"]
    assert all(y == pytest.approx(min(60 * x, 120)) for x, y in zip(roof["x"], roof["y"], strict=True))


def test_a_units_roof_is_what_takes_longer():
    passes = unit_row(ms=1.0) | {"bytes": 30_000_000, "flops": 1_000_000}
    assert series.share_of_roof(passes) == pytest.approx(0.5)  # 60 GB/s would take half a millisecond
    assert series.share_of_roof(passes | {"flops": 90_000_000}) == pytest.approx(0.75)  # at 120 GFLOP/s
    assert series.share_of_roof(passes | {"flops": None, "share_of_copy": 0.3}) == 0.3


def test_units_are_told_apart_by_what_their_intervals_say():
    rows = [unit_row(), unit_row("a", over_stock=ratio(2.0)), unit_row("b", over_stock={"of_medians": 0.5}),
            unit_row("c", over_stock=None)]  # fmt: skip
    traces = unit_charts.gains("Speed-up", rows).traces
    assert {(trace["name"], *trace["y"], *trace["x"]) for trace in traces} == {
        ("faster", "moments", 2.0), ("slower", "a", 0.5), ("without an interval", "b", 2.0),
    }  # fmt: skip


def test_bars_are_speeds_relative_to_eager_with_the_peers_own_spread():
    found = series.cells([network_row({"eager": 100.0, "fused": 50.0})], "models")
    (eager, fused) = charts.speed("Training", found).traces
    assert (eager["name"], fused["name"]) == ("eager", "resfuse")
    assert eager["x"] == [1] and fused["x"] == [2] and fused["text"] == ["320/s"]
    assert fused["error_x"]["array"] == pytest.approx([100 / 47.5 - 2])
    assert fused["error_x"]["arrayminus"] == pytest.approx([2 - 100 / 55])


def test_a_verdict_needs_an_interval_that_excludes_one():
    def verdict(middle, **ends):
        row = network_row({"eager": 1.0, "fused": middle}) | {"ratios": {"fused/eager": {"of_medians": middle, **ends}}}
        return series.cells([row], "models")[0].ratios[0].verdict

    assert verdict(0.5) is None
    assert verdict(0.5, low=0.4, high=0.9) == "faster" and verdict(1.5, low=1.1, high=1.9) == "slower"
    assert verdict(0.9, low=0.8, high=1.0) == verdict(1.2, low=0.99, high=1.5) == "no difference shown"
    rows = [network_row({"eager": 100.0, "fused": ms}, model=name) for name, ms in (("a", 50.0), ("b", 200.0))]
    traces = charts.ratios("Ratios", series.cells(rows, "models")).traces
    assert [(trace["name"], trace["x"]) for trace in traces] == [("faster", [2.0]), ("slower", [0.5])]
    (card,) = sections.cards(rows)
    assert card.value == "1.00x" and card.note == "0.50x to 2.00x over 2 cells; 1 faster; 1 slower" and card.tone == ""


def test_the_newest_row_of_a_cell_is_shown():
    later = {**FIXED, "environment": {**WHERE, "date": "2026-02-02T03:04:05+00:00"}}
    rows = [network_row({"eager": 100.0, "fused": 50.0}), network_row({"eager": 100.0, "fused": 25.0}, **later)]
    (found,) = series.cells(rows, "models")
    assert found.measures["fused"].median == 25.0
    single = [{**FIXED, "suite": "gpu-models", "model": "m", "mode": "training", "dtype": "float32", "batch": 2,
               "variant": name, **quantiles(ms, 2)} for name, ms in (("eager", 2.0), ("fused", 1.0))]  # fmt: skip
    (joined,) = series.cells(single, "gpu-models")
    assert set(joined.measures) == {"eager", "fused"}
    (alone,) = series.cells([*single, {**single[1], **later}], "gpu-models")
    assert set(alone.measures) == {"fused"}, "peers of different runs are not compared"


def test_shapes_of_two_runs_of_a_unit_are_not_mixed():
    later = {"environment": {**WHERE, "date": "2026-02-02T03:04:05+00:00"}}
    small = unit_row(shape=(1, 2, 3, 3))
    assert series.units([small, unit_row(), unit_row(shape=(1, 2, 5, 5), **later)]) == [
        unit_row(shape=(1, 2, 5, 5), **later)
    ]
    assert len(series.units([small, unit_row(), unit_row("add_relu")])) == 3


def test_growth_is_linear_where_the_cost_of_work_is_flat():
    points = [(1, 4.0), (4, 4.4), (16, 16.0), (64, 128.0)]
    rows = [scaling_row("batch", value, 2 * ms, ms, value * 10**9) for value, ms in points]
    eager, fused = series.curves(rows)["batch"]
    assert fused.cost == pytest.approx([4.0, 1.1, 1.0, 2.0]) and eager.cost == pytest.approx([8.0, 2.2, 2.0, 4.0])
    assert fused.flat == [4, 16]
    chart = charts.scaling("Batch", "batch", [fused])
    assert "linear from 4 to 16; at batch 1 a multiply-add costs 4.0 times the cheapest" in chart.note
    (threads,) = {series.curves([scaling_row("threads", n, 9.0, 8.0 / n, 10**9)])["threads"][1].cost[0] for n in (1, 2)}
    assert threads == pytest.approx(8.0)


@pytest.mark.parametrize("kind", ["networks", "units", "blocks", "scaling"])
def test_missing_kinds_are_left_out_with_a_sentence(kind):
    rows = {
        "networks": [network_row({"eager": 2.0, "fused": 1.0})], "units": [unit_row()], "blocks": [block_row()],
        "scaling": [scaling_row("batch", 1, 2.0, 1.0, 10**9)],
    }  # fmt: skip
    text = render(rows[kind])
    for section in sections.sections(rows[kind]):
        assert (f'<section id="{section.name}">' in text) == bool(section.charts)
        assert bool(section.charts) or section.missing in text
    assert f'<section id="{kind}">' in text


def test_old_rows_and_predictions_are_shown():
    old = network_row({"eager": 2.0, "fused": 1.0}) | {"ratios": {"fused/eager": {"of_medians": 0.5, "paired": 0.5}}}
    for variant in old["variants"].values():
        del variant["values_ms"]
    predicted = {"suite": "roofline", "predicted": True, "gpu": "Some GPU", "unit": "moments", "microseconds": 1.5}
    text = render([old, predicted])
    assert '<section id="ratios">' not in text and '<section id="networks">' in text and "Some GPU" in text
    assert render([predicted])


def test_quick_rows_are_marked():
    rows = [network_row({"eager": 2.0, "fused": 1.0}), unit_row(quick=True)]
    assert "1 of 2 rows come from quick runs" in " ".join(render(rows).split())
    assert "quick runs" not in render(rows[:1])


def test_names_cannot_break_out_of_the_page():
    evil = "</script><script>alert(1)</script>"
    row = network_row({"eager": 2.0, "fused": 1.0}, model=evil, missing={"peer": evil}, error=math.nan)
    text = render([row])
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text and "\\u003cscript\\u003ealert" in text
    assert '"error": null' in text


def test_a_page_needs_rows(tmp_path):
    with pytest.raises(ValueError, match="needs rows"):
        write_html([], tmp_path / "report.html")
    write_html([unit_row()], tmp_path / "new" / "report.html")
    assert Path(tmp_path / "new" / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_ratios_of_a_row_are_read_whole():
    (found,) = series.cells([block_row()], "blocks")
    assert found.ratios == [series.Ratio("fused", "eager", 0.6, ratio(0.6)["low"], ratio(0.6)["high"])]
    assert found.cell.subject == "resnet50 layer1.1"
