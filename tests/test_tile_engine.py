"""The tile engine and its two operators: every kind of step, of odd sizes, against plain torch in float64."""

import contextlib
import math
import threading

import pytest
import torch
from numerics import FLOATS, assert_as_exact
from torch.library import opcheck

from resfuse import ops
from resfuse.folding import lowering
from resfuse.folding import plan as plans
from resfuse.folding.engines import reference, tiles
from resfuse.folding.plan import Plan
from resfuse.folding.program import StepKind

pytestmark = pytest.mark.skipif(not ops.tile_dtypes, reason="this processor has no tile kernels")


def tensors_of(plan):
    """Random tensors for the names of a plan, which say their sizes: w.KxCxkHxkW, b.K."""
    tensors = {}
    for step in plan.steps:
        for name in step.tensors:
            sizes = [int(size) for size in name.split(".")[1].split("x")]
            scale = 1 if len(sizes) == 1 else math.prod(sizes[1:]) ** -0.5
            tensors[name] = torch.randn(sizes) * scale
    return tensors


def in_dtype(tensors, dtype):
    """As `fold` gives them: vectors stay in float32 beside lower precision."""
    vector = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: t.to(vector if t.dim() == 1 else dtype) for name, t in tensors.items()}


def conv(index, input, output, k, c, kernel=3, relu=True, **options):
    """A convolution whose tensors' names say their sizes."""
    activation = "relu" if relu else "identity"
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    weight = f"w{index}.{k}x{c // options.get('groups', 1)}x{kernel[0]}x{kernel[1]}"
    return plans.Convolution(input, output, activation=activation, weight=weight, bias=f"b{index}.{k}", **options)


def check(steps, shape, dtype, *, runs=1):
    """A plan by tiles: as exact as plain torch in this dtype, in as many runs as are expected; what computed it."""
    if dtype not in ops.tile_dtypes:
        pytest.skip(f"needs tile kernels for {dtype}")
    plan = Plan(tuple(steps), steps[-1].output)
    tensors = tensors_of(plan)
    own = in_dtype(tensors, dtype)
    x = torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
    exact = reference.run(plan, in_dtype(own, torch.float64), {}, x.double())
    run, first = tiles.prepare(plan, own, {}, x)
    assert len(tiles._cut(tiles._split(plan))) == runs
    ours = run(x)
    assert_as_exact(ours, reference.run(plan, own, {}, x), exact)
    assert torch.equal(ours, run(x.contiguous())), "the layout of the input or a second call changes the result"
    assert torch.equal(ours, first)
    return plan, own, x, run


CONVOLUTIONS = {
    "pointwise": dict(k=48, c=40, kernel=1),
    "pointwise-strided": dict(k=33, c=64, kernel=1, stride=(2, 3)),
    "winograd": dict(k=64, c=48, padding=(1, 1)),
    "winograd-odd": dict(k=37, c=65, padding=(1, 1)),
    "winograd-parts": dict(k=304, c=34, padding=(1, 1)),  # weights are transformed in parts, the last not a whole one
    "3x3-strided": dict(k=40, c=24, stride=(2, 2), padding=(1, 1)),
    "dilated": dict(k=20, c=17, padding=(2, 3), dilation=(2, 3)),
    "no-padding": dict(k=16, c=16, kernel=(2, 3), stride=(1, 2)),
    "grouped": dict(k=64, c=32, padding=(1, 1), groups=8),
    "depthwise": dict(k=36, c=36, padding=(1, 1), groups=36),
    "narrow": dict(k=18, c=3, padding=(1, 1)),
    "narrow-7x7": dict(k=64, c=3, kernel=7, stride=(2, 2), padding=(3, 3)),
    "narrow-row": dict(k=18, c=3, kernel=(1, 3)),
    "narrow-column": dict(k=18, c=4, kernel=(3, 1)),
    "one-channel": dict(k=1, c=1, padding=(1, 1)),
}
SIZES = {"map": (3, 15, 17), "row": (1, 7, 31), "small": (2, 7, 7)}


