"""The compiled kernels against every way to run the same layer on this CPU.

    python benchmarks/kernels.py [--json FILE] [--quick]

One thread; thread CPU time; all contestants of a shape take turns, in an order that changes every round, so that clock
and neighbours hit them alike; the median of the rounds is compared. A turn is one call, or where the quickest contestant
takes less than 100 us, as many as that takes it: a large weight is found where a net's other layers would have left it.
Ours is called through its torch operator, on float32 in and out, group 128 (`row`: one scale a channel). Peers: torch
fp32; ONNX Runtime fp32; its MatMulNBits, 4 and 2 bits, accuracy level 4, blocks of 128 and 32, the better counts, its
session call on bound buffers; int8: the better of oneDNN on inputs already quantised to u8 and fbgemm on float32,
per-channel weights. `int8_linear` is the module that a net on `torch-cpu` has for 8 bits and many rows, on u8 too: it
calls oneDNN.

A value named `..._vs_...` is our time over the peer's: below 1 is faster. `..._vnni_share` is of the rate at which VNNI multiplies
on registers alone, and exceeds 1 where a machine has AMX, which multiplies eight times as fast; `..._read_share`, of one row, of
the rate at which memchr reads memory of the size of the 4-bit weight.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

from tightrope.compressors import _kernels, kernels
from tightrope.compressors.kernels.linear import QuantLinear, groups_of
from tightrope.compressors.kernels.onednn import Int8Linear, QuantConv2d
from tightrope.compressors.kernels.ops import quantize

Call = Callable[[], object]
SHAPES = [(1, 768, 768), (1, 768, 3072), (1, 4096, 4096), (32, 768, 3072), (128, 1024, 1024)]
BITS = range(2, 9)
RESNET18 = [
    (64, 147), *[(64, 576)] * 4, (128, 576), *[(128, 1152)] * 3, (128, 64), (256, 1152), *[(256, 2304)] * 3, (256, 128),
    (512, 2304), *[(512, 4608)] * 3, (512, 256), (1000, 512),
]  # fmt: skip


def interleaved(calls: dict[str, Call], rounds: int, turn_us: float = 100.0) -> dict[str, float]:
    """Median thread CPU microseconds of a call of each, taking turns of as many calls as take the quickest `turn_us`."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    quickest_us = math.inf
    for call in calls.values():
        for _ in range(4):  # the first is cold
            started = time.thread_time()
            call()
            quickest_us = min(quickest_us, max(1e-2, (time.thread_time() - started) * 1e6))
    repeats = math.ceil(turn_us / quickest_us)
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for name, call in order.permutation(np.array(list(calls.items()), object)):  # no one always follows the same other
            started = time.thread_time()
            for _ in range(repeats):
                call()
            samples[name].append((time.thread_time() - started) / repeats * 1e6)
    return {name: median(values) for name, values in samples.items()}


def ours(bits: int, k: int, n: int, group: int = 128) -> QuantLinear:
    rng = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=rng)
    return QuantLinear.from_codes(codes, torch.rand(n, groups_of(k, group)) / 100, None, torch.randn(n), bits=bits, group=group)


