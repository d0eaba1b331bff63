"""The packed W2..W8A8 linear: exact against int64, equal to the fake-quantised reference, at home in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn
from torch._inductor import config as inductor
from torch.export import Dim, export

from tightrope.compressors import _kernels, kernels
from tightrope.compressors.kernels.linear import QuantLinear, groups_of, pack, unpack
from tightrope.compressors.kernels.ops import quant_linear

BITS = range(2, 9)
GROUPS = [0, 32, 64, 128, 256]
ISAS = kernels.isas()


def run(
    x: NDArray[Any],
    packed: torch.Tensor,
    n: int,
    bits: int,
    group: int,
    *,
    isa: str,
    bias: NDArray[np.float32] | None = None,
    activation: int = 0,
    x_scale: float = 0.0,
    x_zero: int = 0,
    y_scale: float = 0.0,
    y_zero: int = 0,
) -> NDArray[Any]:
    """The kernel on a named instruction set, on arrays."""
    m, k = x.shape
    y = np.full((m, n), 77, np.uint8 if y_scale else np.float32)
    _kernels.linear(
        x.ctypes.data, x.dtype == np.uint8, x_scale, x_zero, packed.data_ptr(), packed.numel(),
        0 if bias is None else bias.ctypes.data, activation, y.ctypes.data, bool(y_scale), y_scale, y_zero,
        m, n, k, bits, group, 1, isa,
    )  # fmt: skip
    return y


def weight(n: int, k: int, bits: int, group: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random codes, scales and zero points."""
    rng = torch.Generator().manual_seed(seed)
    shape = (n, groups_of(k, group))
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=rng)
    zeros = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=rng)
    return codes, torch.rand(shape, generator=rng) + 0.5, zeros


def real(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group: int) -> NDArray[np.float64]:
    """The weight that codes stand for, in float64."""
    which = torch.arange(codes.shape[1]) // (group or codes.shape[1])
    return ((codes.double() - zeros.double()[:, which]) * scales.double()[:, which]).numpy()


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(1, 14),
    n=st.integers(1, 70),
    k=st.integers(1, 200),
    bits=st.sampled_from(BITS),
    group=st.sampled_from(GROUPS),
    x_zero=st.integers(0, 255),
    extreme=st.booleans(),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_integer_parts_equal_int64_bit_for_bit(
    isa: str, m: int, n: int, k: int, bits: int, group: int, x_zero: int, extreme: bool, symmetric: bool, seed: int
) -> None:
    """With scales of one all that is summed is an integer below 2^24, so float32 shows it exactly."""
    rng = np.random.default_rng(seed)
    codes, scales, zeros = weight(n, k, bits, group, seed)
    scales = torch.ones_like(scales)
    x = rng.integers(0, 256, (m, k)).astype(np.uint8)
    if extreme:
        codes = torch.where(codes < 2 ** (bits - 1), 0, 2**bits - 1).to(torch.uint8)
        zeros = torch.where(zeros < 2 ** (bits - 1), 0, 2**bits - 1).to(torch.uint8)
        x = np.where(x < 128, 0, 255).astype(np.uint8)
    packed = pack(codes, scales, None if symmetric else zeros, bits, group)
    if symmetric:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    exact = real(codes, scales, zeros, group).astype(np.int64)
    static = run(x, packed, n, bits, group, isa=isa, x_scale=1.0, x_zero=x_zero)
    np.testing.assert_array_equal(static.astype(np.int64), (x.astype(np.int64) - x_zero) @ exact.T)
    signed = np.clip(x.astype(np.float32) - 128, -127, 127)
    signed[:, 0] = 127  # so that the scale of a row is one
    rows = run(signed, packed, n, bits, group, isa=isa)
    np.testing.assert_array_equal(rows.astype(np.int64), signed.astype(np.int64) @ exact.T)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("m", "n", "k", "group"), [(1, 40, 1100, 128), (3, 17, 700, 0), (131, 100, 600, 32)])
