"""Folded networks of single layers: what linear layers and normalisations take and refuse, long sums, options."""

import os

import pytest
import torch
from numerics import assert_as_exact
from torch import nn

import resfuse
from resfuse import ops
from resfuse.folding import engines

LAST = torch.channels_last
ENGINES = pytest.mark.parametrize(
    "engine", [name for name in engines.ENGINES if name == "reference" or (name == "tiles" and ops.tile_dtypes)]
)


def sequential(*layers):
    model = nn.Sequential(*layers).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def conv(channels=8, inputs=3):
    return nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()


@ENGINES
def test_a_linear_layer_of_maps_multiplies_their_last_axis(engine):
    x = torch.randn(2, 3, 4, 16)
    for tail in ([nn.Linear(16, 5)], [nn.AdaptiveAvgPool2d(1), nn.Linear(1, 5)], [nn.Linear(16, 5), nn.Linear(5, 4)]):
        model = sequential(*conv(), *tail)
        torch.testing.assert_close(resfuse.fold(model, backend=engine)(x), model(x), rtol=1e-5, atol=1e-5)


@ENGINES
@pytest.mark.parametrize(
    "tail", [(nn.Linear(8, 5),), (nn.Flatten(), nn.Linear(16, 5)), (nn.Flatten(), nn.Linear(4, 5))]
)
def test_a_linear_layer_that_does_not_fit_raises_as_stock(engine, tail):
    model = sequential(*conv(), nn.AdaptiveAvgPool2d(1), *tail)
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(RuntimeError):
        model(x)
    with pytest.raises(RuntimeError):
        resfuse.fold(model, backend=engine)(x)


@ENGINES
@pytest.mark.parametrize("shape", [(2, 7, 4, 4), (2, 1, 4, 4), (2, 8), (8, 4, 4)], ids=str)
@pytest.mark.parametrize("name", ["norm", "pool"])
def test_a_normalisation_of_the_input_checks_it(name, shape, engine):
    first = [nn.MaxPool2d(2), nn.BatchNorm2d(8)] if name == "pool" else [nn.BatchNorm2d(8), nn.ReLU()]
    model = sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    folded, right = resfuse.fold(model, backend=engine), torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(folded(right), model(right), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 8, H, W\), got"):
        folded(torch.randn(shape))


@ENGINES
def test_a_normalisation_of_flattened_values_raises_as_stock(engine):
    model = sequential(*conv(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm2d(8))
    with pytest.raises(ValueError):
        model(torch.randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"must be \(N, 8, H, W\), got \(2, 8\)"):
        resfuse.fold(model, backend=engine)(torch.randn(2, 3, 4, 4))


@pytest.mark.skipif(torch.float32 not in ops.tile_dtypes, reason="this processor has no tile kernels")
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "size"), [(2048, 64, 1, 7), (8192, 64, 1, 3), (1024, 32, 3, 4)], ids=str
)
def test_long_sums_are_as_exact_as_stocks(inputs, outputs, kernel, size):
    model = sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.BatchNorm2d(outputs), nn.ReLU())
    x = torch.randn(1, inputs, size, size).contiguous(memory_format=LAST)
    with torch.no_grad():
        found, stock, exact = resfuse.fold(model, backend="tiles")(x), model(x), model.double()(x.double())
    assert_as_exact(found, stock, exact)


def test_sequences_of_one_number_are_taken_as_torch_takes_them():
    model = sequential(nn.Conv2d(3, 8, 3, padding=(1,)), nn.MaxPool2d((2,)), nn.AvgPool2d(2, stride=(2,)))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(resfuse.fold(model)(x), model(x), rtol=1e-5, atol=1e-5)
    model = sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d([2, None]))
    torch.testing.assert_close(resfuse.fold(model)(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"example_input": "x"}, "example_input must be a tensor or None, got str"),
        ({"backend": ["tiles"]}, "backend must be a string or None"),
        ({"dtype": torch.float8_e4m3fn}, "dtype must be one of torch.float16"),
        ({"dtype": torch.int8}, "dtype must be one of torch.float16"),
    ],
    ids=["example_input", "backend", "float8", "int8"],
)
def test_arguments_of_the_wrong_type(options, message):
    with pytest.raises(TypeError, match=message):
        resfuse.fold(sequential(*conv()), **options)


def test_what_inference_mode_folded_gives_gradients():
    model = sequential(*conv())
    with torch.inference_mode():
        folded = resfuse.fold(model)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    folded(x).sum().backward()
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)


def test_files_of_linear_layers_of_maps(tmp_path):
    x = torch.randn(2, 3, 4, 16)
    for tail in ([nn.Linear(16, 5)], [nn.AdaptiveAvgPool2d(1), nn.Linear(1, 5)], [nn.Linear(16, 5), nn.Linear(5, 4)]):
        folded = resfuse.fold(sequential(*conv(), *tail))
        folded.save(tmp_path / "network.pt")
        assert torch.equal(resfuse.Folded.load(tmp_path / "network.pt")(x), folded(x))


def test_a_link_stays_a_link(tmp_path):
    folded, link = resfuse.fold(sequential(*conv())), tmp_path / "link.pt"
    (tmp_path / "there").mkdir()
    link.symlink_to(tmp_path / "there" / "network.pt")
    folded.save(link)
    assert link.is_symlink() and os.listdir(tmp_path / "there") == ["network.pt"]
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(resfuse.Folded.load(link)(x), folded(x))


def test_a_device_that_is_not_there_is_not_blamed_on_the_file(tmp_path):
    resfuse.fold(sequential(*conv())).save(tmp_path / "network.pt")
    with pytest.raises(RuntimeError, match="nope"):
        resfuse.Folded.load(tmp_path / "network.pt", device="nope")


def test_a_normalisation_is_traced():
    model = sequential(nn.BatchNorm2d(3), nn.ReLU(), *conv())
    x = torch.randn(2, 3, 4, 4)
    traced = torch.fx.symbolic_trace(resfuse.fold(model))
    torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-5)
