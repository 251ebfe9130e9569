"""What the public functions and modules refuse: the error's type, its words, and that nothing has been changed."""

import pytest
import torch
import torch.nn.functional as F
from numerics import batch_norm, image
from torch import nn

from resfuse import Conv2dParameters, functional, ops
from resfuse.nn import AddReLU, BNAct2d, ConvBNAct2d

SHAPE = (2, 6, 4, 4)
UNITS = (
    "add_relu", "moments", "finalize", "scale_shift_act", "bn_act", "conv_bn_act", "basic_block", "bottleneck",
    "bn_relu_maxpool", "conv_bn_relu_maxpool", "preact_block",
)  # fmt: skip
NORMS = {  # with the residual's own, or the shortcut's
    "bn_act": 2, "conv_bn_act": 2, "basic_block": 3, "bottleneck": 4, "bn_relu_maxpool": 1, "conv_bn_relu_maxpool": 1,
    "preact_block": 2,
}  # fmt: skip


def conv(out=6, into=6, size=3, **options):
    return Conv2dParameters(torch.randn(out, into, size, size), **{"padding": size // 2, **options})


def arguments(unit):
    """Valid arguments by name, every optional one given."""
    x, vectors = image(SHAPE), torch.rand(4, 6) + 0.5
    if unit == "add_relu":
        return {"x": x, "residual": image(SHAPE)}
    if unit == "moments":
        return {"x": x}
    if unit == "finalize":
        bn = batch_norm(6)._asdict()
        del bn["training"]
        return {"mean": vectors[0], "var": vectors[1], **bn, "count": 32}
    if unit == "scale_shift_act":
        names = ("scale", "shift", "residual_scale", "residual_shift")
        return {"x": x, "residual": image(SHAPE), **dict(zip(names, vectors, strict=True))}
    if unit in POOLS.split():
        first = {"x": x, "conv": conv()} if unit == "conv_bn_relu_maxpool" else {"x": x}
        return {**first, "bn": batch_norm(6), "kernel_size": 3, "stride": (2, 1), "padding": 1}
    if unit in ("bn_act", "conv_bn_act"):
        first = {"x": x, "conv": conv()} if unit == "conv_bn_act" else {"x": x}
        return {**first, "bn": batch_norm(6), "residual": image(SHAPE), "residual_bn": batch_norm(6)}
    if unit == "preact_block":
        return {"x": x, "layers": ((batch_norm(6), conv()), (batch_norm(6), conv())), "shortcut": conv(size=1)}
    layers = {}
    for i in range(1, NORMS[unit]):
        layers |= {f"conv{i}": conv(), f"bn{i}": batch_norm(6)}
    return {"x": x, **layers, "shortcut": (conv(size=1), batch_norm(6))}


def tensors_of(value):
    """Every tensor within an argument."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, dict)):
        return [t for part in (value.values() if isinstance(value, dict) else value) for t in tensors_of(part)]
    return []


def assert_refused(call, args, error, message):
    """call(**args) raises, and no tensor that it was given has been written."""
    given = [t for t in tensors_of(args) if not t.is_meta and t.layout == torch.strided]
    before = [(t.clone(), t._version) for t in given]
    with pytest.raises(error, match=message):
        call(**args)
    for tensor, (values, version) in zip(given, before, strict=True):
        assert torch.equal(tensor, values) and tensor._version == version


def changed(args, path, change):
    """args with the value at a path such as "bn1.eps" replaced by change(value)."""
    name, *fields = path.split(".")
    value = args[name]
    if not fields:
        return {**args, name: change(value)}
    if fields[0].isdigit():
        parts = list(value)
        parts[int(fields[0])] = changed({"": parts[int(fields[0])]}, ".".join(["", *fields[1:]]), change)[""]
        return {**args, name: tuple(parts)}
    return {**args, name: value._replace(**{fields[0]: change(getattr(value, fields[0]))})}


def to(value):
    return lambda _: value


def meta(t):
    return t.to("meta")


def refused(units, path, change, error, message, label):
    units = UNITS if units == "all" else units.split()
    return [pytest.param(unit, path, change, error, message, id=f"{unit}-{path}-{label}") for unit in units]


VALUE, TYPE, RUNTIME = ValueError, TypeError, RuntimeError
ADDING = "add_relu scale_shift_act bn_act conv_bn_act"
IMAGES = "moments scale_shift_act bn_act conv_bn_act basic_block bottleneck"
BLOCKS = "basic_block bottleneck"
POOLS = "bn_relu_maxpool conv_bn_relu_maxpool"
ONE = "running_mean must have shape \\(6,\\), one value per channel, got \\(5,\\)"


def five(t):
    return t[:5].clone()


def norm_cases(units, path, prefix):
    """What is refused of a normalisation at `path`, whose fields messages call `prefix`field."""
    return [
        *refused(units, f"{path}.running_mean", five, RUNTIME, prefix + ONE, "channels"),
        *refused(units, f"{path}.weight", five, RUNTIME, rf"{prefix}weight must have shape \(6,\)", "channels"),
        *refused(units, f"{path}.bias", meta, VALUE, f"{prefix}bias must be on x's device cpu, got meta", "device"),
        *refused(units, f"{path}.running_var", torch.Tensor.int, TYPE, f"{prefix}running_var must be float16", "int"),
        *refused(units, f"{path}.running_var", to(None), VALUE, f"{prefix}running_var must be given tog", "missing"),
        *refused(units, f"{path}.weight", torch.Tensor.to_sparse, TYPE, f"{prefix}weight must be a dense", "sparse"),
        *refused(units, f"{path}.eps", to(0.0), VALUE, f"{prefix}eps must be positive, got 0.0", "zero"),
        *refused(units, f"{path}.eps", to(-1e-5), VALUE, f"{prefix}eps must be positive, got -1e-05", "negative"),
        *refused(units, f"{path}.eps", to(float("nan")), VALUE, f"{prefix}eps must be positive, got nan", "nan"),
        *refused(units, f"{path}.momentum", to(1.5), VALUE, f"{prefix}momentum must be None or in .* 1.5", "above"),
        *refused(units, f"{path}.momentum", to(-0.1), VALUE, f"{prefix}momentum must be None .* -0.1", "below"),
        *refused(
            units, f"{path}.num_batches_tracked", torch.Tensor.float, TYPE,
            f"{prefix}num_batches_tracked must be one int64 on cpu, got 1 of torch.float32", "float",
        ),
    ]  # fmt: skip


def conv_cases(units, path, prefix):
    """What is refused of a convolution at `path`."""
    return [
        *refused(units, f"{path}.weight", lambda w: w[:, :5], RUNTIME, f"{prefix}weight of .* 5 channels", "channels"),
        *refused(units, f"{path}.weight", lambda w: w[0], VALUE, f"{prefix}weight must be 4D, got 3D", "rank"),
        *refused(units, f"{path}.weight", meta, VALUE, f"{prefix}weight must be on x's device cpu, got meta", "device"),
        *refused(units, f"{path}.weight", torch.Tensor.double, TYPE, f"{prefix}weight must have x's dtype", "dtype"),
        *refused(units, f"{path}.bias", to(torch.zeros(5)), RUNTIME, rf"{prefix}bias must have shape \(6,\)", "bias"),
        *refused(units, f"{path}.groups", to(2), RUNTIME, f"{prefix}weight of shape .* with groups=2 must", "groups"),
        *refused(units, f"{path}.weight", to(torch.zeros(6, 6, 9, 9)), RUNTIME, f"{prefix}weight .* must fit", "large"),
        *refused(units, f"{path}.weight", lambda w: w[:0], RUNTIME, f"{prefix}weight must have outputs", "empty"),
        *refused(units, f"{path}.weight", lambda w: w[..., :0], RUNTIME, f"{prefix}weight must have outputs", "flat"),
        *refused(units, f"{path}.bias", to(torch.zeros(6).int()), TYPE, f"{prefix}bias must have x's dtype", "int"),
        *refused(units, f"{path}.stride", to(0), RUNTIME, f"{prefix}stride must be .* at least 1, got 0", "zero"),
        *refused(units, f"{path}.stride", to((1, 1, 1)), RUNTIME, f"{prefix}stride must be one int or two", "triple"),
        *refused(units, f"{path}.stride", to(1.0), TYPE, f"{prefix}stride must be an int or a pair", "float"),
        *refused(units, f"{path}.dilation", to((1, 0)), RUNTIME, f"{prefix}dilation must be .* at least 1", "zero"),
        *refused(units, f"{path}.padding", to(-1), RUNTIME, f"{prefix}padding must be .* at least 0, got -1", "below"),
        *refused(units, f"{path}.padding", to("most"), RUNTIME, f"{prefix}padding must be .* got 'most'", "name"),
        *refused(
            units, path, lambda conv: conv._replace(padding="same", stride=(1, 2)), RUNTIME,
            rf"{prefix}stride must be 1 with padding='same', got \(1, 2\)", "uneven",
        ),
    ]  # fmt: skip


CASES = [
    *refused("add_relu " + IMAGES, "x", torch.Tensor.int, TYPE, "x must be float16, .* got torch.int32", "int"),
    *refused("add_relu " + IMAGES, "x", to([1.0]), TYPE, "x must be a Tensor, got list", "list"),
    *refused("add_relu " + IMAGES, "x", torch.Tensor.to_sparse, TYPE, "x must be a dense .strided. tensor", "sparse"),
    *refused(IMAGES, "x", lambda x: x[0], VALUE, r"x must be 4D, got 3D input of shape \(6, 4, 4\)", "rank"),
    *refused("scale_shift_act bn_act", "x", lambda x: x[:, :5], RUNTIME, r"must have shape \(5,\)", "channels"),
    *refused("conv_bn_act", "x", lambda x: x[:, :5], RUNTIME, r"6 channels, got .* \(2, 5, 4, 4\)", "channels"),
    *refused(BLOCKS, "x", lambda x: x[:, :5], RUNTIME, r"conv1.weight .* 6 channels, got .*\(2, 5, 4, 4\)", "channels"),
    *refused("scale_shift_act bn_act conv_bn_act basic_block", "activation", to("gelu"), VALUE, "got 'gelu'", "name"),
    *refused(POOLS, "x", torch.Tensor.int, TYPE, "x must be float16, .* got torch.int32", "int"),
    *refused(POOLS, "x", lambda x: x[0], VALUE, r"x must be 4D, got 3D input of shape \(6, 4, 4\)", "rank"),
    *refused("bn_relu_maxpool", "x", lambda x: x[:, :5], RUNTIME, r"must have shape \(5,\)", "channels"),
    *refused("conv_bn_relu_maxpool", "x", lambda x: x[:, :5], RUNTIME, r"6 channels, got .*\(2, 5, 4, 4\)", "channels"),
    *refused(POOLS, "kernel_size", to(0), VALUE, "kernel_size must be at least 1, got 0", "zero"),
    *refused(POOLS, "kernel_size", to(3.0), TYPE, "kernel_size must be an int or a pair of ints, got 3.0", "float"),
    *refused(POOLS, "kernel_size", to((3, 3, 3)), TYPE, "kernel_size must be an int or a pair of ints", "triple"),
    *refused(POOLS, "kernel_size", to((17, 16)), VALUE, "must have at most 256 positions, got 17x16", "large"),
    *refused(POOLS, "kernel_size", to(7), RUNTIME, r"kernel_size \(7, 7\) must fit into the .* \(2, 6, 4, 4\)", "fit"),
    *refused(POOLS, "stride", to((1, 0)), VALUE, r"stride must be at least 1, got \(1, 0\)", "zero"),
    *refused(POOLS, "stride", to(True), TYPE, "stride must be an int or a pair of ints, got True", "bool"),
    *refused(POOLS, "padding", to(-1), VALUE, "padding must be at least 0, got -1", "negative"),
    *refused(POOLS, "padding", to(2), VALUE, r"padding must be at most half of kernel_size \(3, 3\)", "large"),
    *refused("all", "backend", to("cuda"), VALUE, "backend must be one of native, triton, reference or", "unknown"),
    *refused("all", "backend", to("triton"), RUNTIME, "'triton' does not serve .* on cpu: Triton compiles", "triton"),
    *refused(ADDING, "residual", lambda r: r[..., :3], VALUE,
             r"residual must have x's shape \(2, 6, 4, 4\), got \(2, 6, 4, 3\)", "shape"),
    *refused(ADDING, "residual", torch.Tensor.double, TYPE,
             "residual must have x's dtype torch.float32, got torch.float64", "dtype"),
    *refused(ADDING, "residual", meta, VALUE,
             "residual must be on x's device cpu, got meta", "device"),
    *refused("bn_act conv_bn_act", "residual", to(None), VALUE, "residual must be given with residual_bn", "missing"),
    *refused("scale_shift_act", "residual", to(None), VALUE, "must be given together, and with a res", "missing"),
    *refused("scale_shift_act", "residual_shift", to(None), VALUE, "must be given together", "missing"),
    *refused("scale_shift_act", "scale", five, RUNTIME, r"scale must have shape \(6,\)", "channels"),
    *refused("scale_shift_act", "shift", meta, VALUE, "shift must be on x's device cpu, got meta", "device"),
    *refused("scale_shift_act", "residual_scale", torch.Tensor.double, TYPE, "residual_scale must be torch.float32",
             "dtype"),
    *refused("finalize", "count", to(-3), VALUE, "count must be 0, or more than 1 .* got -3", "negative"),
    *refused("finalize", "count", to(1), VALUE, "count must be 0, or more than 1 with running .* got 1", "one"),
    *refused("finalize", "mean", lambda m: m[None], VALUE, "mean must be 1D, got 2D", "rank"),
    *refused("finalize", "mean", torch.Tensor.half, TYPE, "mean and var must both be float32 or float64", "dtype"),
    *refused("finalize", "var", five, RUNTIME, r"var must have shape \(6,\)", "channels"),
    *refused("finalize", "var", torch.Tensor.double, TYPE, "mean and var must both be", "dtype"),
    *refused("finalize", "weight", five, RUNTIME, r"weight must have shape \(6,\)", "channels"),
    *refused("finalize", "running_var", meta, VALUE, "running_var must be on x's device cpu, got meta", "device"),
    *refused("finalize", "eps", to(0.0), VALUE, "eps must be positive, got 0.0", "zero"),
    *refused("finalize", "momentum", to(2.0), VALUE, r"momentum must be None or in \[0, 1\], got 2.0", "above"),
    *refused("finalize", "num_batches_tracked", torch.Tensor.float, TYPE, "num_batches_tracked must be one", "float"),
    *norm_cases("bn_act conv_bn_act", "bn", ""),
    *norm_cases(POOLS, "bn", ""),
    *norm_cases("bn_act conv_bn_act", "residual_bn", "residual "),
    *norm_cases("basic_block", "bn2", "bn2."),
    *norm_cases("bottleneck", "bn3", "bn3."),
    *norm_cases(BLOCKS, "shortcut.1", "shortcut bn."),
    *conv_cases("conv_bn_act conv_bn_relu_maxpool", "conv", "conv."),
    *conv_cases("basic_block", "conv2", "conv2."),
    *conv_cases("bottleneck", "conv3", "conv3."),
    *conv_cases(BLOCKS, "shortcut.0", "shortcut conv."),
    *norm_cases("preact_block", "layers.1.0", "bn2."),
    *conv_cases("preact_block", "layers.1.1", "conv2."),
    *conv_cases("preact_block", "shortcut", "shortcut conv."),
    *refused(BLOCKS, "shortcut.0.stride", to(2), VALUE,
             r"shortcut must have the residual branch's shape \(2, 6, 4, 4\), got \(2, 6, 2, 2\)", "shape"),
    *refused(BLOCKS, "shortcut", to(torch.randn(2, 6, 4, 3)), VALUE, "shortcut must have x's shape", "tensor"),
    *refused(BLOCKS, "conv1.stride", to(2), VALUE, "shortcut must have the residual branch's shape", "strided"),
]  # fmt: skip


@pytest.mark.parametrize(("unit", "path", "change", "error", "message"), CASES)
def test_refused(unit, path, change, error, message):
    args = {"activation": "relu", **arguments(unit)} if path == "activation" else arguments(unit)
    args = changed({"backend": None, **args}, path, change)
    assert_refused(getattr(functional, unit), args, error, message)


@pytest.mark.parametrize("unit", UNITS)
def test_what_the_cases_start_from_is_accepted(unit):
    args = arguments(unit)
    getattr(functional, unit)(**args)
    for value in args.values():
        for bn in [value, *value] if isinstance(value, tuple) else [value]:
            if getattr(bn, "num_batches_tracked", None) is not None:
                assert bn.num_batches_tracked == 4


@pytest.mark.parametrize("unit", UNITS)
def test_a_named_backend_that_is_not_built_raises_with_the_reason(unit, monkeypatch):
    monkeypatch.setitem(ops.missing_native, "cpu", "it was not built")
    message = "backend='native' does not serve .* on cpu: it was not built"
    assert_refused(getattr(functional, unit), {**arguments(unit), "backend": "native"}, RuntimeError, message)
    getattr(functional, unit)(**arguments(unit))


@pytest.mark.parametrize("unit", ["add_relu", "bn_act", "basic_block"])
def test_a_device_without_a_native_library(unit):
    args = arguments(unit)

    def moved(value):
        if isinstance(value, torch.Tensor):
            return meta(value)
        return type(value)(*map(moved, value)) if hasattr(value, "_fields") else value

    args = {name: moved(value) for name, value in args.items() if name != "shortcut"}
    message = "backend='native' does not serve .* on meta: there is no native library for meta"
    assert_refused(getattr(functional, unit), {**args, "backend": "native"}, RuntimeError, message)
    assert getattr(functional, unit)(**args).is_meta


@pytest.mark.parametrize("unit", NORMS)
def test_one_value_per_channel_in_training(unit):
    args = arguments(unit)
    args["x"] = torch.randn(1, 6, 1, 1)
    if "residual" in args:
        args["residual"] = torch.randn(1, 6, 1, 1)
    message = r"Expected more than 1 value per channel when training, got input size (torch.Size\()?[(\[]1, 6, 1, 1"
    assert_refused(getattr(functional, unit), args, ValueError, message)
    with pytest.raises(ValueError, match=message):
        nn.BatchNorm2d(6)(torch.randn(1, 6, 1, 1))


@pytest.mark.parametrize("unit", ["basic_block", "bottleneck"])
def test_one_value_per_channel_in_the_last_layer_only(unit):
    last = NORMS[unit] - 1
    args = arguments(unit) | {"x": torch.randn(1, 6, 4, 4), "shortcut": torch.randn(1, 6, 1, 1)}
    args[f"conv{last}"] = conv(size=4, padding=0)
    assert_refused(getattr(functional, unit), args, ValueError, "Expected more than 1 value per channel")


@pytest.mark.parametrize(
    "options",
    [
        {"stride": -1}, {"stride": 1.0}, {"stride": ()}, {"dilation": 0}, {"dilation": True}, {"padding": (-1, 0)},
        {"padding": (1, 1, 1)}, {"padding": "most"}, {"padding": "same", "stride": 2}, {"groups": 0}, {"groups": -1},
    ],
    ids=str,
)  # fmt: skip
def test_a_convolution_that_torch_refuses_raises_torchs_type(options):
    refusal = conv(**options)
    with pytest.raises((RuntimeError, TypeError)) as stock:
        F.conv2d(image(SHAPE), *refusal)
    layers = ((conv(), batch_norm(6)), (refusal, batch_norm(6)))
    assert_refused(functional.conv_bn_act_chain, {"x": image(SHAPE), "layers": layers}, stock.type, "conv2")


@pytest.mark.parametrize("field", ["weight", "bias"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_autocast_leaves_float64_alone(dtypes, field):
    """Beside one float64 operand and one of another dtype stock's convolution fails; with both it runs in float64."""
    x, bias = image(SHAPE, dtypes[0]), torch.zeros(6, dtype=dtypes[0])
    own, norms = conv(bias=bias), (batch_norm(6), batch_norm(6))
    own = own._replace(weight=own.weight.to(dtypes[0]))
    mixed = own._replace(**{field: getattr(own, field).to(dtypes[1])})
    args = {"x": x, "layers": ((own, norms[0]), (mixed, norms[1]))}
    with torch.autocast("cpu", torch.bfloat16):
        assert_refused(functional.conv_bn_act_chain, args, TypeError, f"conv2.{field} must have x's dtype")
        wide = own._replace(weight=own.weight.double(), bias=bias.double())
        assert functional.conv_bn_act(image(SHAPE, torch.float64), wide, norms[0]).dtype == torch.float64


@pytest.mark.parametrize("unit", NORMS)
def test_eval_needs_running_statistics(unit):
    args = arguments(unit)
    path = "bn" if "bn" in args else "layers.1.0" if "layers" in args else f"bn{NORMS[unit] - 1}"
    frozen = {"training": False, "running_mean": None, "running_var": None}
    args = changed(args, path, lambda bn: bn._replace(**frozen))
    assert_refused(getattr(functional, unit), args, ValueError, "running_var must be given when training is False")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BNAct2d(6, eps=0.0), "eps must be positive, got 0.0"),
        (lambda: BNAct2d(6, momentum=1.5), r"momentum must be None or in \[0, 1\], got 1.5"),
        (lambda: BNAct2d(6, activation="gelu"), "activation must be one of relu, identity, got 'gelu'"),
        (lambda: ConvBNAct2d(6, 6, eps=-1.0), "eps must be positive, got -1.0"),
        (lambda: ConvBNAct2d(6, 6, momentum=-1.0), r"momentum must be None or in \[0, 1\], got -1.0"),
        (lambda: ConvBNAct2d(6, 6, activation="gelu"), "activation must be one of relu, identity, got 'gelu'"),
    ],
    ids=["bn-eps", "bn-momentum", "bn-activation", "conv-eps", "conv-momentum", "conv-activation"],
)
def test_modules_refuse_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("build", [AddReLU, lambda **o: BNAct2d(6, **o), lambda **o: ConvBNAct2d(6, 6, **o)])
@pytest.mark.parametrize(
    ("x", "residual", "backend", "error", "message"),
    [
        (SHAPE, (2, 6, 4, 3), None, ValueError, r"residual must have x's shape \(2, 6, 4, 4\), got \(2, 6, 4, 3\)"),
        (SHAPE, SHAPE, "triton", RuntimeError, "backend='triton' does not serve"),
        (SHAPE, SHAPE, "fastest", ValueError, "backend must be one of native, triton, .* got 'fastest'"),
    ],
)
def test_modules_refuse_what_functions_refuse(build, x, residual, backend, error, message):
    module = build(backend=backend)
    before = {name: (t.clone(), t._version) for name, t in module.state_dict().items()}
    with pytest.raises(error, match=message):
        module(torch.randn(x), torch.randn(residual))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name][0]) and tensor._version == before[name][1]


@pytest.mark.parametrize(
    ("x", "error"), [((2, 5, 4, 4), RuntimeError), ((6, 4, 4), ValueError), ((1, 6, 1, 1), ValueError)], ids=str
)
def test_batch_norm_modules_raise_stocks_types(x, error):
    with pytest.raises(error):
        nn.BatchNorm2d(6)(torch.randn(x))
    for module in (BNAct2d(6), ConvBNAct2d(6, 6, 1)):
        with pytest.raises(error):
            module(torch.randn(x))
        assert all(not t.any() for name, t in module.state_dict().items() if name.endswith(("running_mean", "tracked")))
