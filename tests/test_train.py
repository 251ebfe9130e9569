"""examples/train.py: an interrupted and resumed run is the uninterrupted one, and bad files are reported by path."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train
from networks import assert_same_state, torchvision_models
from PIL import Image

import resfuse
from resfuse.demo import data

SCRIPT = Path(train.__file__)

# 14 images in batches of 4: 3 steps an epoch, 2 images left out
SMALL = ["--model=cifar_resnet20", "--batch-size=4", "--epochs=2", "--workers=0", "--print-freq=1", "--lr=0.05"]
SMALL += ["--train-crop-size=16", "--val-resize-size=18", "--val-crop-size=16", "--device=cpu"]
CROPS_OF_32 = ["--train-crop-size=32", "--val-resize-size=32", "--val-crop-size=32"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    torchvision_models()  # or a skip
    root, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, count in (("train", 7), ("val", 3)):
        for label in ("cat", "dog"):
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def options(photos, out, *more):
    return [*SMALL, "--data-path", str(photos), "--output-dir", str(out), *more]


def states(out):
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    momenta = {str(i): state["momentum_buffer"] for i, state in saved["optimizer"]["state"].items()}
    return {name: saved[name] for name in ("model", "ema") if name in saved} | {"momenta": momenta}


def interrupt_in(step, monkeypatch, number):
    take = train.Run.train_step

    def interrupted(run, *batch):
        if run.step == step - 1:
            signal.raise_signal(number)
        return take(run, *batch)

    monkeypatch.setattr(train.Run, "train_step", interrupted)


VARIANTS = {  # options, and after how many steps to interrupt
    "fused": (["--ema-decay", "0.9"], 2),
    "at-the-end-of-an-epoch": (["--save-freq", "1"], 3),
    "in-the-second-epoch": ([], 5),
    "stock": (["--no-fuse", "--no-channels-last", "--workers", "2"], 4),
    "bfloat16": (["--amp", "bfloat16", "--label-smoothing", "0.1"], 1),
    "float16": (["--amp", "float16"], 4),
    "dropout": (["--model", "densenet121", "--model-option", "drop_rate=0.3", *CROPS_OF_32], 4),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_run_resumes_to_the_same_state(variant, photos, tmp_path, monkeypatch, capsys):
    (more, step), whole, broken = VARIANTS[variant], tmp_path / "whole", tmp_path / "broken"
    train.main(options(photos, whole, *more))
    assert "ema/top1" in capsys.readouterr().out or "--ema-decay" not in more
    with monkeypatch.context() as patch:
        interrupt_in(step, patch, signal.SIGINT if step == 2 else signal.SIGTERM)
        run = train.main(options(photos, broken, *more))
    assert run.step == step and not (broken / "model.pth").exists()
    assert f"continue with --resume {broken / 'checkpoint.pt'}" in capsys.readouterr().out
    run = train.main(options(photos, broken, *more, "--resume", str(broken / "checkpoint.pt")))
    assert run.step == 6
    ours, expected = states(broken), states(whole)
    for part, state in expected.items():
        assert_same_state(ours[part], state)
    assert not list(broken.glob("*.writing"))


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("finished")
    train.main(options(photos, out, "--ema-decay", "0.5"))
    return out


def test_training_learns_and_exports_what_get_model_loads(finished, photos, tmp_path, capsys):
    model = resfuse.models.get_model("cifar_resnet20", weights=finished / "model.pth", num_classes=2)
    assert_same_state(model.state_dict(), states(finished)["model"])
    resfuse.models.get_model("cifar_resnet20", weights=finished / "ema.pth", num_classes=2)
    train.main(options(photos, tmp_path, "--test-only", "--weights", str(finished / "model.pth")))
    out = capsys.readouterr().out
    assert "val/top1" in out and "val/top5 100" in out and "loss" not in out
    assert not list(tmp_path.iterdir())


def test_the_rate_rises_and_falls(photos, tmp_path):
    run = train.main(options(photos, tmp_path, "--epochs", "1"))
    run.args.warmup_epochs, run.args.epochs, run.steps_per_epoch, rates = 1, 4, 10, []
    for run.step in range(40):
        rates.append(run.rate)
    assert rates[:10] == pytest.approx([0.05 * (i + 1) / 11 for i in range(10)])
    assert rates[10] == 0.05 and rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.001


def test_a_failed_save_leaves_the_last_state(photos, tmp_path, monkeypatch):
    run = train.main(options(photos, tmp_path, "--epochs", "1"))
    before = run.checkpoint.read_bytes()

    def half(content, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(train.TrainingError, match=r"checkpoint.pt cannot be written, .*No space left"):
        run.save()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "model.pth"]


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


def renamed(state):
    state["model"]["other"] = state["model"].pop("fc.bias")
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("optimizer"), r"is none of this script's: missing keys: \['optimizer'\]"),
        (renamed, r"missing keys: fc.bias\n  unexpected keys: other"),
        (lambda state: {**state, "course": {**state["course"], "lr": 1.0}}, "another run: lr was 1.0, is 0.05"),
        (lambda state: b"no dictionary", r"missing keys: \['course', 'ema', 'model'"),
    ],
    ids=["incomplete", "misfit", "other-run", "bytes"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change, message, finished, photos, tmp_path):
    path = tmp_path / "bad.pt"
    torch.save(change(torch.load(finished / "checkpoint.pt", weights_only=True)), path)
    with pytest.raises(train.TrainingError, match=f"(?s){path}.*{message}"):
        train.main(options(photos, tmp_path, "--ema-decay", "0.5", "--resume", str(path)))


@pytest.mark.parametrize("keep", [0, 1000, None], ids=["empty", "truncated", "absent"])
def test_a_damaged_checkpoint_names_its_path(keep, finished, photos, tmp_path):
    path = tmp_path / "damaged.pt"
    if keep is not None:
        path.write_bytes((finished / "checkpoint.pt").read_bytes()[:keep])
    with pytest.raises(train.TrainingError, match=f"checkpoint {path} cannot be read: "):
        train.main(options(photos, tmp_path, "--resume", str(path)))


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_image_names_its_path(workers, photos, tmp_path):
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    bad = root / "train" / "dog" / "3.png"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(train.TrainingError, match=f"image {bad} cannot be read: ") as told:
        train.main(options(root, tmp_path, "--workers", workers, "--batch-size", "14"))
    said = train.one_line(told.value)
    assert said.startswith(f"image {bad} cannot be read: ") and "\n" not in said


def test_a_run_with_other_images_or_crops_is_another_run(finished, photos, tmp_path):
    more = photos / "train" / "cat" / "more.png"
    path, again = str(finished / "checkpoint.pt"), ["--ema-decay", "0.5"]
    with pytest.raises(train.TrainingError, match="another run: train_crop_size was 16, is 12"):
        train.main(options(photos, tmp_path, *again, "--train-crop-size", "12", "--resume", path))
    shutil.copy(photos / "train" / "cat" / "0.png", more)
    try:
        with pytest.raises(train.TrainingError, match="another run: training_images was 14, is 15"):
            train.main(options(photos, tmp_path, *again, "--resume", path))
    finally:
        more.unlink()


def test_a_new_run_does_not_overwrite_another(finished, photos):
    before = (finished / "checkpoint.pt").read_bytes()
    with pytest.raises(train.TrainingError, match=r"checkpoint.pt is another run's: --resume it, or choose another"):
        train.main(options(photos, finished))
    assert (finished / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("option", ["--batch-size", "--print-freq", "--save-freq", "--epochs"])
def test_a_count_of_none_is_refused(option, photos, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(options(photos, tmp_path, option, "0"))
    assert f"argument {option}: invalid positive value: '0'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "resnet51"], "--model resnet51: .*nearest: .*resnet50.*list_models"),
        (["--model-option", "shortcut=D"], "shortcut must be one of A, B, C, None, got 'D'"),
        (["--model-option", "colour=red"], "unexpected keyword arguments: colour; accepted are: weights, "),
        (["--weights", "absent.pth"], "absent.pth"),
        (["--batch-size", "15"], "--batch-size 15 x 1 processes is more than 14 images"),
        (["--tensorboard", "curves"], r"--tensorboard needs a package: pip install \"resfuse\[examples\]\""),
        (["--device", "gpu"], "--device gpu: Expected one of cpu, cuda"),
        (["--device", "cuda:99"], "--device cuda:99: torch finds .* NVIDIA GPU"),
    ],
)
def test_what_does_not_go_is_said(more, message, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(train.TrainingError, match=message):
        train.main(options(photos, tmp_path, *more))


def test_curves_are_drawn(photos, tmp_path, monkeypatch):
    drawn = []

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == tmp_path / "curves"

        def add_scalar(self, name, number, step):
            drawn.append((name, step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    train.main(options(photos, tmp_path, "--epochs", "1", "--tensorboard", str(tmp_path / "curves")))
    assert {("loss", 1), ("lr", 2), ("images_per_second", 3), ("val/top1", 3)} <= set(drawn)


@pytest.mark.parametrize("name", ["digits", "textures"])
def test_shipped_images_are_a_data_set(name, tmp_path, monkeypatch):
    few = data.ImageSet(torch.randn(8, 1, 32, 32), torch.arange(8), torch.randn(4, 1, 32, 32), torch.arange(4))
    monkeypatch.setattr(data, f"load_{name}", lambda train, test: few)
    run = train.main([*SMALL, "--dataset", name, "--epochs", "1", "--output-dir", str(tmp_path)])
    assert (run.step, run.model.fc.out_features) == (2, 10)
    with pytest.raises(SystemExit):
        train.main(SMALL)  # no --data-path


def test_torchrun_trains_one_model_on_two_processes(photos, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    more = options(photos, tmp_path, "--epochs", "1", "--ema-decay", "0.5")
    run = subprocess.run([*command, *more], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("10 of 10 blocks fused") == 1  # only the first process prints
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["course"]["world_size"] == 2
    assert (tmp_path / "model.pth").exists()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted where Linux lists them")
def test_no_thread_of_the_process_group_outlives_the_run(photos, tmp_path):
    """A thread that still held a tensor while the interpreter ends would abort the process."""
    script = f"""
import runpy, sys
from pathlib import Path
import torch
sys.argv[1:] = {options(photos, tmp_path, "--epochs", "1")!r}
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
print("after:", [comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")])
"""
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = {
        **os.environ,
        **group,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{SCRIPT.parents[1]}{os.pathsep}{SCRIPT.parent}",
    }
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "10 of 10 blocks fused" in run.stdout
    assert "gloo" not in run.stdout.partition("after:")[2]