def test_it_equals_the_fake_quantised_reference(isa: str, bits: int, m: int, n: int, k: int, group: int) -> None:
    rng = np.random.default_rng(bits)
    codes, scales, zeros = weight(n, k, bits, group, bits)
    packed, w = pack(codes, scales, zeros, bits, group), real(codes, scales, zeros, group)
    x = rng.normal(size=(m, k)).astype(np.float32)
    bias = rng.normal(size=n).astype(np.float32)

    top = np.abs(x).max(axis=1, keepdims=True)
    quantized = np.rint(x * (np.float32(127) / top)) * (top / np.float32(127)).astype(np.float64)
    expected = quantized @ w.T + bias
    tolerance = 1e-6 * np.abs(quantized) @ np.abs(w).T
    assert (np.abs(run(x, packed, n, bits, group, isa=isa, bias=bias) - expected) <= tolerance).all()
    relu = run(x, packed, n, bits, group, isa=isa, bias=bias, activation=1)
    assert (np.abs(relu - np.maximum(expected, 0)) <= tolerance).all()

    scale, zero = 0.03, 120
    steps = np.clip(np.rint(x * (np.float32(1) / np.float32(scale))) + zero, 0, 255) - zero
    expected = np.float32(scale) * steps.astype(np.float64) @ w.T + bias
    tolerance = 2e-6 * scale * 256 * np.abs(w).sum(axis=1)
    static = run(x, packed, n, bits, group, isa=isa, bias=bias, x_scale=scale, x_zero=zero)
    assert (np.abs(static - expected) <= tolerance).all()
    out = run(x, packed, n, bits, group, isa=isa, bias=bias, x_scale=scale, x_zero=zero, y_scale=2.0, y_zero=9)
    ideal = expected / 2 + 9
    assert (np.abs(out - np.clip(ideal, 0, 255)) <= 0.5 + tolerance).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("m", "group"), [(1, 128), (2, 0), (9, 64)])
def test_a_symmetric_weight_is_one_whose_zero_points_are_all_the_middle_code(isa: str, bits: int, m: int, group: int) -> None:
    codes, scales, zeros = weight(50, 300, bits, group, bits)
    middle = torch.full_like(zeros, 2 ** (bits - 1))
    x = np.random.default_rng(bits).normal(size=(m, 300)).astype(np.float32)
    with_zeros, without = (pack(codes, scales, zeros_, bits, group) for zeros_ in (middle, None))
    assert with_zeros.numel() - without.numel() == 2 * 64 * groups_of(300, group)
    np.testing.assert_array_equal(*(run(x, packed, 50, bits, group, isa=isa) for packed in (with_zeros, without)))
    assert torch.equal(unpack(without, 50, 300, bits, group)[2], middle)


