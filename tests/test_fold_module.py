"""The module that fold returns: copies, state_dicts, exports, compilation, threads, gradients, autocast."""

import copy
import pickle
import threading

import pytest
import torch
from folded import assert_same_classes, engines_for, photographs, settle, stock_and_exact
from networks import torchvision_models
from torch import nn

import resfuse
from resfuse.folding import engines
from resfuse.folding.plan import Convolution, Plan, ScaleShiftAct, Stock
from resfuse.models.cifar import CifarResNet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images():
    return photographs(4, 32)


@pytest.fixture(scope="module")
def model(images):
    torch.manual_seed(0)
    return settle(CifarResNet(14, shortcut="B"), images)


def test_a_network_without_folded_parts_changes_its_dtype(images):
    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x)

    folded = resfuse.fold(Unknown().eval()).to(torch.bfloat16)
    assert folded(images).dtype == folded.dtype == torch.bfloat16


def test_a_value_dies_with_its_last_reader_and_the_result_never(model):
    plan = resfuse.fold(model).plan
    dying = plan.dying()
    freed = [value for values in dying for value in values]
    assert sorted(freed) == sorted(step.output for step in plan.steps if step.output != plan.output)
    for index, values in enumerate(dying):
        later = {value for step in plan.steps[index + 1 :] for value in step.reads}
        assert later.isdisjoint(values)
    assert Plan(plan.steps, 0).dying()[0] == ()  # nor the input


def test_state_dict_round_trip_and_version(model, images):
    torch.manual_seed(1)
    folded, other = resfuse.fold(model), resfuse.fold(settle(CifarResNet(14, shortcut="B"), images))
    before = other(images)
    state = folded.state_dict()
    assert state._metadata[""]["version"] == 1 and "folded.layer1.0.conv1.bias" in state
    other.load_state_dict(state)
    assert torch.equal(other(images), folded(images)) and not torch.equal(other(images), before)
    state._metadata[""]["version"] = 7
    with pytest.raises(ValueError, match=r"reads version 1 of a folded network's state_dict, got 7"):
        other.load_state_dict(state)


@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
def test_copies_give_the_same_bits(model, images, called):
    folded = resfuse.fold(model, torch.bfloat16)
    if called:
        folded(images)
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert torch.equal(other(images), folded(images))
        assert not other.training and str(resfuse.explain(other)) == str(resfuse.explain(folded))


class Shifted(nn.Module):
    """Writes its input, as some do to save memory."""

    def forward(self, x):
        return x.sub_(0.5).div_(0.25)


@pytest.mark.parametrize("backend", engines_for(torch.float32))
def test_a_stock_part_that_writes_its_input_does_so_once_a_call(images, backend):
    network = settle(nn.Sequential(Shifted(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), images.clone())
    x = images.clone()
    folded = resfuse.fold(network, backend=backend)
    first = folded(images.clone())
    torch.testing.assert_close(first, network(images.clone()), atol=1e-5, rtol=1e-5)
    assert torch.equal(folded(images.clone()), first)
    resfuse.fold(network, backend=backend, example_input=x)
    assert torch.equal(x, images)


def test_a_network_with_stock_parts_is_pickled(images):
    folded = resfuse.fold(settle(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)), images))
    assert torch.equal(pickle.loads(pickle.dumps(folded))(images), folded(images))


def test_torch_save_writes_the_whole_module(model, images, tmp_path):
    folded = resfuse.fold(model, memory_format=torch.contiguous_format)
    torch.save(folded, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    assert torch.equal(loaded(images), folded(images))


@pytest.mark.parametrize("backend", engines_for(torch.float32))
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format, None], ids=str)
def test_the_result_has_the_layout_that_was_asked_for(layout, backend, images):
    network = settle(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 40, 3)), images)
    folded = resfuse.fold(network, memory_format=layout, backend=backend)
    compiled = torch.compile(folded, fullgraph=True, backend="eager")
    for run, x in ((folded, images), (folded, images.contiguous()), (compiled, images)):
        assert run(x).is_contiguous(memory_format=layout or torch.channels_last)
        torch.testing.assert_close(run(x), network(images).detach(), atol=1e-5, rtol=1e-5)