def session(node: onnx.NodeProto, weights: dict[str, np.ndarray], m: int, k: int, n: int) -> Call:
    """An ONNX Runtime call of one node on buffers bound beforehand."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [m, k]), ("y", [m, n]))]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [numpy_helper.from_array(w, name) for name, w in weights.items()])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    runtime = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = ort.OrtValue.ortvalue_from_numpy(np.random.default_rng(0).normal(size=(m, k)).astype(np.float32))
    y = ort.OrtValue.ortvalue_from_numpy(np.empty((m, n), np.float32))
    bound = runtime.io_binding()
    bound.bind_ortvalue_input("x", x)
    bound.bind_ortvalue_output("y", y)

    def call(keep: object = (x, y)) -> None:
        runtime.run_with_iobinding(bound)

    return call


def onnx_peers(m: int, k: int, n: int) -> dict[str, Call]:
    rng = np.random.default_rng(1)
    bias = rng.normal(size=n).astype(np.float32)
    gemm = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    calls = {"ort32": session(gemm, {"w": rng.normal(size=(n, k)).astype(np.float32), "b": bias}, m, k, n)}
    for bits in (4, 2):
        for block in (128, 32):
            node = helper.make_node(
                "MatMulNBits", ["x", "w", "s", "", "", "b"], ["y"], domain="com.microsoft",
                K=k, N=n, bits=bits, block_size=block, accuracy_level=4,
            )  # fmt: skip
            codes = rng.integers(0, 256, (n, k // block, block * bits // 8)).astype(np.uint8)
            scales = rng.uniform(0.005, 0.01, (n, k // block)).astype(np.float32)
            calls[f"ort{bits}_g{block}"] = session(node, {"w": codes, "s": scales, "b": bias}, m, k, n)
    return calls


def torch_peers(m: int, k: int, n: int) -> dict[str, Call]:
    x, w, bias = torch.randn(m, k), torch.randn(n, k) / 30, torch.randn(n)
    scales = w.abs().amax(1) / 127
    codes = torch.round(w / scales[:, None]).to(torch.int8)
    x_codes = torch.randint(0, 256, (m, k), dtype=torch.uint8)
    onednn = torch.ops.onednn.qlinear_pointwise
    prepacked = torch.ops.onednn.qlinear_prepack(codes, [m, k])
    nought = torch.zeros(n, dtype=torch.int32)
    torch.backends.quantized.engine = "x86"
    tensor = torch.quantize_per_channel(w, scales.double(), torch.zeros(n, dtype=torch.long), 0, torch.qint8)
    fbgemm = torch.ops.quantized.linear_prepack(tensor, bias)
    none: tuple[str, list[float], str] = ("none", [], "")
    return {
        "torch": lambda: torch.nn.functional.linear(x, w, bias),
        "onednn": lambda: onednn(x_codes, 0.05, 128, prepacked, scales, nought, bias, 1.0, 0, torch.float32, *none),
        "fbgemm": lambda: torch.ops.quantized.linear_dynamic(x, fbgemm, False),
    }


def linears(m: int, k: int, n: int, rounds: int) -> dict[str, float]:
    x = torch.randn(m, k)
    layers = {f"w{bits}": ours(bits, k, n) for bits in BITS} | {f"w{bits}row": ours(bits, k, n, 0) for bits in (4, 8)}
    op = torch.ops.tightrope.quant_linear.default
    calls: dict[str, Call] = {
        name: partial(op, x, layer.packed, layer.bias, n, layer.bits, layer.group) for name, layer in layers.items()
    }
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8)
    called = Int8Linear.from_codes(codes, torch.rand(n) / 100, torch.randn(n), x_scale=0.05, x_zero=128)
    calls["int8_linear"] = partial(called, torch.randint(0, 256, (m, k), dtype=torch.uint8))
    work: list[float] = []
    read = b"\7" * layers["w4"].packed.numel()
    calls |= {"read": partial(read.find, b"\1")} if m == 1 else {}
    calls |= torch_peers(m, k, n) | onnx_peers(m, k, n) | {"peak": lambda: work.append(_kernels.dot_peak(2000))}
    us = interleaved(calls, rounds)
    peers = {
        "torch": us["torch"],
        "ort32": us["ort32"],
        "ort4": min(us["ort4_g128"], us["ort4_g32"]),
        "ort2": min(us["ort2_g128"], us["ort2_g32"]),
        "int8": min(us["onednn"], us["fbgemm"]),
    }
    peak = work[-1] / us["peak"] / 1e3  # Gop/s
    times = ", ".join(f"{name} {time_us:.1f} us" for name, time_us in us.items() if name != "peak")
    print(f"\n{m}x{k}x{n}: peak {peak:.0f} Gop/s; {times}")
    found = {f"int8_linear_{m}x{k}x{n}_vs_int8": us["int8_linear"] / peers["int8"]}
    for name, layer in layers.items():
        shape = f"{name}_{m}x{k}x{n}"
        for peer, time_us in peers.items():
            found[f"{shape}_vs_{peer}"] = us[name] / time_us
        found[f"{shape}_vs_w4"] = us[name] / us["w4"]
        found[f"{shape}_vnni_share"] = 2e-3 * m * k * n / us[name] / peak
        found[f"{shape}_gb_per_s"] = layer.packed.numel() / us[name] / 1e3
        if m == 1:
            found[f"{shape}_read_share"] = layer.packed.numel() / len(read) * us["read"] / us[name]
        print(
            f"  {name:6s} {us[name]:9.1f} us "
            + " ".join(f"{key[len(shape) + 1 :]} {found[key]:.3f}" for key in found if shape in key)
        )
    return found


def _quantised_then(call: Callable[..., object], x: torch.Tensor, given: tuple[object, ...]) -> object:
    return call(torch.quantize_per_tensor(x, 0.03, 128, torch.quint8).int_repr(), *given)


def convolutions(rounds: int) -> dict[str, float]:
    """`QuantConv2d` on float32 against the bare operator of oneDNN with torch's own quantisation before it, and torch fp32."""
    found = {}
    for channels, size in ((64, 56), (256, 14)):
        codes = torch.randint(0, 16, (channels, channels, 3, 3), dtype=torch.uint8)
        layer = QuantConv2d.from_codes(
            codes, torch.rand(channels) / 100, torch.randn(channels), bits=4, padding=(1, 1), size=(size, size), activation="relu",
            x_scale=0.03, x_zero=128, y_scale=0.05,
        )  # fmt: skip
        x = torch.randn(1, channels, size, size).contiguous(memory_format=torch.channels_last)
        plain = torch.nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=torch.channels_last)
        given = (
            0.03, 128, layer.prepacked, layer.scales, layer.no_zeros, layer.bias, [1, 1], [1, 1], [1, 1], 1, 0.05, 0, torch.uint8,
            "relu", [], "",
        )  # fmt: skip
        bare, coded = torch.ops.onednn.qconv_pointwise.default, quantize(x, 0.03, 128)
        with torch.inference_mode():
            us = interleaved(
                {
                    "ours": partial(layer, x),
                    "ours_on_codes": partial(layer, coded),
                    "bare_on_codes": partial(bare, coded, *given),
                    "qconv": partial(_quantised_then, bare, x, given),
                    "torch": partial(plain, x),
                },
                rounds,
            )
        shape = f"conv_3x3x{channels}x{channels}x{size}"
        found[f"{shape}_vs_qconv"] = us["ours"] / us["qconv"]
        found[f"{shape}_on_codes_vs_qconv"] = us["ours_on_codes"] / us["bare_on_codes"]
        found[f"{shape}_vs_torch"] = us["ours"] / us["torch"]
        print(f"\n{shape}: " + ", ".join(f"{name} {value:.1f} us" for name, value in us.items()))
    return found