@FLOATS
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("form", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution(form, size, dtype):
    images, height, width = size
    check([conv(0, 0, 1, **form)], (images, form["c"], height, width), dtype)


@FLOATS
@pytest.mark.parametrize("form", ["winograd", "grouped", "3x3-strided", "pointwise"])
def test_residual(form, dtype):
    """Added before the activation; written over where it dies, kept where it is read again."""
    options = CONVOLUTIONS[form]
    k, c = options["k"], options["c"]
    inner = {name: value for name, value in options.items() if name not in ("k", "c")}
    steps = [conv(0, 0, 1, k, c, **inner), conv(1, 0, 2, k, c, relu=False, **inner)]
    steps += [
        conv(2, 1, 3, k, k, 1, residual=2),
        conv(3, 3, 4, k, k, 1, residual=3),
        conv(4, 4, 5, k, k, 1, residual=1),
    ]
    check(steps, (2, c, 13, 11), dtype)


@FLOATS
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=["same", "strided"])
def test_projection_is_a_part_of_the_product(stride, dtype):
    steps = [
        conv(0, 0, 1, 32, 3, padding=(1, 1)),
        conv(1, 1, 2, 32, 32, padding=(1, 1), stride=stride),
        conv(2, 1, 3, 72, 32, 1, relu=False, stride=stride),
        conv(3, 2, 4, 72, 32, 1, residual=3),
    ]
    plan, own, x, _ = check(steps, (3, 3, 14, 10), dtype)
    draft = lowering._Draft(lowering.Lowering(plan.steps, (0,), (4,), own), [x.shape])
    assert [step.second >= 0 for step in draft.steps] == [False, False, False, True, False]


@FLOATS
@pytest.mark.parametrize("padding", [(0, 0), (1, 1)], ids=["bare", "padded"])
def test_stem_and_head(padding, dtype):
    """A convolution whose output only a pool reads, a pool by itself, the global average and a classifier."""
    steps = [
        conv(0, 0, 1, 64, 3, 7, stride=(2, 2), padding=(3, 3)),
        plans.MaxPool(1, 2, kernel_size=(3, 3), stride=(2, 2), padding=padding),
        conv(1, 2, 3, 40, 64, 1),
        plans.MaxPool(3, 4, kernel_size=(2, 2), stride=(1, 1)),
        plans.ScaleShiftAct(4, 5, activation="relu", residual=4, scale="s.40", shift="t.40"),
        plans.AdaptivePool(5, 6),
        plans.Flatten(6, 7),
        plans.Linear(7, 8, weight="w2.10x40", bias="b2.10"),
    ]
    plan, own, x, _ = check(steps, (3, 3, 57, 65), dtype)
    draft = lowering._Draft(lowering.Lowering(plan.steps, (0,), (8,), own), [x.shape])
    assert StepKind.CONVOLUTION_POOL in [step.kind for step in draft.steps]


@FLOATS
def test_a_classifier_in_two_parts(dtype):
    """The second begins with a matrix."""
    steps = [conv(0, 0, 1, 33, 8), plans.AdaptivePool(1, 2), plans.Flatten(2, 3)]
    steps += [plans.Linear(3, 4, weight="w1.20x33", bias="b1.20", activation="silu")]
    steps += [plans.Linear(4, 5, weight="w2.7x20", bias="b2.7", activation="relu")]
    check(steps, (3, 8, 9, 8), dtype, runs=3)


