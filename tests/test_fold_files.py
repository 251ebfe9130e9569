"""The files of folded networks: what save writes and load reads, and what load refuses."""

import os

import pytest
import torch
from folded import photographs, settle
from torch import nn

import resfuse
from resfuse.folding import pages
from resfuse.folding.plan import plan_from_data
from resfuse.models.cifar import CifarResNet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images():
    return photographs(4, 32)


@pytest.fixture(scope="module")
def model(images):
    torch.manual_seed(0)
    return settle(CifarResNet(14, shortcut="B"), images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_save_and_load_give_the_same_bits(model, images, dtype, tmp_path):
    folded = resfuse.fold(model, dtype, backend="reference")
    folded.save(tmp_path / "network.pt")
    assert os.listdir(tmp_path) == ["network.pt"]
    loaded = resfuse.Folded.load(tmp_path / "network.pt")
    assert torch.equal(loaded(images), folded(images)) and loaded.dtype == dtype
    assert loaded.plan == folded.plan and str(resfuse.explain(loaded)) == str(resfuse.explain(folded))
    folded.save(tmp_path / "network.pt")  # over itself
    assert torch.equal(resfuse.Folded.load(tmp_path / "network.pt")(images), folded(images))


def test_the_numbers_of_an_activation_are_saved(images, tmp_path):
    network = settle(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.3), nn.Hardtanh(-1, 2)), images
    )
    folded = resfuse.fold(network)
    folded.save(tmp_path / "network.pt")
    loaded = resfuse.Folded.load(tmp_path / "network.pt")
    assert loaded.plan == folded.plan and [step.scalars for step in loaded.plan.steps] == [(0.3,), (-1.0, 2.0)]
    torch.testing.assert_close(loaded(images), network(images).detach(), atol=1e-5, rtol=1e-5)


def test_a_loaded_network_gives_its_files_pages_back_once_they_are_packed(model, images, tmp_path, monkeypatch):
    folded = resfuse.fold(model)
    folded.save(tmp_path / "network.pt")
    given, really = [], pages.give_back
    monkeypatch.setattr(pages, "give_back", lambda tensor: (given.append(tensor.data_ptr()), really(tensor)))
    loaded = resfuse.Folded.load(tmp_path / "network.pt")
    assert torch.equal(loaded(images), folded(images))
    convolutions = [name for name in dict(loaded.folded.named_buffers()) if "conv" in name and name.endswith("weight")]
    assert {loaded.folded.get_buffer(name).data_ptr() for name in convolutions} <= set(given)
    assert all(torch.equal(a, b) for a, b in zip(loaded.folded.buffers(), folded.folded.buffers(), strict=True))
    count = len(given)
    resfuse.fold(model)(images)
    assert len(given) == count  # nothing of a network that was not loaded


def test_a_failed_save_leaves_the_old_file(model, images, tmp_path, monkeypatch):
    path = tmp_path / "network.pt"
    resfuse.fold(model).save(path)
    before = path.read_bytes()

    def fail(data, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        resfuse.fold(model).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["network.pt"]


def test_load_refuses_other_files_and_versions(model, tmp_path, monkeypatch):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt holds no folded network"):
        resfuse.Folded.load(tmp_path / "other.pt")
    monkeypatch.setattr("resfuse.folding.module.VERSION", 2)
    resfuse.fold(model).save(tmp_path / "newer.pt")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"reads version 1 of a folded network, .*newer.pt has 2"):
        resfuse.Folded.load(tmp_path / "newer.pt")


def _without(data, *path):
    """The data without one entry of their nested dicts."""
    first, *rest = path
    if rest:
        return {**data, first: _without(data[first], *rest)}
    return {key: value for key, value in data.items() if key != first}


def _with(data, name, change):
    return {**data, "tensors": {**data["tensors"], name: change(data["tensors"][name])}}


def _with_step(data, index, **fields):
    steps = [{**step, **fields} if i == index else step for i, step in enumerate(data["plan"]["steps"])]
    return {**data, "plan": {**data["plan"], "steps": steps}}


