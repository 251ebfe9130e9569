"""examples/degradation.py, small: every stage, the effect itself, interruption anywhere, and files that do not fit."""

import copy
import math
import re
import signal
from dataclasses import replace
from pathlib import Path

import degradation
import degradation_pages
import pytest
import torch
from loss_surface import coordinates, directions, gradient_norms, surface_row
from networks import assert_same_state, snapshot
from PIL import Image
from resumable import TrainingError
from torch import nn

import resfuse
from resfuse.demo.data import TEXTURES, ImageSet, load_textures
from resfuse.models import CifarResNet
from resfuse.models.units import ORDERS

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = degradation.Settings(
    depths=(8, 14), widths=(16, 16, 16), size=8, train_images=48, test_images=24, batch_size=16, steps=5, points=2,
    surface_points=3, surface_images=16,
)  # fmt: skip
NETWORKS = ["plain-8", "plain-14", "residual-8", "residual-14", *(f"{order}-14" for order in ORDERS)]


@pytest.fixture(scope="module", autouse=True)
def tiles_for_every_width():
    """As users run it, in every test and in what tests share: the choice of kernels decides the bits."""


@pytest.fixture(scope="module", autouse=True)
def images():
    """Both data sets, cut once: what the script asks for, and no more."""
    found = {name: load(48, 24) for name, load in degradation.DATASETS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(degradation, "DATASETS", {name: lambda *_, s=s: s for name, s in found.items()})
        yield found


def run(folder, *more, settings=TINY):
    return degradation.main(["--dataset", "digits", "--device", "cpu", "--output-dir", str(folder), *more], settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole run, and what it returned."""
    folder = tmp_path_factory.mktemp("finished")
    page = folder / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"before\n{degradation_pages.START}\nstale\n{degradation_pages.END}\nafter\n")
    return folder, run(folder, "--dataset", "digits", "textures", "--publish", str(page))


def test_every_stage_of_a_run(finished):
    _, results = finished
    assert [(r.dataset, r.name) for r in results] == [(d, n) for d in ("digits", "textures") for n in NETWORKS]
    for result in results:
        seen, depth = result.seen, int(result.name.rpartition("-")[2])
        assert len(seen["losses"]) == 5 and [step for step, *_ in seen["points"]] == [0, 3, 5]
        assert all(0 <= error <= 100 for _, *errors in seen["points"] for error in errors)
        assert seen["gradients"].keys() == {"start", "end"}
        for norms in seen["gradients"].values():
            assert len(norms) == depth - 1 and all(0 < norm < math.inf for norm in norms)
        surface = (3, 3) if result.name in ("plain-14", "residual-14") else None
        assert surface == (None if result.surface is None else tuple(torch.tensor(result.surface).shape))


def test_figures_and_a_page_are_written(finished):
    folder, results = finished
    text = (folder / "docs" / "page.md").read_text()
    assert text.startswith(f"before\n{degradation_pages.START}\n    python examples/degradation.py --dataset digits te")
    assert text.endswith(f"{degradation_pages.END}\nafter\n") and "stale" not in text
    assert "--seed 0\n" in text and text.count("\n| textures |") == len(NETWORKS)
    for name in degradation_pages.FIGURES:
        with Image.open(folder / "docs" / "figures" / f"degradation-{name}.png") as picture:
            assert picture.format == "PNG" and picture.width > 600 and len(picture.convert("L").getcolors()) > 50
        assert f"(figures/degradation-{name}.png)" in text
    for sentence in degradation_pages.verdicts(results, TINY.depths, TINY.test_images):
        assert f"* {sentence}\n" in text


@pytest.mark.parametrize("deep, word", [(0.4, "no worse"), (0.8, "no worse"), (1.4, "worse"), (0.0, "no worse")])
def test_a_verdict_needs_more_than_an_image_or_two(deep, word):
    """Of 500 images: 0.2 % is one."""
    seen = {20: 0.2, 56: deep}
    results = [
        degradation_pages.Result("digits", f"{kind}-{depth}", {"points": [(1, error, 9.0)]}, None)
        for kind in ("plain", "residual")
        for depth, error in seen.items()
    ]
    for sentence in degradation_pages.verdicts(results, (20, 56), 500):
        assert f"-56 is {word} than " in sentence and f"{deep:.1f}% errors against 0.2%" in sentence


def test_the_documentation_holds_a_run():
    page = Path(__file__).parents[1] / "docs" / "degradation.md"
    _, run, _ = re.split(f"{degradation_pages.START}|{degradation_pages.END}", page.read_text())
    assert re.match(r"\n    python examples/degradation.py .*--seed \d+\n", run)
    for name, caption in degradation_pages.FIGURES.items():
        path = f"figures/degradation-{name}.png"
        assert f"({path})" in run and caption in run
        assert 0 < (page.parent / path).stat().st_size < 100_000
    shallow, deep = degradation.QUICK.depths
    for dataset in degradation.DATASETS:  # and it shows the effect
        assert f"* {dataset}: plain-{deep} is worse than plain-{shallow}" in run
        assert f"* {dataset}: residual-{deep} is no worse than residual-{shallow}" in run


def test_a_page_without_markers_stays(finished, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing to replace\n")
    with pytest.raises(TrainingError, match=f"{page} must hold {degradation_pages.START} and after it"):
        run(finished[0], "--publish", str(page))
    assert page.read_text() == "nothing to replace\n"


def test_what_is_finished_is_not_done_again(finished, monkeypatch):
    folder, results = finished
    for part in ("take_step", "measure", "measure_gradients"):
        monkeypatch.setattr(degradation.Training, part, None)
    monkeypatch.setattr(degradation, "surface_row", None)
    assert run(folder) == results[: len(NETWORKS)]


def results_of(folder):
    """What the checkpoints hold, but for the time it took."""
    found = {}
    for path in folder.glob("digits-*.pt"):
        state = torch.load(path, weights_only=True)
        state.get("seen", {}).pop("cpu_seconds", None)
        found[path.name] = state
    return found


INTERRUPTIONS = {
    "first-step": ("Training.take_step", 1),
    "at-a-point": ("Training.take_step", 3),
    "between-points": ("Training.take_step", 9),
    "last-step": ("Training.take_step", 10),
    "surface": ("surface_row", 2),
    "end-of-a-surface": ("surface_row", 3),
}


@pytest.mark.parametrize("where", INTERRUPTIONS)
def test_an_interrupted_run_continues_to_the_same_bits(where, finished, tmp_path, monkeypatch, capsys):
    (name, count), calls = INTERRUPTIONS[where], []
    owner, attribute = (degradation.Training, "take_step") if "." in name else (degradation, name)
    original = getattr(owner, attribute)

    def interrupted(*args):
        calls.append(1)
        if len(calls) == count:
            signal.raise_signal(signal.SIGINT if count % 2 else signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, interrupted)
        assert run(tmp_path) == []
    assert "stopped; the same command continues" in capsys.readouterr().out
    assert len(calls) == count and len(list(tmp_path.glob("*.pt"))) <= 3
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, lambda *args: calls.append(1) or original(*args))
        assert len(run(tmp_path)) == len(NETWORKS)
    total = 5 * len(NETWORKS) if owner is degradation.Training else 6
    assert len(calls) == total - count  # no step, no row is computed twice
    ours, expected = results_of(tmp_path), results_of(finished[0])
    assert ours.keys() == expected.keys()
    for name, state in expected.items():
        assert_same_state(ours[name].pop("model", {}), state.pop("model", {}))
        momenta = [{k: s["momentum_buffer"] for k, s in x.pop("optimizer", {"state": {}})["state"].items()}
                   for x in (ours[name], state)]  # fmt: skip
        assert_same_state(*momenta)
        assert ours[name] == state


@pytest.mark.parametrize("name", ["digits-plain-14.pt", "digits-plain-14.surface.pt"])
@pytest.mark.parametrize("keep", [0, 400], ids=["empty", "truncated"])
def test_a_damaged_checkpoint_names_its_path(name, keep, finished, tmp_path):
    for path in finished[0].glob("digits-*.pt"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes((finished[0] / name).read_bytes()[:keep])
    with pytest.raises(TrainingError, match=f"checkpoint {tmp_path / name} cannot be read: "):
        run(tmp_path)


@pytest.mark.parametrize(
    ("more", "settings", "reason"),
    [
        (["--seed", "1"], TINY, "seed was 0, is 1"),
        ([], replace(TINY, rate=0.2), "settings was .*'rate': 0.1.*, is .*'rate': 0.2"),
    ],
)
def test_checkpoints_of_another_run_are_refused(more, settings, reason, finished):
    with pytest.raises(TrainingError, match=f"digits-plain-8.pt belongs to another run: {reason}"):
        run(finished[0], *more, settings=settings)


def test_a_failed_save_leaves_the_last_state(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(degradation.Training, "take_step", interrupt_at(3))
        run(tmp_path)
    path = tmp_path / "digits-plain-8.pt"
    before = path.read_bytes()

    def half(content, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(TrainingError, match=f"{path} cannot be written, what was there stays: .*No space left"):
        run(tmp_path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def interrupt_at(step):
    take = degradation.Training.take_step

    def interrupted(training):
        if training.step == step - 1:
            signal.raise_signal(signal.SIGINT)
        return take(training)

    return interrupted


def test_depth_makes_a_plain_network_worse_and_not_a_residual_one(tmp_path, monkeypatch):
    """Losses of the last of few steps, in which the deep plain network learns next to nothing."""
    settings = replace(degradation.QUICK, depths=(8, 44), steps=100, points=1, train_images=1000, test_images=200)
    digits = degradation.load_digits(1000, 200)
    monkeypatch.setattr(degradation, "DATASETS", {"digits": lambda *_: digits})
    placed, loss = degradation.load("digits", settings, "cpu"), {}
    for name in ("plain-8", "plain-44", "residual-8", "residual-44"):
        course = {"dataset": "digits", "seed": 1, "settings": {}}
        training = degradation.Training(name, placed, course, settings, tmp_path / name)
        with degradation.Stop() as stop:
            degradation.train(training, stop, lambda _: None)
        loss[name] = sum(training.seen["losses"][-10:]) / 10
    assert loss["plain-44"] > 2 * loss["plain-8"], loss
    assert loss["residual-44"] < loss["plain-44"] / 2, loss


def test_gradient_norms_are_those_of_the_loss():
    model = resfuse.fuse(CifarResNet(8, widths=(16, 16, 16)))
    before, x, labels = snapshot(model), torch.randn(4, 3, 8, 8), torch.arange(4)
    norms = gradient_norms(model, x, labels)
    assert_same_state(model.state_dict(), before)
    exact = resfuse.unfuse(copy.deepcopy(model)).double()
    nn.functional.cross_entropy(exact(x.double()), labels).backward()
    expected = [m.weight.grad.norm().item() for m in exact.modules() if isinstance(m, nn.Conv2d)]
    assert norms == pytest.approx(expected, rel=1e-3)


def test_a_surface_is_the_loss_around_the_weights():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    before, x, labels = snapshot(model), torch.randn(6, 1, 4, 4), torch.arange(6) % 3
    plane = directions(model, 0)
    assert list(plane.center) == ["0.weight", "3.weight"]
    for name, weight in plane.center.items():
        for direction in (plane.across[name], plane.up[name]):
            assert torch.allclose(direction.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))
        assert not torch.allclose(plane.across[name], plane.up[name])
    along = coordinates(3)
    rows = [surface_row(model, plane, up, along, x, labels) for up in along]
    assert along == [-1, 0, 1]
    assert_same_state(model.state_dict(), before)
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        if name in plane.center:
            parameter.data += plane.up[name] - plane.across[name]
    assert rows[2][0] == pytest.approx(nn.functional.cross_entropy(other(x), labels).item(), rel=1e-4)
    assert rows[1][1] == nn.functional.cross_entropy(model(x), labels).item()
    assert len({loss for row in rows for loss in row}) == 9


def test_textures_are_ten_classes_whose_parts_share_no_pixel(images, monkeypatch):
    found = images["textures"]
    assert isinstance(found, ImageSet) and found.train_images.shape == (48, 1, 32, 32)
    assert set(found.train_labels.tolist()) == set(range(len(TEXTURES))) == set(found.test_labels.tolist())
    assert abs(found.train_images.mean()) < 1e-4 and abs(found.train_images.std() - 1) < 1e-4
    again = load_textures(48, 24)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, again, strict=True))
    assert not torch.equal(load_textures(48, 24, seed=1).train_images, found.train_images)
    # photographs whose pixels say in which column they are
    columns = torch.arange(400.0).expand(64, 400)
    monkeypatch.setattr("resfuse.demo.data._grey", lambda name: columns)
    monkeypatch.setattr("resfuse.demo.data._split", lambda images, labels, train: (images[:train], images[train:]))
    train, test = load_textures(200, 200)
    assert train.max() < 300 <= test.min()
    assert train.min() < 30 and train.max() > 270 and test.max() > 390


def test_a_device_that_is_missing_is_said(tmp_path):
    with pytest.raises(degradation.TrainingError, match="--device gpu: Expected one of cpu, cuda"):
        degradation.main(["--device", "gpu", "--output-dir", str(tmp_path)])