@FLOATS
def test_steps_in_plain_torch_between(dtype):
    """An activation that tiles do not know, behind its product, and a concatenation cut the plan; values pass on."""
    steps = [
        conv(0, 0, 1, 24, 5, padding=(1, 1)),
        plans.Convolution(1, 2, activation="silu", weight="w1.24x24x1x1", bias="b1.24"),
        plans.Concatenate(2, 3, others=(1,)),
        conv(2, 3, 4, 24, 48, 1, residual=1),
    ]
    plan, *_ = check(steps, (2, 5, 9, 8), dtype, runs=4)
    assert [len(run) for run in tiles._cut(tiles._split(plan))] == [2, 1, 1, 1]
    computed = tiles.computed_by(plan, dtype)
    name = computed[1]
    assert name == ("tiles" if ops.tile_operands[dtype] == dtype else "tiles in torch.float32")
    assert [computed[value] for value in (2, 3, 4)] == [f"{name}, silu by torch", "torch", name]


def random_steps(seed):
    """A network of residual blocks with random widths, strides and shortcuts."""
    random = torch.Generator().manual_seed(seed)

    def draw(*choices):
        return choices[torch.randint(len(choices), (), generator=random)]

    width = draw(16, 24, 33)
    steps, last = [conv(0, 0, 1, width, 3, draw(3, 7), padding=(1, 1))], 1
    for block in range(1, 5):
        out, stride, kernel = draw(width, width, 40, 64), draw(1, 1, 2), draw(1, 3)
        projected = out != width or stride != 1 or draw(True, False)
        value, pad = steps[-1].output + 1, kernel // 2
        steps.append(conv(f"{block}a", last, value, 32, width, 3, padding=(1, 1), stride=(stride, stride)))
        if projected:
            steps.append(conv(f"{block}p", last, value + 1, out, width, 1, relu=False, stride=(stride, stride)))
        residual = value + 1 if projected else last
        options = dict(padding=(pad, pad), residual=residual, relu=draw(True, False))
        steps.append(conv(f"{block}b", value, value + 2, out, 32, kernel, **options))
        last, width = value + 2, out
    return steps


@FLOATS
@pytest.mark.parametrize("chunk", [1, 1 << 14, 1 << 30], ids=["image", "some", "batch"])
@pytest.mark.parametrize("seed", range(6))
def test_random_networks(seed, chunk, dtype, monkeypatch):
    monkeypatch.setattr(lowering, "_CHUNK_BYTES", chunk)
    check(random_steps(seed), (5, 3, 22, 18), dtype)


@FLOATS
def test_threads(dtype, threads):
    """The number of threads changes no bit, and callers at once do not meet, whatever shapes they bring."""
    _, _, x, run = check(random_steps(1), (5, 3, 22, 18), dtype)
    inputs = [x, x[:1], x[:3, :, :17], x.flip(0).contiguous(memory_format=torch.channels_last)]
    threads(1)
    expected = [run(x) for x in inputs]
    threads(2)
    assert all(torch.equal(run(x), want) for x, want in zip(inputs, expected, strict=True))
    wrong = []

    def call(first):
        for i in range(20):
            index = (first + i) % len(inputs)
            if not torch.equal(run(inputs[index]), expected[index]):
                wrong.append(index)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@FLOATS
def test_nan_stays_where_it_is_seen(dtype):
    """relu and a pool keep NaN; an image does not see its neighbour's."""
    steps = [
        conv(0, 0, 1, 32, 32, padding=(1, 1)),
        plans.MaxPool(1, 2, kernel_size=(2, 2), stride=(2, 2)),
        conv(1, 2, 3, 8, 32, 1),
    ]
    _, _, x, run = check(steps, (3, 32, 10, 10), dtype)
    clean = run(x)
    x[1, 3, 9, 9] = float("nan")
    out = run(x)
    assert out[1, :, 4, 4].isnan().all() and out[1, :, 0, 0].isfinite().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


TOO_SMALL = {
    "convolution": [conv(0, 0, 1, 18, 16)],
    "convolution-and-pool": [
        conv(0, 0, 1, 18, 16),
        plans.MaxPool(1, 2, kernel_size=(2, 2), stride=(2, 2), padding=(1, 1)),
    ],
    "sum": [
        conv(0, 0, 1, 32, 16, padding=(1, 1)),
        conv(1, 1, 2, 32, 32),
        conv(2, 1, 3, 40, 32, 1, relu=False),
        conv(3, 2, 4, 40, 32, 1, residual=3),
    ],
}


