"""The compiled kernels against their NumPy twins and brute force, on every instruction set of the machine."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from tightrope.compressors import kernels
from tightrope.compressors.kernels import reference

BITS = range(2, 9)
FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


def squared_error(weight: NDArray[np.float32], scale: float, bits: int) -> float:
    levels = 2 ** (bits - 1) - 1
    wide = weight.astype(np.float64)
    return float(((wide - scale * np.clip(np.rint(wide / scale), -levels, levels)) ** 2).sum())


def test_the_compiled_module_is_there() -> None:
    assert kernels.isa() in kernels.isas()
    assert kernels.isas()[-1] == "portable"


def test_bit_order_by_hand() -> None:
    # 3-bit codes 5, 2, 7 are 101, 010, 111: read from the low end, byte 0 is 11|010|101, byte 1 the last 1.
    assert kernels.pack_bits(np.array([5, 2, 7], np.uint8), 3).tolist() == [0b11_010_101, 0b1]


@given(st.data(), st.sampled_from(BITS), st.integers(0, 70))
def test_packing_round_trips_and_equals_the_twin(data: st.DataObject, bits: int, n: int) -> None:
    codes = data.draw(hnp.arrays(np.uint8, n, elements=st.integers(0, 2**bits - 1)))
    packed = kernels.pack_bits(codes, bits)
    assert packed.size == kernels.packed_size_bytes(n, bits) == -(-n * bits // 8)
    np.testing.assert_array_equal(packed, reference.pack_bits(codes, bits))
    np.testing.assert_array_equal(kernels.unpack_bits(packed, bits, n), codes)
    np.testing.assert_array_equal(reference.unpack_bits(packed, bits, n), codes)


@pytest.mark.parametrize("isa", kernels.isas())
@settings(deadline=None)
@given(
    weight=hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=150), elements=FINITE),
    bits=st.sampled_from(BITS),
    ratios=st.sampled_from([1, 7, 100]),
)
def test_no_clip_ratio_of_the_grid_beats_the_chosen_one(isa: str, weight: NDArray[np.float32], bits: int, ratios: int) -> None:
    scales = kernels.clip_scales(weight, [bits], ratios, isa=isa)[0]
    for channel, scale in zip(weight, scales, strict=True):
        top = np.abs(channel).max()
        if top < reference.ZERO_CHANNEL:
            assert scale == 1
            continue
        grid = [step / ratios * float(top) / (2 ** (bits - 1) - 1) for step in range(1, ratios + 1)]
        best = min(squared_error(channel, candidate, bits) for candidate in grid)
        assert min(abs(scale / candidate - 1) for candidate in grid) < 1e-6
        assert squared_error(channel, float(scale), bits) <= best * (1 + 1e-4) + 1e-9 * weight.shape[1] * float(top) ** 2


@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("n", [1, 15, 16, 17, 511, 512, 513, 1500])
def test_all_widths_at_once_equal_the_twin(isa: str, n: int) -> None:
    weight = np.random.default_rng(n).normal(size=(5, n)).astype(np.float32)
    weight[2] = 0
    scales = kernels.clip_scales(weight, list(BITS), isa=isa)
    twin = reference.clip_scales(weight, list(BITS), 100)
    assert scales.shape == (7, 5)
    # Ties within float32 rounding may fall either way, so nearly all scales agree and all errors do.
    assert np.isclose(scales, twin, rtol=1e-6).mean() > 0.9
    for bits, ours, theirs in zip(BITS, scales, twin, strict=True):
        for channel, a, b in zip(weight, ours, theirs, strict=True):
            assert squared_error(channel, float(a), bits) <= squared_error(channel, float(b), bits) * (1 + 1e-4) + 1e-10


@pytest.mark.parametrize("isa", kernels.isas())
@given(
    weight=hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40), elements=FINITE),
    bits=st.sampled_from(BITS),
    scale=st.floats(2.0**-60, 2.0**60, width=32),
)
def test_codes_equal_the_twin(isa: str, weight: NDArray[np.float32], bits: int, scale: float) -> None:
    scales = np.full(len(weight), scale, np.float32)
    np.testing.assert_array_equal(kernels.encode(weight, scales, bits, isa=isa), reference.encode(weight, scales, bits))


def test_halves_round_to_even() -> None:
    weight = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 9.0]], np.float32)
    assert kernels.encode(weight, np.ones(1, np.float32), 4).tolist() == [[0, 2, 2, 0, -2, 7]]


def test_quantised_weights_are_near_and_within_range() -> None:
    weight = np.random.default_rng(0).normal(size=(8, 300)).astype(np.float32)
    errors = []
    for bits in BITS:
        codes, scales = kernels.quantize_per_channel(weight, bits)
        assert codes.dtype == np.int8 and np.abs(codes.astype(int)).max() <= 2 ** (bits - 1) - 1
        errors.append(np.linalg.norm(codes * scales[:, None] - weight) / np.linalg.norm(weight))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.5 and errors[-1] < 0.01


def test_a_channel_of_zeros() -> None:
    codes, scales = kernels.quantize_per_channel(np.zeros((2, 9), np.float32), 4)
    assert scales.tolist() == [1, 1] and not codes.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.pack_bits(np.zeros(3, np.int64), 4), r"codes must be a 1-dimensional uint8 array.*int64"),
        (lambda: kernels.pack_bits(np.zeros(3, np.uint8), 9), r"bits must be a whole number in \[2, 8\], got 9"),
        (lambda: kernels.pack_bits(np.full(3, 16, np.uint8), 4), r"codes must lie in \[0, 16\).*got 16"),
        (lambda: kernels.unpack_bits(np.zeros(3, np.uint8), 4, 7), r"packed must hold.*got 3 for n=7"),
        (lambda: kernels.clip_scales(np.zeros(3, np.float32), [4]), r"weight must be a 2-dimensional"),
        (lambda: kernels.clip_scales(np.zeros((1, 3), np.float32), [4], 0), r"ratios must lie in \[1, 10000\], got 0"),
        (
            lambda: kernels.quantize_per_channel(np.array([[0, 0], [0, np.nan]], np.float32), 4),
            r"weight must be finite, got nan at channel 1, index 1",
        ),
        (lambda: kernels.quantize_per_channel(np.full((1, 1), -np.inf, np.float32), 4), r"weight must be finite"),
        (lambda: kernels.encode(np.zeros((2, 3), np.float32), np.ones(1, np.float32), 4), r"one scale a channel \(2\)"),
        (lambda: kernels.encode(np.zeros((1, 3), np.float32), np.zeros(1, np.float32), 4), r"scales must be positive"),
    ],
)
def test_bad_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_a_weight_that_is_not_contiguous_is_read_right() -> None:
    weight = np.random.default_rng(1).normal(size=(40, 6)).astype(np.float32)
    codes, scales = kernels.quantize_per_channel(weight.T, 5)
    again, same = kernels.quantize_per_channel(np.ascontiguousarray(weight.T), 5)
    np.testing.assert_array_equal(codes, again)
    np.testing.assert_array_equal(scales, same)


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("isa", kernels.isas())
def test_the_environment_forces_an_instruction_set(isa: str) -> None:
    done = run("from tightrope.compressors import kernels; print(kernels.isa())", TIGHTROPE_ISA=isa)
    assert done.stdout.strip() == isa, done.stderr


def test_an_unknown_instruction_set_is_an_error() -> None:
    done = run("from tightrope.compressors import kernels; kernels.isa()", TIGHTROPE_ISA="sse9")
    assert "TIGHTROPE_ISA must be portable, avx2, avxvnni, avx512 or amx, got 'sse9'" in done.stderr


def test_without_the_compiled_module_numpy_does_it_and_says_so_once() -> None:
    done = run(
        "import sys; sys.modules['tightrope.compressors._kernels'] = None\n"
        "import numpy as np\n"
        "from tightrope.compressors import kernels\n"
        "w = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)\n"
        "codes, scales = kernels.quantize_per_channel(w, 4)\n"
        "packed = kernels.pack_bits((codes.reshape(-1) + 8).astype(np.uint8), 4)\n"
        "assert (kernels.unpack_bits(packed, 4, 150).astype(int) - 8 == codes.reshape(-1)).all()\n"
        "print(kernels.isa(), kernels.isas())"
    )
    assert done.stdout.strip() == "numpy ()", done.stderr
    assert done.stderr.count("compiled kernels are missing") == 1


def test_importing_the_kernels_loads_no_torch() -> None:
    done = run("import sys, tightrope.compressors.kernels; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr
