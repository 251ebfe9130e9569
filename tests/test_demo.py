"""The demonstration at tiny sizes: it runs, writes its files, tells right from wrong, and needs no compiled library."""

import io
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from resfuse import backends, cli, ops, reference
from resfuse.demo import data, digits, parity, run, settings, speed, table

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")
TINY = settings.Settings(
    network="resnet18", photos=4, photo_size=64, rounds=2, digits_network="cifar_resnet20", train_digits=32,
    test_digits=20, digits_batch=8, epochs=1,
)  # fmt: skip
NATIVE = backends.missing("bn_act", "native", "cpu", torch.float32) is None


@pytest.fixture
def tiny(monkeypatch):
    """The command runs at the smallest size there is."""
    least = replace(TINY, photo_size=48, rounds=1, train_digits=8, test_digits=4, dtypes=("float32",))
    monkeypatch.setattr(settings, "FULL", least)
    monkeypatch.setattr(settings, "QUICK", least)


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["demo", *map(str, arguments)], env={"COLUMNS": "100"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Output folder, exit value and terminal text of one whole run."""
    folder = tmp_path_factory.mktemp("demo") / "new"
    console = Console(record=True, width=80, file=io.StringIO())
    held = run.run(folder, TINY, None, console)
    return folder, held, console.export_text()


def test_the_files_are_written(finished):
    folder, held, _ = finished
    report = json.loads((folder / "demo.json").read_text())
    assert held and report["parity"]["holds"]
    assert report["settings"] == json.loads(json.dumps(asdict(TINY)))
    assert report["environment"]["torch"] == torch.__version__
    with Image.open(folder / "demo.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
        assert len(picture.convert("L").getcolors()) > 50


def test_the_report_holds_every_part(finished):
    report = json.loads((finished[0] / "demo.json").read_text())
    assert report["backend"] == ("native" if NATIVE else "reference")
    for name in TINY.dtypes:
        record = report["parity"]["dtypes"][name]
        assert record["stock_networks_identical"]
        assert len(record["errors"]) == 5 and len(record["verdicts"]) == 2 * 9
        assert all(v["bound"] == pytest.approx(2 * v["stock"], abs=3e-3) for v in record["verdicts"])
    assert [r["dtype"] for r in report["speed"]] == list(TINY.dtypes)
    for record in report["speed"]:
        assert record["training"]["stock"]["samples"] == 2 and record["inference"]["fused"]["samples"] == 4
        assert record["saved_bytes"]["stock"] > 0 and record["saved_bytes"]["fused"] > 0
    for name in ("stock", "fused"):
        assert len(report["digits"][name]["losses"]) == 4
    assert report["digits"]["stock"]["losses"][0] == pytest.approx(report["digits"]["fused"]["losses"][0], rel=1e-4)


def test_the_terminal_shows_every_part(finished):
    text = finished[2]
    for word in ("Error, float32", "gradients, worst", "Training step, ms", "Saved for backward", "test accuracy"):
        assert word in text
    assert "Every parity bound holds." in text and "BROKEN" not in text


def test_the_table_fits_a_terminal_of_80_columns(finished):
    report = json.loads((finished[0] / "demo.json").read_text())
    times = {"p20_ms": 1001.2, "median_ms": 1034.5, "p80_ms": 1067.8}
    for record in report["speed"]:
        for mode in ("training", "inference"):
            record[mode] = {"stock": times, "fused": times, "ratio": {"of_medians": 0.123, "paired": 0.123}}
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(table.results_table(report))
    text = console.export_text()
    assert "1034 (1001-1068)" in text and "8.13x (8.13x)" in text and "…" not in text


def test_the_command_exits_with_0(tiny, tmp_path):
    result = invoke("--output", tmp_path, "--quick", "--backend", "reference")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "demo.json").read_text())["backend"] == "reference"
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_a_folder_that_cannot_be_stops_before_anything_is_measured(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_measure", lambda *_: pytest.fail("it measures"))
    (tmp_path / "file").touch()
    result = invoke("--output", tmp_path / "file", "--quick")
    assert result.exit_code == 2 and f"cannot write to {tmp_path / 'file'}" in result.output


def test_a_broken_bound_exits_with_1(tiny, tmp_path, monkeypatch):
    correct = reference.bn_act
    monkeypatch.setattr(reference, "bn_act", lambda *args, **kwargs: correct(*args, **kwargs) * 1.001)
    result = invoke("--output", tmp_path, "--backend", "reference")
    assert result.exit_code == 1, result.output
    assert "A parity bound is broken." in result.output and "BROKEN" in result.output
    assert not json.loads((tmp_path / "demo.json").read_text())["parity"]["holds"]


@pytest.mark.skipif(not NATIVE, reason="the native library is missing")
def test_a_lost_gradient_breaks_the_bound(monkeypatch):
    kernels = ops.of("native")
    correct = kernels.finalize_backward
    monkeypatch.setattr(
        kernels, "finalize_backward", lambda *args: (*(found := correct(*args))[:2], torch.zeros_like(found[2]))
    )
    photos = data.normalise(data.load_photos(TINY.photos, TINY.photo_size))
    found = parity.measure(photos, replace(TINY, dtypes=("float32",)), "native", lambda: None)
    assert not found["holds"]
    wrong = {v["quantity"] for v in found["dtypes"]["float32"]["verdicts"] if not v["holds"]}
    assert wrong and all(quantity.startswith("gradients") for quantity in wrong)


def test_a_missing_native_library_is_said_in_one_line(monkeypatch, tmp_path):
    class MeasuringError(Exception):
        pass

    def measure(photos, settings, backend, console):
        assert backend == "reference"
        raise MeasuringError

    monkeypatch.setattr(backends, "missing", lambda *_: "it was not built, which takes long to explain")
    monkeypatch.setattr(run, "_measure", measure)
    console = Console(width=80, file=io.StringIO())
    with pytest.raises(MeasuringError):
        run.run(tmp_path, TINY, None, console)
    line, where = console.file.getvalue().splitlines()
    assert "running on plain torch (backend reference): it was not built" in line and line.endswith("explain.")
    assert f"torch {torch.__version__}" in where


@pytest.mark.parametrize("backend", ["triton", "nonsense"])
def test_a_requested_backend_that_is_missing_exits_with_2(tiny, tmp_path, backend):
    result = invoke("--output", tmp_path / "none", "--backend", backend)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1 and backend in result.output
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("package", ["mlxtend", "skimage", "matplotlib"])
def test_without_the_demos_packages_one_line_says_what_to_install(package):
    code = f"import sys; sys.modules[{package!r}] = None; from resfuse.cli import app; app(['demo', '--quick'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and 'pip install "resfuse[demo]"' in done.stderr and package in done.stderr


def test_the_photographs_are_distinct_and_whole():
    photos = data.load_photos(len(data.PHOTOS), 32)
    assert photos.shape == (8, 3, 32, 32) and photos.min() >= 0 and photos.max() <= 1
    assert all(photo.std() > 0.02 for photo in photos)
    assert torch.pdist(photos.flatten(1)).min() > 1
    with pytest.raises(ValueError, match="from 1 to 8, got 9"):
        data.load_photos(9, 32)


def test_the_digits_are_split_without_overlap():
    found = data.load_digits(4000, 1000)
    assert found.train_images.shape == (4000, 1, 32, 32) and found.test_labels.shape == (1000,)
    assert found.train_labels.bincount(minlength=10).min() > 300
    assert found.train_images.mean().abs() < 1e-4 and abs(found.train_images.std() - 1) < 1e-3
    everything = torch.cat([found.train_images, found.test_images]).flatten(1)
    assert len(everything.unique(dim=0)) == len(everything)
    assert torch.equal(data.load_digits(4000, 1000).test_labels, found.test_labels)
    with pytest.raises(ValueError, match="at most 5000"):
        data.load_digits(4000, 1001)


def test_what_torch_emulates_gets_fewer_photographs(monkeypatch):
    monkeypatch.setattr(settings, "_emulated", lambda dtype: dtype == "bfloat16")
    photos = data.normalise(data.load_photos(2, 64))
    small = settings.Settings("resnet18", 2, 64, 2, emulated_photos=1, emulated_rounds=1)
    for part in (parity, speed):
        seen = []
        found = part.measure(photos, small, None, lambda seen=seen: seen.append(1))
        assert len(seen) == part.ticks(small)
    assert [record["batch"] for record in found] == [2, 1]


def test_ticks_are_as_many_as_announced():
    counts = []
    photos = data.normalise(data.load_photos(2, 64))
    small = settings.Settings("resnet18", 2, 64, 1, "cifar_resnet20", 16, 8, 8, 1, ("float32",))
    for part, arguments in ((parity, photos), (speed, photos), (digits, data.load_digits(16, 8))):
        seen = []
        part.measure(arguments, small, "reference", lambda seen=seen: seen.append(1))
        counts.append((len(seen), part.ticks(small)))
    assert all(seen == announced for seen, announced in counts), counts