@FLOATS
@pytest.mark.parametrize("steps", TOO_SMALL.values(), ids=TOO_SMALL)
@pytest.mark.parametrize("size", [2, 4])
def test_sizes_that_do_not_fit_raise_as_in_stock(steps, size, dtype):
    """Kernels larger than their input, and sums of unlike sizes."""
    if dtype not in ops.tile_dtypes:
        pytest.skip(f"needs tile kernels for {dtype}")
    plan = Plan(tuple(steps), steps[-1].output)
    own = in_dtype(tensors_of(plan), dtype)
    fails = size == 2 or any(getattr(step, "residual", None) is not None for step in steps)
    x = torch.randn(1, 16, size, size).to(dtype)
    for run in (lambda: reference.run(plan, own, {}, x), lambda: tiles.prepare(plan, own, {}, x)[1]):
        with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
            run()


def program(dtype=torch.float32):
    own = in_dtype({"w0.8x4x3x3": torch.randn(8, 4, 3, 3), "b0.8": torch.randn(8)}, dtype)
    x = torch.randn(2, 4, 6, 6).to(dtype)
    return [x], *lowering.Lowering([conv(0, 0, 1, 8, 4, padding=(1, 1))], (0,), (1,), own).lower([x.shape])


@FLOATS
def test_opcheck(dtype):
    if dtype not in ops.tile_operands.values():
        pytest.skip(f"this processor does not multiply {dtype}")
    opcheck(ops.run_plan, tuple(program(dtype)))
    for groups, shape in ((1, (40, 5, 3, 3)), (4, (64, 4, 1, 1)), (36, (36, 1, 3, 3)), (3, (51, 7, 1, 2))):
        opcheck(ops.pack_weight, (torch.randn(shape).to(dtype), groups))


def test_what_the_processor_does_not_multiply_is_refused():
    dtype = torch.bfloat16
    if dtype in ops.tile_operands.values():
        pytest.skip(f"this processor multiplies {dtype}")
    inputs, *rest = program()
    with pytest.raises(RuntimeError, match="does not multiply"):
        ops.run_plan([x.to(dtype) for x in inputs], *rest)
    with pytest.raises(RuntimeError, match="does not multiply"):
        ops.pack_weight(torch.randn(8, 4, 3, 3).to(dtype), 1)


def test_kernels_refuse_what_they_cannot_read():
    inputs, constants, data, sizes = program()
    for bad in ([inputs[0][:1]], [inputs[0].double()], [inputs[0][:, :3]], []):
        with pytest.raises(RuntimeError, match="resfuse"):
            ops.run_plan(bad, constants, data, sizes)
    with pytest.raises(RuntimeError, match="constant"):
        ops.run_plan(inputs, [c[:-1] for c in constants], data, sizes)
    with pytest.raises(RuntimeError, match="sizes"):
        ops.run_plan(inputs, constants, data, [*sizes[:-1], 7])
    with pytest.raises(RuntimeError, match=r"vectors of 4 channels .* fold the network here"):
        ops.run_plan(inputs, constants, [4, *data[1:]], sizes)
    for length in (0, 5, len(data) - 1):
        with pytest.raises(RuntimeError, match="resfuse"):
            ops.run_plan(inputs, constants, data[:length], sizes)


@pytest.mark.parametrize("wrong", [-1, 0, 10**6, 2**62])
def test_no_number_of_a_program_leads_out_of_the_arena(wrong):
    """Every number replaced in turn: the call is refused, or it computes something else of the same size."""
    inputs, constants, data, sizes = program()
    refused = 0
    for i in range(len(data)):
        try:
            ops.run_plan(inputs, constants, [*data[:i], wrong, *data[i + 1 :]], sizes)
        except (RuntimeError, IndexError, MemoryError):
            refused += 1
    assert refused > len(data) // 4, "most of the others are read by no step of this program"