DAMAGES = {
    "no plan": lambda data: _without(data, "plan"),
    "no output": lambda data: _without(data, "plan", "output"),
    "no tensor": lambda data: _without(data, "tensors", "layer1.0.conv1.weight"),
    "no bias": lambda data: _without(data, "tensors", "fc.bias"),
    "dtype": lambda data: {**data, "dtype": "float33"},
    "dtype of another kind": lambda data: {**data, "dtype": "nn"},
    "dtype of tensors": lambda data: {**data, "dtype": "bfloat16"},
    "layout": lambda data: {**data, "memory_format": "preserve_format"},
    "backend": lambda data: {**data, "backend": "magic"},
    "input channels": lambda data: _with(data, "layer1.0.conv1.weight", lambda weight: weight[:, :8]),
    "output channels": lambda data: _with(data, "layer1.0.conv1.weight", lambda weight: weight[:8]),
    "dimensions": lambda data: _with(data, "layer1.0.conv1.weight", lambda weight: weight.flatten(1)),
    "a classifier's width": lambda data: _with(data, "fc.weight", lambda weight: weight[:, :8]),
    "groups": lambda data: _with_step(data, 0, groups=5),
    "stock": lambda data: _with_step(data, -1 + len(data["plan"]["steps"]), kind="Stock"),
    "tensors": lambda data: {**data, "tensors": ["conv1.weight"]},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_load_refuses_data_that_do_not_fit(model, tmp_path, damage):
    path = tmp_path / "network.pt"
    resfuse.fold(model).save(path)
    torch.save(damage(torch.load(path)), path)
    with pytest.raises(ValueError, match=r"network.pt holds a damaged folded network: "):
        resfuse.Folded.load(path)


def test_load_refuses_data_without_a_version(model, tmp_path):
    path = tmp_path / "network.pt"
    resfuse.fold(model).save(path)
    torch.save(_without(torch.load(path), "version"), path)
    with pytest.raises(ValueError, match=r"reads version 1 of a folded network, .*network.pt has None"):
        resfuse.Folded.load(path)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"no zip"])
def test_load_names_a_file_that_it_cannot_read(model, tmp_path, damage):
    path = tmp_path / "network.pt"
    resfuse.fold(model).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"network.pt cannot be read as a folded network: "):
        resfuse.Folded.load(path)
    with pytest.raises(FileNotFoundError, match=r"absent.pt"):
        resfuse.Folded.load(tmp_path / "absent.pt")


def test_a_saved_file_has_the_permissions_of_any_new_file(model, tmp_path):
    (tmp_path / "other").touch()
    resfuse.fold(model).save(tmp_path / "network.pt")
    assert (tmp_path / "network.pt").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_save_refuses_what_is_code(tmp_path):
    folded = resfuse.fold(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softplus(), nn.GroupNorm(2, 4)).eval())
    with pytest.raises(ValueError, match=r"parts are not folded: 1, 2"):
        folded.save(tmp_path / "network.pt")
    assert os.listdir(tmp_path) == []


def test_a_plan_is_data_and_broken_data_are_refused(model):
    plan = resfuse.fold(model).plan
    data = plan.to_data()
    assert plan_from_data(data) == plan
    for broken, message in (
        ({"steps": [{**data["steps"][0], "kind": "Attention"}], "output": 1}, "no step of a plan"),
        ({"steps": [{**data["steps"][0], "colour": 1}], "output": 1}, "no step of a plan"),
        ({"steps": [{**data["steps"][0], "activation": "save"}], "output": 1}, "no activation of a plan"),
        ({"steps": [{**data["steps"][0], "activation": "hardtanh"}], "output": 1}, "no activation of a plan"),
        ({"steps": data["steps"][1:], "output": data["output"]}, "before it is written"),
        ({"steps": data["steps"], "output": 999}, "value 999, which no step writes"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_from_data(broken)