@pytest.mark.parametrize("isa", ISAS)
def test_gelu(isa: str) -> None:
    """One input, weight one: the layer is the activation alone."""
    x = np.linspace(-12, 12, 4001, dtype=np.float32)[:, None]
    packed = pack(torch.tensor([[3]], dtype=torch.uint8), torch.ones(1, 1), torch.tensor([[2]], dtype=torch.uint8), 2, 0)
    expected = nn.functional.gelu(torch.from_numpy(x).double()).numpy()
    np.testing.assert_allclose(run(x, packed, 1, 2, 0, isa=isa, activation=2), expected, atol=2e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", [0, 1, 2])
@pytest.mark.parametrize("m", [1, 6])
def test_one_layer_hands_codes_to_the_next(isa: str, activation: int, m: int) -> None:
    """Bias and activation fused, uint8 out; then uint8 in. Codes are those of the float64 result but where it is a tie."""
    rng = np.random.default_rng(activation)
    weights = [weight(40, 96, 4, 32, 1), weight(20, 40, 3, 0, 2)]
    first, second = (pack(*weights[i], bits, group) for i, bits, group in ((0, 4, 32), (1, 3, 0)))
    w, bias = [real(*weights[0], 32), real(*weights[1], 0)], rng.normal(size=40).astype(np.float32)
    x = rng.integers(0, 256, (m, 96)).astype(np.uint8)
    scale, zero = 0.5, 3 if activation else 128
    codes = run(
        x, first, 40, 4, 32, isa=isa, bias=bias, activation=activation, x_scale=0.01, x_zero=120, y_scale=scale, y_zero=zero
    )
    y = torch.from_numpy(np.float32(0.01) * (x.astype(np.float64) - 120) @ w[0].T + bias)
    ideal = (y, y.relu(), nn.functional.gelu(y))[activation].numpy() / scale + zero
    assert (np.abs(codes - np.clip(ideal, 0, 255)) <= 0.5 + 1e-3).all()
    out = run(codes, second, 20, 3, 0, isa=isa, x_scale=scale, x_zero=zero)
    np.testing.assert_allclose(out, scale * (codes.astype(np.float64) - zero) @ w[1].T, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_what_is_not_finite_spoils_its_row_and_no_other(isa: str, bad: float, activation: int) -> None:
    codes, scales, zeros = weight(20, 50, 4, 0, 0)
    packed = pack(codes, scales, zeros, 4, 0)
    x = np.random.default_rng(0).normal(size=(7, 50)).astype(np.float32)
    clean = run(x, packed, 20, 4, 0, isa=isa, activation=activation)
    x[3, 49] = bad
    y = run(x, packed, 20, 4, 0, isa=isa, activation=activation)
    assert np.isnan(y[3]).all()
    np.testing.assert_array_equal(np.delete(y, 3, 0), np.delete(clean, 3, 0))
    static = run(x, packed, 20, 4, 0, isa=isa, activation=activation, x_scale=0.1, x_zero=128)
    assert np.isnan(static[3]).all() == np.isnan(bad)  # an infinity saturates
    assert (run(x, packed, 20, 4, 0, isa=isa, x_scale=0.1, y_scale=1.0, y_zero=5)[3] == 0).all() == np.isnan(bad)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_of_zeros_and_of_tiny_and_huge_values(isa: str) -> None:
    codes, scales, zeros = weight(5, 40, 6, 0, 1)
    packed, w = pack(codes, scales, zeros, 6, 0), real(codes, scales, zeros, 0)
    x = np.random.default_rng(0).normal(size=(4, 40)).astype(np.float32)
    x *= np.array([[0], [1e-20], [1e-45], [1e30]], np.float32)
    y = run(x, packed, 5, 6, 0, isa=isa)
    assert not y[0].any() and not y[2].any()
    for row in (1, 3):
        expected = x[row].astype(np.float64) @ w.T
        assert np.abs(y[row] - expected).max() < 0.05 * np.abs(expected).max()


@given(
    n=st.integers(1, 40),
    k=st.integers(1, 150),
    bits=st.sampled_from(BITS),
    group=st.sampled_from(GROUPS),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_packing_round_trips(n: int, k: int, bits: int, group: int, seed: int) -> None:
    given_ = weight(n, k, bits, group, seed)
    for before, after in zip(given_, unpack(pack(*given_, bits, group), n, k, bits, group), strict=True):
        assert torch.equal(before, after)


def test_packed_weights_take_exactly_their_bits() -> None:
    """Where no padding is needed: bits / 8 a weight, and for 32 channels their sums, scales and zero points in lines of 64."""
    for bits in BITS:
        for zeros, line in ((False, 0), (True, 64)):
            codes_bytes = _kernels.linear_bytes(64, 256, bits, 64, zeros) - 2 * (4 * 32 + 4 * (4 * 32 + line))
            assert codes_bytes == 64 * 256 * bits // 8


def layer(bits: int = 4, *, group: int = 0, symmetric: bool = True, n: int = 21, k: int = 77) -> QuantLinear:
    codes, scales, zeros = weight(n, k, bits, group, 5)
    bias = torch.linspace(-1, 1, n)
    return QuantLinear.from_codes(codes, scales, None if symmetric else zeros, bias, bits=bits, group=group)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_round_trips_through_safetensors_at_its_true_size(tmp_path: Path, bits: int, symmetric: bool) -> None:
    first = layer(bits, group=32, symmetric=symmetric)
    save_file(first.state_dict(), tmp_path / "layer.safetensors")
    stored = load_file(tmp_path / "layer.safetensors")
    weight_bytes = sum(t.numel() * t.element_size() for name, t in stored.items() if name != "bias")
    assert weight_bytes == first.size_bytes == -(-21 * 77 * bits // 8) + 21 * 3 * (4 if symmetric else 5)
    second = QuantLinear(77, 21, bits=bits, group=32, symmetric=symmetric)
    second.load_state_dict(stored)
    x = torch.randn(3, 77)
    assert torch.equal(first(x), second(x))


def test_static_scales_travel_with_the_state() -> None:
    codes, scales, _ = weight(8, 40, 5, 0, 2)
    first = QuantLinear.from_codes(codes, scales, bits=5, x_scale=0.05, x_zero=100, y_scale=0.5, y_zero=128)
    inside = nn.Sequential(QuantLinear(40, 8, bits=5, bias=False, x_scale=1.0, y_scale=1.0))
    inside.load_state_dict({"0." + name: value for name, value in first.state_dict().items()})
    x = torch.randn(6, 40)
    assert first(x).dtype is torch.uint8
    assert torch.equal(inside(x), first(x))
    levels = (x * (1 / torch.tensor(0.05))).round().add(100).clamp(0, 255).to(torch.uint8)
    assert torch.equal(first(levels), first(x))


def test_a_state_that_does_not_fit_is_named() -> None:
    state = layer(4).state_dict()
    with pytest.raises(RuntimeError, match=r"packed must hold ceil"):
        layer(5).load_state_dict(state)
    state.pop("scales")
    with pytest.raises(RuntimeError, match=r"Missing key.*scales"):
        layer(4).load_state_dict(state)


@pytest.mark.parametrize("group", GROUPS)
def test_from_float_is_near_the_float_layer(group: int) -> None:
    torch.manual_seed(0)
    dense, x = nn.Linear(300, 50), torch.randn(40, 300)
    with torch.no_grad():
        ideal = dense(x)
        errors = [float((QuantLinear.from_float(dense, bits=b, group=group)(x) - ideal).norm() / ideal.norm()) for b in BITS]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.15 and errors[-1] < 0.012


def test_from_float_on_whole_rows_equals_quantize_per_channel() -> None:
    dense = nn.Linear(90, 12)
    codes, scales = kernels.quantize_per_channel(dense.weight.detach().numpy(), 4)
    weight_ = torch.from_numpy(codes * scales[:, None])
    torch.testing.assert_close(QuantLinear.from_float(dense, bits=4).dequantized(), weight_)


@pytest.mark.parametrize("x", [torch.randn(2, 3, 77), torch.randn(77), torch.randn(0, 77), torch.randn(77, 4).t()])
def test_any_leading_shape(x: torch.Tensor) -> None:
    linear = layer()
    y = linear(x)
    assert y.shape == (*x.shape[:-1], 21)
    assert torch.equal(y.reshape(-1, 21), linear(x.reshape(-1, 77)))


def test_opcheck() -> None:
    linear, x = layer(group=32), torch.randn(3, 77)
    codes = torch.randint(0, 256, (3, 77), dtype=torch.uint8)
    for arguments in [(x,), (x, 2, 0.1, 7, 0.2, 3), (codes, 1, 0.1, 7)]:
        rest = (linear.packed, linear.bias, 21, 4, 32)
        torch.library.opcheck(quant_linear, (arguments[0], *rest, *arguments[1:]))


def test_export_with_a_dynamic_batch() -> None:
    linear = layer()
    program = export(linear, (torch.randn(4, 77),), dynamic_shapes=({0: Dim("batch")},))
    assert [n.target for n in program.graph.nodes].count(quant_linear) == 1
    x = torch.randn(9, 77)
    assert torch.equal(program.module()(x), linear(x))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_compile_fullgraph(backend: str) -> None:
    model = nn.Sequential(layer(), nn.ReLU()).eval()
    x = torch.randn(4, 77)
    with inductor.patch(force_disable_caches=True):  # whose keys leave the operator's schema out
        assert torch.equal(torch.compile(model, fullgraph=True, backend=backend)(x), model(x))


def test_threads_change_nothing() -> None:
    linear, x = layer(n=500, k=300), torch.randn(300, 300)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = linear(x)
        torch.set_num_threads(2)
        assert torch.equal(linear(x), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 77, dtype=torch.float64)}, "x must be float32 or uint8"),
        ({"x": torch.zeros(77, 2).t()}, "x must be contiguous"),
        ({"x": torch.zeros(2, 76 + 64)}, "packed must hold exactly the [0-9]+ bytes .* or [0-9]+ with zero points, got"),
        ({"x": torch.zeros(2, 77, dtype=torch.uint8)}, "x_scale must be given where x is uint8"),
        ({"packed": torch.zeros(10, dtype=torch.int8)}, "packed must be contiguous uint8"),
        (
            {"packed": torch.zeros(10, dtype=torch.uint8)},
            "packed must hold exactly the [0-9]+ bytes .* or [0-9]+ with zero points, got",
        ),
        ({"bias": torch.zeros(20)}, "bias must be contiguous float32 of n = 21 elements"),
        ({"bias": torch.zeros(21, dtype=torch.float64)}, "bias must be contiguous float32 of n = 21 elements"),
        ({"bias": torch.zeros(42)[::2]}, "bias must be contiguous float32 of n = 21 elements"),
        ({"packed": torch.zeros(20, dtype=torch.uint8)[::2]}, "packed must be contiguous uint8"),
        ({"bits": 9}, r"bits must lie in \[2, 8\]"),
        ({"group": 48}, "group must be 0"),
        ({"activation": 3}, r"activation must be 0 \(none\), 1 \(relu\) or 2 \(gelu\), got 3"),
        ({"x": torch.zeros(2, 0)}, "n and k must lie in"),
        ({"x": torch.tensor(1.0)}, "x must be contiguous"),
        ({"x_scale": float("nan")}, "x_scale must be 0"),
        ({"x_zero": 256}, "x_zero and y_zero"),
        ({"y_scale": -1.0}, "y_scale must be 0"),
        ({"n": 0}, "n and k must lie in|bias must be"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    linear = layer()
    good = {"x": torch.zeros(2, 77), "packed": linear.packed, "bias": linear.bias, "n": 21, "bits": 4, "group": 0}
    with pytest.raises(ValueError, match=message):
        quant_linear(**(good | change))


def test_tensors_elsewhere_are_refused() -> None:
    linear = layer()
    with pytest.raises((NotImplementedError, RuntimeError)):
        quant_linear(torch.zeros(2, 77), linear.packed.to_sparse(), None, 21, 4, 0)
    x, good = torch.zeros(2, 77), {"packed": linear.packed, "bias": linear.bias}
    for name, tensor in good.items():
        assert tensor is not None
        with pytest.raises(ValueError, match=f"{name} must be where x is, on cpu, got meta"):
            quant_linear(x, **(good | {name: tensor.to("meta")}), n=21, bits=4, group=0)


CODES = torch.full((2, 3), 4, dtype=torch.uint8)
ZEROS = torch.zeros(2, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack(CODES, torch.ones(2, 1), ZEROS, 2, 0), r"codes must be uint8 in \[0, 4\)"),
        (lambda: QuantLinear(8, 8, bits=4, activation="swish"), "activation must be one of"),
        (lambda: QuantLinear(8, 8, bits=1), "bits must lie in"),
        (lambda: QuantLinear.from_codes(CODES, torch.full((2, 1), torch.inf), bits=4), "scales must be finite"),
        (lambda: QuantLinear.from_codes(CODES, torch.ones(2, 1), ZEROS.expand(2, 2), bits=4), r"zeros must be uint8 \[2, 1\]"),
    ],
)
def test_bad_layers_are_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