def test_a_state_dict_that_replaces_the_tensors_brings_its_dtype(model, images):
    folded, halved = resfuse.fold(model), resfuse.fold(model, torch.bfloat16)
    folded(images)
    state = {name: tensor.contiguous() for name, tensor in halved.state_dict().items()}  # in torch's layout, too
    folded.load_state_dict(state, assign=True)
    assert folded.dtype == torch.bfloat16 and torch.equal(folded(images), halved(images))


def test_moving_to_another_dtype_moves_the_network(model, images):
    folded = resfuse.fold(model)
    folded(images)
    halved = folded.to(torch.bfloat16)
    assert halved is folded and halved.dtype == torch.bfloat16 and halved(images).dtype == torch.bfloat16
    assert halved.folded.conv1.bias.dtype == torch.float32  # vectors are added to float32 sums
    torch.testing.assert_close(halved(images).float(), model(images), atol=0.1, rtol=0.1)


def test_it_cannot_be_trained(model):
    folded = resfuse.fold(model)
    with pytest.raises(RuntimeError, match="for inference only"):
        folded.train()
    assert folded.eval() is folded and folded.train(False) is folded
    assert not list(folded.parameters())


def test_gradients_to_the_input_are_the_models(model, images):
    ours, stock = images.clone().requires_grad_(), images.clone().requires_grad_()
    resfuse.fold(model)(ours).square().sum().backward()
    model(stock).square().sum().backward()
    length = stock.grad.norm()
    assert length > 0.1 and (ours.grad - stock.grad).norm() < 1e-4 * length


def test_transforms_and_autocast_leave_its_dtype(model, images):
    folded = resfuse.fold(model)
    plain = folded(images)
    compiled = torch.compile(folded, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(folded(images), plain)
        for run, x in ((folded, images.clone().requires_grad_()), (compiled, images)):  # plain torch operators
            torch.testing.assert_close(run(x).detach(), plain, atol=1e-5, rtol=1e-5)
    each = torch.func.vmap(lambda x: folded(x[None])[0])(images)
    torch.testing.assert_close(each, plain, atol=1e-4, rtol=1e-4)
    with pytest.raises(TypeError, match=r"floating point tensor, got torch.int64"):
        folded(torch.zeros(1, 3, 32, 32, dtype=torch.int64))


@pytest.mark.parametrize("backend", engines_for(torch.float32))
def test_images_that_are_smaller_than_a_window_raise_as_in_stock(backend):
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.MaxPool2d(3)).eval()
    folded, images = resfuse.fold(model, backend=backend), torch.randn(2, 3, 9, 9)
    for size in (1, 2, 4):  # of the convolution's kernel, and of the pool's
        with pytest.raises(RuntimeError):
            model(images[:, :, :size, :size])
        with pytest.raises(RuntimeError):
            folded(images[:, :, :size, :size])
    torch.testing.assert_close(folded(images), model(images).detach())


def test_torch_compile_takes_the_whole_graph(model, images):
    folded = resfuse.fold(model)
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), folded(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compiled(images[:2]), folded(images[:2]), atol=1e-5, rtol=1e-5)


