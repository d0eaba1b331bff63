"""Layers that oneDNN runs, and codes of activations: against whole-number arithmetic, through every way in and out of torch."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processor import exact_int8
from safetensors.torch import load_file, save_file
from torch import nn

from tightrope.compressors.kernels.onednn import Int8Linear, QuantConv2d
from tightrope.compressors.kernels.ops import dequantize, quantize

X, Y = {"x_scale": 0.03, "x_zero": 100}, {"y_scale": 0.2, "y_zero": 30}


def conv(
    bits: int = 4, seed: int = 0, inputs: int = 6, outputs: int = 8, kernel: int = 3, groups: int = 1, **options: Any
) -> QuantConv2d:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (outputs, inputs // groups, kernel, kernel), dtype=torch.uint8, generator=g)
    scales, bias = torch.rand(outputs, generator=g) / 50 + 1e-3, torch.randn(outputs, generator=g)
    return QuantConv2d.from_codes(codes, scales, bias, bits=bits, groups=groups, **X, **options)


def linear(seed: int = 0, inputs: int = 40, outputs: int = 24, **options: Any) -> Int8Linear:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (outputs, inputs), dtype=torch.uint8, generator=g)
    return Int8Linear.from_codes(
        codes, torch.rand(outputs, generator=g) / 50 + 1e-3, torch.randn(outputs, generator=g), **X, **options
    )


def codes_of(*shape: int, seed: int = 1) -> torch.Tensor:
    made = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made


def expected(layer: QuantConv2d, x: torch.Tensor) -> torch.Tensor:
    """Sums of whole numbers in float64, which is exact below 2^53; then one scaling."""
    sums = nn.functional.conv2d(
        x.double() - layer.x_zero, layer.signed().double(), None, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    y = sums * (layer.scales.double() * layer.x_scale).reshape(-1, 1, 1)
    assert layer.bias is not None
    y = y + layer.bias.double().reshape(-1, 1, 1)
    return {"none": y, "relu": y.relu(), "relu6": y.clamp(0, 6)}[layer.activation]


def agree(found: torch.Tensor, wanted: torch.Tensor, y_scale: float, y_zero: int) -> None:
    """Equal to float32's rounding; as codes, equal but where the real value lies between two of them."""
    if not y_scale:
        assert found.dtype is torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
        return
    assert found.dtype is torch.uint8
    real = wanted / y_scale + y_zero
    assert bool(((found.double() - real.clamp(0, 255)).abs() <= 0.5 + 1e-3).all())


@settings(max_examples=20, deadline=None)
@given(
    bits=st.integers(2, 8), seed=st.integers(0, 999), group=st.sampled_from([1, 2, 6]), kernel=st.sampled_from([1, 3]),
    stride=st.integers(1, 2), padding=st.integers(0, 1), dilation=st.integers(1, 2), height=st.integers(5, 9),
    activation=st.sampled_from(["none", "relu", "relu6"]), coded=st.booleans(),
)  # fmt: skip
@exact_int8
def test_convolutions_are_those_of_whole_numbers(
    bits: int,
    seed: int,
    group: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    height: int,
    activation: str,
    coded: bool,
) -> None:
    options = {"stride": (stride, 1), "padding": (padding, 0), "dilation": (dilation, 1), "activation": activation}
    layer = conv(bits, seed, outputs=12, kernel=kernel, groups=group, **options, **(Y if coded else {}))
    x = codes_of(2, 6, height, 7, seed=seed)
    agree(layer(x), expected(layer, x), layer.y_scale, layer.y_zero)


@exact_int8
@pytest.mark.parametrize("groups", [1, 2])
def test_images_of_any_size_give_the_same_whatever_a_weight_is_laid_out_for(groups: int) -> None:
    """48 and 96 channels at 7 x 7 are sizes at which oneDNN lays a weight out in another way than it does by itself."""
    for outputs in (48, 96):
        layer = conv(8, inputs=32, outputs=outputs, groups=groups, padding=(1, 1), size=(7, 7), **Y)
        for x in (codes_of(1, 32, 7, 7), codes_of(3, 32, 7, 7), codes_of(1, 32, 14, 9)):
            agree(layer(x), expected(layer, x), layer.y_scale, layer.y_zero)


