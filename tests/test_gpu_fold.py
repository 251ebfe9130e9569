"""Folded networks on a GPU: the CUDA engine against float64, its graphs, and each of its kernels."""

import threading

import pytest
import torch
from folded import settle
from numerics import FLOOR

import resfuse
from resfuse.folding.engines import cuda
from resfuse.folding.plan import Convolution
from resfuse.models.cifar import CifarResNet

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_gpu")]
HALVES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def _network(images):
    return settle(CifarResNet(14, shortcut="B", widths=(32, 64, 128)), images)


@HALVES
def test_a_folded_network_is_as_exact_as_stock(dtype):
    images = torch.randn(4, 3, 32, 32)
    model = _network(images)
    exact = resfuse.fold(model.double(), backend="reference")(images.double())
    folded = resfuse.fold(model.float(), dtype, backend="cuda")
    stock = model.to(dtype, memory_format=torch.channels_last)(images.to(dtype))
    error, allowed = ((y.double() - exact).norm() / exact.norm() for y in (folded(images), stock))
    assert error <= 2 * allowed + FLOOR[dtype]


def test_graphs_of_several_shapes_and_results_that_stay():
    images = torch.randn(4, 3, 32, 32)
    folded = resfuse.fold(_network(images), backend="cuda")
    plain = resfuse.fold(_network(images), backend="reference")
    plain.load_state_dict(folded.state_dict())
    kept = []
    for x in (images, images[:1], images.flip(3), images[:1].flip(3), images):
        kept.append((folded(x), plain(x)))
    for out, wanted in kept:
        torch.testing.assert_close(out, wanted, atol=1e-3, rtol=1e-3)


def test_threads_on_streams_of_their_own():
    images = torch.randn(4, 3, 32, 32)
    folded = resfuse.fold(_network(images), backend="cuda", example_input=images)
    inputs = [images, images.flip(3), images.flip(2)]
    expected = [folded(x) for x in inputs]
    wrong = []

    def call(x, wanted):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            for _ in range(50):
                if not torch.equal(folded(x), wanted):
                    wrong.append(x.shape)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=call, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@HALVES
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_every_candidate_computes_the_convolution(kernel, residual, dtype):
    step = Convolution(0, 1, weight="w", bias="b", padding=(kernel // 2,) * 2, activation="relu",
                       residual=2 if residual else None)  # fmt: skip
    x = torch.randn(2, 32, 14, 14).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(64, 32, kernel, kernel) / 30).to(dtype).contiguous(memory_format=torch.channels_last)
    inputs = [x] + [torch.randn(2, 64, 14, 14).to(dtype).contiguous(memory_format=torch.channels_last)] * residual
    found = cuda.candidates(step, {"w": weight, "b": torch.randn(64)})
    assert {"plain", "pass", "cudnn"} <= found.keys()
    wanted = found["plain"](*inputs)
    for name, run in found.items():
        torch.testing.assert_close(run(*inputs), wanted, atol=0.05, rtol=0.02, msg=lambda m, n=name: f"{n}: {m}")
