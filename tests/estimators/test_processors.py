"""Rooflines and microcontrollers: hand-computed figures, published boards."""

from dataclasses import replace

import numpy as np
import pytest
from oracles import TINY, nets, uniform

from tightrope.estimators.analytic import load_profile
from tightrope.estimators.analytic.block import Block
from tightrope.estimators.analytic.mcu import Microcontroller
from tightrope.estimators.analytic.model import Traffic
from tightrope.estimators.analytic.roofline import Roofline
from tightrope.spaces.errors import DeviceError
from tightrope.spaces.unit import Unit

ROOF = Roofline(
    peak_gmacs={"32x32": 10, "8x8": 40}, mac_pj={"32x32": 4, "8x8": 1}, cache_bytes=10_000, cache_gb_s=100, dram_gb_s=1,
    launch_us=2,
    efficiency={"conv": 1.0, "pointwise": 0.5, "depthwise": 0.1, "linear": 1.0}, cache_pj_per_byte=1, dram_pj_per_byte=10,
)  # fmt: skip


def conv(weight_bits: int, act_bits: int, kernel: int = 3) -> Unit:
    size = (kernel, kernel)
    return Unit("x", "conv", 10, 20, size, (1, 1), (1, 1), (1, 1), 1, (10, 10), (10, 10), weight_bits, act_bits)


def test_a_unit_takes_the_longer_of_arithmetic_and_traffic_by_hand() -> None:
    figures = ROOF.cost(Block.of(conv(32, 32)), 1)
    macs, moved = 20 * 10 * 9 * 100, 4 * (1800 + 1000 + 2000)  # 19,200 bytes exceed the cache
    assert figures.compute_ms[0] == pytest.approx(macs / 10e6) == pytest.approx(18e-3)
    assert figures.stall_ms[0] == pytest.approx(moved / 1e6 - 18e-3)  # 19.2 us of traffic
    assert figures.overhead_ms[0] == pytest.approx(2e-3)
    assert figures.energy_mj[0] == pytest.approx((4 * macs + 10 * moved) * 1e-9)


def test_a_width_speeds_up_arithmetic_only_where_an_instruction_is() -> None:
    compute = {pair: ROOF.cost(Block.of(conv(*pair)), 1).compute_ms[0] for pair in ((32, 32), (4, 32), (8, 8), (4, 8), (2, 8))}
    assert compute[4, 32] == compute[32, 32] == 4 * compute[8, 8]
    assert compute[2, 8] == compute[4, 8] == compute[8, 8]
    int4 = replace(ROOF, peak_gmacs={**ROOF.peak_gmacs, "4x4": 80}, mac_pj={**ROOF.mac_pj, "4x4": 0.5})
    assert int4.cost(Block.of(conv(4, 4)), 1).compute_ms[0] == compute[8, 8] / 2
    assert (4, 4) in int4.pairs("conv") and (4, 4) not in ROOF.pairs("conv")
    assert int4.cost(Block.of(conv(4, 8)), 1).compute_ms[0] == compute[8, 8]


def test_pairs_are_those_that_an_instruction_can_hold() -> None:
    stored = [(bits, act) for bits in range(2, 9) for act in (8, 32)]
    assert ROOF.pairs("linear") == (*stored, (32, 32))


def test_an_operator_moves_its_bytes_and_is_launched() -> None:
    one = np.ones(2)
    figures = ROOF.operator(Traffic("elementwise", 4000 * one, np.array([2000.0, 20000.0]), 500 * one))
    assert figures.latency_ms == pytest.approx([6000 / 100e6 + 2e-3, 24000 / 1e6 + 2e-3])


@pytest.mark.parametrize(("field", "value"), [
    ("efficiency", {"conv": 1.0}), ("efficiency", {"conv": 2, "pointwise": 1, "depthwise": 1, "linear": 1}),
    ("mac_pj", {"8x8": 1}), ("peak_gmacs", {"32x32": 10, "8x8": 40, "fast": 3}),
])  # fmt: skip
def test_a_roofline_that_cannot_be_is_an_error(field: str, value: dict[str, float]) -> None:
    with pytest.raises(DeviceError):
        replace(ROOF, **{field: value})


@pytest.mark.parametrize("board", TINY)
@pytest.mark.parametrize("net", ["resnet8", "ds_cnn", "mobilenet_025", "autoencoder"])
def test_boards_of_mlperf_tiny(board: str, net: str) -> None:
    device, network = load_profile(board), nets()[net]
    cost = device.estimate(network, uniform(network, 8, 8))
    latency_ms, energy_mj = TINY[board][net]
    assert cost.latency_ms == pytest.approx(latency_ms, rel=0.25)
    assert cost.energy_mj == pytest.approx(energy_mj, rel=0.25)
    assert device.limits.met(cost)


def test_four_bits_save_flash_and_no_time_on_a_microcontroller() -> None:
    device, network = load_profile("cortex-m7"), nets()["resnet8"]
    eight, four = (device.estimate(network, uniform(network, bits, 8)) for bits in (8, 4))
    assert four.size_bytes < 0.6 * eight.size_bytes
    assert four.latency_ms > eight.latency_ms


def test_cycles_of_every_class_of_kernel_are_asked_for() -> None:
    model = load_profile("cortex-m7").model
    assert isinstance(model, Microcontroller)
    with pytest.raises(DeviceError, match="cycles_per_mac"):
        replace(model, cycles_per_mac={"conv": 1.0})