@exact_int8
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("shape", [(1, 40), (7, 40), (2, 5, 40)])
def test_linears_are_those_of_whole_numbers(shape: tuple[int, ...], coded: bool) -> None:
    layer = linear(activation="relu", **(Y if coded else {}))
    x = codes_of(*shape)
    sums = (x.double() - layer.x_zero) @ layer.signed().double().t()
    assert layer.bias is not None
    agree(layer(x), (sums * layer.scales.double() * layer.x_scale + layer.bias).relu(), layer.y_scale, layer.y_zero)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_activations_become_codes_and_back(memory: torch.memory_format) -> None:
    x = torch.randn(2, 5, 13, 11, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory) * 3
    x[0, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    codes = quantize(x, 0.03, 100)
    wanted = (torch.round(x * (1 / torch.tensor(0.03))) + 100).clamp(0, 255).nan_to_num(0)
    assert codes.stride() == x.stride() and torch.equal(codes.float(), wanted)
    values = dequantize(codes, 0.03, 100)
    assert values.stride() == x.stride() and torch.equal(values, (codes.float() - 100) * torch.tensor(0.03))


def test_many_elements_run_on_several_threads_alike() -> None:
    x = torch.randn(200_001, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            codes = quantize(x, 0.03, 100)
            found.append((codes, dequantize(codes, 0.03, 100)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(("scale", "zero", "x", "named"), [
    (0.0, 0, torch.zeros(3), "scale"), (0.1, 256, torch.zeros(3), "zero"), (0.1, 0, torch.zeros(3, dtype=torch.float64), "float32"),
    (0.1, 0, torch.zeros(8)[::2], "contiguous"), (0.1, 0, torch.zeros(1).expand(4), "contiguous"),
])  # fmt: skip
def test_what_cannot_be_quantised_is_refused(scale: float, zero: int, x: torch.Tensor, named: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=named):
        quantize(x, scale, zero)


def test_the_operators_pass_torchs_own_checks() -> None:
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(quantize, (x, 0.03, 100))
    torch.library.opcheck(dequantize, (quantize(x, 0.03, 100), 0.03, 100), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("make", [lambda: conv(3, **Y), lambda: linear()])
def test_layers_travel(make: Any, tmp_path: Path) -> None:
    """Through safetensors, copies and pickles, though what oneDNN reads can be neither saved nor copied."""
    layer, other = make(), make()
    assert isinstance(layer, (QuantConv2d, Int8Linear))
    x = codes_of(2, 6, 8, 8) if isinstance(layer, QuantConv2d) else codes_of(4, 40)
    wanted = layer(x)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.codes.zero_()
    other.x_scale, other.x_zero = 1.0, 0
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    for found in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(found(x), wanted)
    with pytest.raises(RuntimeError, match="x_scale"):
        other.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "x_scale"})


@pytest.mark.parametrize("bits", range(2, 9))
def test_sizes_are_true_to_the_byte(bits: int) -> None:
    layer = conv(bits, inputs=5, outputs=7)
    assert layer.size_bytes == -(-7 * 5 * 9 * bits // 8) + 4 * 7
    state = layer.state_dict()
    assert state["codes"].nbytes + state["scales"].nbytes == layer.size_bytes and set(state) == {
        "codes", "scales", "bias", "x_scale", "x_zero",
    }  # fmt: skip
    torch.testing.assert_close(layer.dequantized(), layer.signed() * layer.scales.reshape(-1, 1, 1, 1))


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = conv(4, activation="relu", **Y), Int8Linear(8, 5, x_scale=0.2, x_zero=30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.linear(self.conv(x).permute(0, 2, 3, 1))
        return made


def test_export_with_a_free_batch_and_compile_in_one_graph() -> None:
    model, x = Both().eval(), torch.randn(3, 6, 8, 8)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        other = torch.randn(5, 6, 8, 8)
        assert torch.equal(program.module()(other), model(other))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), model(x))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="activation"):
        conv(activation="gelu")
    with pytest.raises(ValueError, match="groups"):
        QuantConv2d(6, 8, (3, 3), bits=4, groups=4, **X)
    with pytest.raises(ValueError, match="bits"):
        QuantConv2d(6, 8, (3, 3), bits=9, **X)
    with pytest.raises(ValueError, match="x_scale"):
        QuantConv2d(6, 8, (3, 3), bits=4, x_scale=0.0, x_zero=0)
    with pytest.raises(ValueError, match="x_zero"):
        QuantConv2d(6, 8, (3, 3), bits=4, x_scale=1.0, x_zero=300)
    with pytest.raises(ValueError, match=r"codes must be uint8 in \[0, 16\)"):
        QuantConv2d.from_codes(torch.full((2, 2, 1, 1), 16, dtype=torch.uint8), torch.ones(2), bits=4, **X)
    with pytest.raises(ValueError, match="scales"):
        Int8Linear.from_codes(torch.zeros(2, 2, dtype=torch.uint8), torch.full((2,), float("nan")), **X)
    with pytest.raises(ValueError, match="dimensions"):
        Int8Linear.from_codes(torch.zeros(2, 2, 1, dtype=torch.uint8), torch.ones(2), **X)