def call_cost(rounds: int) -> float:
    """Microseconds that the operator costs over the bare kernel at 1x64x32."""
    layer, x, y = ours(4, 64, 32), torch.randn(1, 64), torch.empty(1, 32)
    bias = layer.bias
    assert bias is not None
    addresses = (x.data_ptr(), False, 0.0, 0, layer.packed.data_ptr(), layer.packed.numel(), bias.data_ptr(), 0)
    bare = (*addresses, y.data_ptr(), False, 0.0, 0, 1, 32, 64, 4, 128, 1, "")
    op = torch.ops.tightrope.quant_linear.default
    us = interleaved(
        {
            "bare": lambda: _kernels.linear(*bare),
            "op": lambda: op(x, layer.packed, bias, 32, 4, 128),
            "module": lambda: layer(x),
        },
        rounds,
    )
    print(f"\n1x64x32: bare kernel {us['bare']:.2f} us, operator {us['op']:.2f} us, module {us['module']:.2f} us")
    return us["op"] - us["bare"]


def torch_clip(weight: torch.Tensor, bits: int, ratios: int) -> torch.Tensor:
    """The same grid as `kernels.clip_scales`, in one batched expression."""
    levels = 2 ** (bits - 1) - 1
    steps = torch.arange(1, ratios + 1) / ratios
    grid = steps[:, None] * weight.abs().amax(1) / levels  # ratios x channels
    codes = torch.round(weight / grid[:, :, None]).clamp(-levels, levels)
    error = ((weight - codes * grid[:, :, None]) ** 2).sum(2)
    best: torch.Tensor = grid.gather(0, error.argmin(0, keepdim=True))[0]
    return best


