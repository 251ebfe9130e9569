"""Rows as benchmarks write them, of every kind, with figures that are made up."""

WHERE = {
    "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef", "dirty": False, "resfuse": "0.1.0",
    "device": "cpu", "device_name": "Some CPU", "capability": "AVX512", "driver": None, "threads": 2, "load": 0.1,
    "torch": "2.13.0", "triton": None, "python": "3.11.7", "os": "Linux x86_64",
}  # fmt: skip
FIXED = {"quick": False, "environment": WHERE, "backend": "native", "layout": "channels_last"}


def quantiles(ms, batch=None):
    rate = {} if batch is None else {"images_per_s": round(1e3 * batch / ms, 2)}
    return {"p20_ms": 0.95 * ms, "median_ms": ms, "p80_ms": 1.1 * ms, "samples": 9,
            "values_ms": [0.95 * ms, ms, 1.1 * ms], **rate}  # fmt: skip


def ratio(value, spread=0.05):
    return {"of_medians": value, "paired": value, "low": value * (1 - spread), "high": value * (1 + spread)}


def network_row(times, **changes):
    """A network's row: `times` holds each peer's ms."""
    cell = {"model": "resnet50", "mode": "training", "dtype": "float32", "batch": 16, "size": 224, **changes}
    variants = {name: {**quantiles(ms, cell["batch"]), "peak_rss_bytes": int(2e7 * ms), "saved_bytes": int(1e7 * ms)}
                for name, ms in times.items()}  # fmt: skip
    ratios = {f"fused/{name}": ratio(times["fused"] / ms) for name, ms in times.items() if name != "fused"}
    return {**FIXED, "suite": "models", "variants": variants, "ratios": ratios, **cell}


def unit_row(unit="moments", form="", dtype="float32", shape=(16, 64, 56, 56), ms=1.0, **changes):
    """A unit's row; ms is the time of a call."""
    size = {"float32": 4, "bfloat16": 2}[dtype]
    values = shape[0] * shape[1] * shape[2] * shape[3]
    moved = 2 * values * size
    rate = moved / ms / 1e6
    return {
        **FIXED, "suite": "units", "unit": unit, "form": form, "dtype": dtype, "shape": list(shape), "memory": "kept",
        "bytes": moved, "flops": 3 * values, "matmul_gflop_per_s": 120.0 if dtype == "float32" else 400.0,
        "times": {"resfuse": quantiles(ms), "copy": quantiles(moved / 60e6), "stock": quantiles(2 * ms)},
        "gb_per_s": rate, "copy_gb_per_s": 60.0, "share_of_copy": rate / 60, "over_stock": ratio(0.5),
        "ratios": {"resfuse/stock": ratio(0.5)}, **changes,
    }  # fmt: skip


def block_row(mode="forward", **changes):
    variants = {"eager": {**quantiles(20.0, 16), "saved_bytes": 90_000_000, "peak_bytes": 200_000_000},
                "fused": {**quantiles(12.0, 16), "saved_bytes": 40_000_000, "peak_bytes": 130_000_000}}  # fmt: skip
    return {
        **FIXED, "suite": "blocks", "model": "resnet50", "block": "Bottleneck", "name": "layer1.1",
        "names": ["layer1.1", "layer1.2"], "shape": [16, 256, 56, 56], "mode": mode, "dtype": "float32", "batch": 16,
        "size": 224, "variants": variants, "ratios": {"fused/eager": ratio(0.6)}, **changes,
    }  # fmt: skip


def serving_row(batch=1, dtype="float32", **changes):
    times = {"eager": 20.0, "freeze": 14.0, "onnxruntime": 12.0, "openvino": 9.0, "folded": 10.0}
    variants = {
        name: {**quantiles(ms * batch, batch), "p50_ms": ms * batch, "p99_ms": 1.6 * ms * batch, "first_call_s": 0.5,
               "peak_rss_bytes": 600_000_000, "imported_rss_bytes": 400_000_000, "error": 1e-6}
        for name, ms in times.items()
    }  # fmt: skip
    return {
        **FIXED, "suite": "serving", "threads": 2, "model": "resnet50", "batch": batch, "size": 224, "dtype": dtype,
        "variants": variants, "missing": {},
        "ratios": {f"folded/{name}": ratio(10 / ms) for name, ms in times.items() if name != "folded"}, **changes,
    }  # fmt: skip


def scaling_row(axis, value, eager_ms, fused_ms, work, **changes):
    place = {"batch": 16, "size": 224, "threads": 2, "model": "resnet50", "mode": "training", "dtype": "float32"}
    place |= {axis: value} if axis in place else {"model": f"resnet{value}"}
    variants = {"eager": quantiles(eager_ms), "fused": quantiles(fused_ms)}
    return {**FIXED, "suite": "scaling", "axis": axis, "value": value, "work": work, **place, "variants": variants,
            "ratios": {"fused/eager": ratio(fused_ms / eager_ms)}, **changes}  # fmt: skip


def every_kind():
    """A small set of rows that fills every section."""
    inference = {"eager": 50.0, "compile": 30.0, "onnxruntime": 25.0, "openvino": 22.0, "fused": 26.0}
    rows = [
        network_row({"eager": 100.0, "compile": 80.0, "fused": 50.0}),
        network_row({"eager": 40.0, "compile": 33.0, "fused": 32.5}, model="resnet18", dtype="bfloat16"),
        network_row(inference, mode="inference", missing={"torch-tensorrt": "needs an NVIDIA GPU"}),
    ]
    units = [("moments", ""), ("scale_shift_act", "raw"), ("add_relu", ""), ("conv_stats", "3x3")]
    for index, (unit, form) in enumerate(units):
        for dtype, ms in (("float32", 0.6), ("bfloat16", 0.4)):
            for shape in ((16, 64, 56, 56), (16, 512, 14, 14)):
                call = ms * (1 + index / 4) * shape[1] * shape[2] * shape[3] / 200_704
                row = unit_row(unit, form, dtype, shape, call)
                if unit == "conv_stats":
                    row["flops"] *= 20 if dtype == "float32" else 40
                rows.append(row)
    rows += [block_row(mode) for mode in ("forward", "step")]
    rows += [serving_row(1), serving_row(1, "bfloat16"), serving_row(8)]
    for axis, values in (("batch", (1, 4, 16, 64)), ("size", (64, 128, 256)), ("threads", (1, 2))):
        for value in values:
            work = 10**9 * (value if axis == "batch" else value**2 // 64 if axis == "size" else 16)
            growth = work / 1e9 if axis != "threads" else 16 / value**0.8
            start = 6.0 if axis == "batch" and value == 1 else 0.0
            rows.append(scaling_row(axis, value, 3 * growth + start, 2 * growth + start, work))
    return rows