def test_export_and_traces_compute_the_same(model, images):
    folded = resfuse.fold(model)
    plain = folded(images)
    exported = torch.export.export(folded, (images,), dynamic_shapes={"x": {0: torch.export.Dim("n", min=1, max=64)}})
    for run in (exported.module(), torch.jit.trace(folded, images), torch.fx.symbolic_trace(folded)):
        torch.testing.assert_close(run(images), plain, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(run(images[:2]), plain[:2], atol=1e-5, rtol=1e-5)
    assert not any(node.target is torch.ops.aten.batch_norm.default for node in exported.graph.nodes)


def test_onnx_runtime_classifies_photographs_as_the_model(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    photos = photographs(8, 64).contiguous()
    network = settle(torchvision_models().resnet18(num_classes=10), photos)
    path = tmp_path / "network.onnx"
    torch.onnx.export(resfuse.fold(network), (photos,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    out = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: photos.numpy()})[0])
    stock, exact = stock_and_exact(network, photos, torch.float32)
    assert (out - exact).norm() <= 1e-5 * exact.norm()
    assert_same_classes(out, stock, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_inputs_of_other_shapes_and_of_no_images(model, images, dtype):
    folded = resfuse.fold(model, dtype)
    for called in (False, True):
        for shape in ((3, 32, 32), (2, 4, 32, 32), (2, 3)):
            with pytest.raises(ValueError, match=rf"x must have shape \(N, 3, H, W\), got \({shape[0]}, {shape[1]}"):
                folded(torch.zeros(shape))
        assert folded(images[:0]).shape == (0, 10), called
        assert folded(images[:, :, :1, :7]).shape == (4, 10)


@pytest.mark.parametrize("backend", engines_for(torch.float32))
def test_threads_that_call_one_network_get_their_own_results(model, images, backend):
    folded = resfuse.fold(model, backend=backend)
    inputs = [images, images.flip(3), images[:2], images.flip(2)]
    expected = [resfuse.fold(model, backend=backend)(x) for x in inputs]
    start, wrong = threading.Barrier(len(inputs)), []

    def call(x, wanted):
        start.wait()  # the first call of all at once
        for _ in range(20):
            if not torch.allclose(folded(x), wanted, atol=1e-5, rtol=1e-5):
                wrong.append(x.shape)

    threads = [threading.Thread(target=call, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("backend", engines_for(torch.float32))
def test_a_convolution_that_adds_its_own_input_does_not_write_over_it(backend):
    steps = (
        Convolution(0, 1, weight="first", padding=(1, 1)),
        Convolution(1, 2, weight="second", padding=(1, 1), residual=1, activation="relu"),
    )
    weights = {name: torch.randn(8, 8, 3, 3) / 8 for name in ("first", "second")}
    x = torch.randn(2, 8, 12, 12).contiguous(memory_format=torch.channels_last)
    run, _ = engines.ENGINES[backend].prepare(Plan(steps, 2), weights, {}, x)
    y = nn.functional.conv2d(x, weights["first"], padding=1)
    wanted = torch.relu(nn.functional.conv2d(y, weights["second"], padding=1) + y)
    torch.testing.assert_close(run(x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", engines_for(torch.float32))
def test_what_a_stock_part_may_have_kept_is_not_written_over(backend):
    steps = (
        Convolution(0, 1, weight="w", padding=(1, 1)),
        Stock(1, 2, module="view"),
        Convolution(2, 3, weight="w", padding=(1, 1), residual=1),
        ScaleShiftAct(3, 4, residual=2),
    )
    x = torch.randn(2, 8, 12, 12).contiguous(memory_format=torch.channels_last)
    weights, modules = {"w": torch.randn(8, 8, 3, 3) / 8}, {"view": nn.Identity()}
    run, first = engines.ENGINES[backend].prepare(Plan(steps, 4), weights, modules, x)
    y = nn.functional.conv2d(x, weights["w"], padding=1)
    wanted = nn.functional.conv2d(y, weights["w"], padding=1) + y + y
    torch.testing.assert_close(first, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run(x), wanted, atol=1e-5, rtol=1e-5)


def test_a_result_is_the_callers_own(model, images):
    folded = resfuse.fold(model)
    first = folded(images)
    kept = first.clone()
    folded(images.flip(3))
    assert torch.equal(first, kept)


def test_the_engine_is_prepared_once_and_by_an_example(model, images, monkeypatch):
    chosen = engines.ENGINES[engines.choose(resfuse.fold(model).plan, images.device, torch.float32, None)]
    prepare, calls = chosen.prepare, []
    monkeypatch.setattr(chosen, "prepare", lambda *args: calls.append(args) or prepare(*args))
    folded = resfuse.fold(model, example_input=images)
    assert len(calls) == 1
    folded(images), folded(images[:1])
    assert len(calls) == 1
    folded.load_state_dict(folded.state_dict())
    folded(images)
    assert len(calls) == 2


def test_a_meta_network_folds_without_memory():
    with torch.device("meta"):
        model = CifarResNet(8).eval()
        folded = resfuse.fold(model)
        assert folded(torch.empty(2, 3, 32, 32)).shape == (2, 10)