def clipping(channels: int) -> float:
    """Our time over torch's for ResNet-18's shapes, bits 2..8, 100 ratios, on the first channels of every layer."""
    spent = {"ours": 0.0, "torch": 0.0}
    for c, n in RESNET18:
        weight = torch.randn(min(c, channels), n)
        started = time.thread_time()
        found = kernels.clip_scales(weight.numpy(), list(BITS))
        middle = time.thread_time()
        expected = torch.stack([torch_clip(weight, bits, 100) for bits in BITS])
        spent["ours"] += middle - started
        spent["torch"] += time.thread_time() - middle
        assert np.isclose(found, expected.numpy(), rtol=1e-5).mean() > 0.99
    print(f"\nclipping, {channels} channels of every layer of ResNet-18: ours {spent['ours']:.3f} s, torch {spent['torch']:.3f} s")
    return spent["ours"] / spent["torch"]


def packed_excess_bytes() -> float:
    """Bytes that stored layers take beyond bits / 8 a weight and four a scale; 0 is exact."""
    excess = 0
    for bits in BITS:
        for k, n in ((768, 768), (100, 33)):
            state = ours(bits, k, n).state_dict()
            stored = sum(t.numel() * t.element_size() for name, t in state.items() if name != "bias")
            excess += abs(stored - (-(-n * k * bits // 8) + 4 * n * groups_of(k, 128)))
    return float(excess)


def without_avx512(rounds: int) -> dict[str, float]:
    """W4 at 128x1024x1024 on the AVX2 paths, over torch fp32 on all that this CPU has and on AVX2 too: processes of their own."""
    command = [sys.executable, __file__, "--one-ratio", str(rounds)]
    limited = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    found = {}
    for isa in (name for name in ("avx2", "avxvnni") if name in kernels.isas()):
        for peer, limits in {"torch": {}, "torch_avx2": limited}.items():
            env = os.environ | {"TIGHTROPE_ISA": isa} | limits
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            found[f"{isa}_w4_128x1024x1024_vs_{peer}"] = float(done.stdout)
    return found


def one_ratio(rounds: int) -> float:
    layer, x, w, bias = ours(4, 1024, 1024), torch.randn(128, 1024), torch.randn(1024, 1024), torch.randn(1024)
    us = interleaved({"ours": lambda: layer(x), "torch": lambda: torch.nn.functional.linear(x, w, bias)}, rounds)
    return us["ours"] / us["torch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="11 rounds, fewer channels for the clipping")
    parser.add_argument("--rounds", type=int, help="31, or 11 with --quick")
    parser.add_argument("--one-ratio", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rounds = args.rounds or (11 if args.quick else 31)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with torch.inference_mode():
        if args.one_ratio:
            print(one_ratio(args.one_ratio))
            return
        print(f"instruction set {kernels.isa()}, torch {torch.__version__}, onnxruntime {ort.__version__}, {rounds} rounds")
        found: dict[str, float] = {}
        for shape in SHAPES:
            found |= linears(*shape, rounds)
        found |= convolutions(rounds)
        found["call_cost_us"] = call_cost(rounds)
        found |= without_avx512(rounds)
        found["clip_resnet18_vs_torch"] = clipping(4 if args.quick else 16)
        found["packed_excess_bytes"] = packed_excess_bytes()
    for name, value in found.items():
        if name.startswith(("call", "avx", "clip", "packed")):
            print(f"{name} {value:.3f}")
    if args.json:
        units = {"call_cost_us": "us", "packed_excess_bytes": "bytes"}
        rows = [
            {"name": name, "value": value, "unit": units.get(name, "GB/s" if name.endswith("gb_per_s") else "ratio")}
            for name, value in found.items()
        ]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
