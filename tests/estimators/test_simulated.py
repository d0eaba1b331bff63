"""All simulated devices keep the contract, and the devices made of profiles behave as their notes say."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from contract import NETS, DeviceContract

from tightrope.estimators.analytic import load_profile, profiles
from tightrope.estimators.analytic.simulated import Simulated
from tightrope.spaces import Extent, Layer, Network, Op, Policy, Space
from tightrope.spaces.errors import DeviceError
from tightrope.spaces.unit import lower, macs, size_bytes

device = lru_cache(load_profile)


@pytest.mark.parametrize("name", profiles(), scope="class")
class TestEveryProfile(DeviceContract):
    @pytest.fixture(autouse=True)
    def _named(self, name: str) -> None:
        self.name = name

    def make(self, batch: int = 1) -> Simulated:
        return load_profile(self.name, batch=batch)

    @pytest.fixture
    def device(self) -> Simulated:
        return device(self.name)

    def test_says_that_it_is_simulated(self, device: Simulated) -> None:
        assert "simulated" in device.notes[0]
        assert device.profile.calibrated == (not any("uncalibrated" in note for note in device.notes))

    def test_macs_and_bytes_are_those_of_the_spaces(self, device: Simulated, network: Network, policies: list[Policy]) -> None:
        for policy, cost in zip(policies, device.estimate_many(network, policies), strict=True):
            assert cost.macs == macs(network, policy)
            assert cost.size_bytes == size_bytes(network, policy)
            layers = [u.layer for u in device.estimate(network, policy).units if u.layer]
            assert layers == [u.layer for u in lower(network, policy)]


def test_the_profiles_are_those_of_the_issue() -> None:
    wanted = {"bitfusion", "bitserial", "systolic-ws", "systolic-os", "systolic-is", "eyeriss-like", "edge-tpu-like", "edge-tpu"}
    assert wanted | {"cortex-m4", "cortex-m7"} <= set(profiles())


def test_products_of_activations_are_costed_on_the_array() -> None:
    device, network = load_profile("bitfusion"), NETS["vit"]
    units = device.estimate(network, Space.build(network, device.pairs).dense).units
    found = [u for u in units if u.kind == "matmul"]
    assert [u.name for u in found] == ["qk0", "mix0", "qk1", "mix1"]
    assert all(u.latency_ms > 0 for u in found)


def test_half_the_heads_take_half_the_products() -> None:
    device, network = load_profile("systolic-ws"), NETS["vit"]
    dense = Space.build(network, device.pairs).dense
    half = Policy.make(network, {"heads0": 2}, {x.name: dense.choice(x.name) for x in network.layers})
    whole, pruned = ({u.name: u.latency_ms for u in device.estimate(network, p).units} for p in (dense, half))
    assert pruned["qk0"] == whole["qk0"] / 2 and pruned["qk1"] == whole["qk1"]


def test_what_is_left_out_is_said() -> None:
    network = NETS["resnet8"]
    cost = load_profile("bitfusion").estimate(network, Space.build(network, load_profile("bitfusion").pairs).dense)
    assert "operators not costed: add x3" in cost.provenance
    roofline = load_profile("cpu-avx512-vnni")
    assert "not costed" not in roofline.estimate(network, Space.build(network, roofline.pairs).dense).provenance


def test_the_residual_additions_are_costed_where_the_model_knows_them() -> None:
    network, device = NETS["resnet8"], load_profile("cortex-m7")
    units = device.estimate(network, Space.build(network, device.pairs).dense).units
    assert {u.kind for u in units if not u.layer} >= {"add"}


def test_depthwise_costs_a_small_convolution_a_group_on_bitfusion() -> None:
    def only(**changes: object) -> float:
        layer = Layer("x", "conv", Extent(16), Extent(16), (3, 3), (1, 1), (1, 1), in_size=(8, 8), out_size=(8, 8))
        network = Network((layer, replace(layer, name="y", **changes)))  # type: ignore[arg-type]
        device = load_profile("bitfusion")
        return device.estimate(network, Space.build(network, device.pairs).dense).units[1].latency_ms

    single = only(inputs=Extent(1), outputs=Extent(1))
    assert only(kind="depthwise", groups=16) == pytest.approx(16 * single)
    assert only(groups=4) == pytest.approx(4 * only(inputs=Extent(4), outputs=Extent(4)))


def test_a_policy_beyond_flash_or_ram_is_costed_and_said_not_to_fit() -> None:
    wide = Layer("wide", "linear", Extent(4000), Extent(700))
    network = Network((wide, Layer("out", "linear", Extent(700), Extent(10))))
    device = load_profile("cortex-m4")
    cost = device.estimate(network, Space.build(network, device.pairs).dense)
    assert cost.size_bytes > 2097152 and not device.limits.met(cost)
    assert "does not fit: size_bytes" in cost.provenance
    small = NETS["resnet8"]
    fits = device.estimate(small, Space.build(small, device.pairs).dense)
    assert device.limits.met(fits) and "does not fit" not in fits.provenance


def test_weights_beyond_the_chip_of_the_edge_tpu_are_a_cliff() -> None:
    def latency(width: int) -> tuple[float, int]:
        layers = [Layer("a", "linear", Extent(2048), Extent(width)), Layer("b", "linear", Extent(width), Extent(2048))]
        network, device = Network(tuple(layers)), load_profile("edge-tpu")
        cost = device.estimate(network, Space.build(network, device.pairs).dense)
        return cost.latency_ms, cost.size_bytes

    (below, size), (above, larger) = latency(2000), latency(2080)
    assert size < 8388608 < larger
    assert above / below > 3  # 4 % more weights


def test_an_operator_without_shapes_for_its_product_is_an_error() -> None:
    layer = Layer("a", "linear", Extent(4), Extent(4))
    ops = (Op("a", "layer", ("input",), (Extent(1), Extent(4)), "a"), Op("m", "matmul", ("a", "b"), (Extent(4),)))
    device = load_profile("bitfusion")
    with pytest.raises(DeviceError, match="'m'"):
        device.estimate(Network((layer,), (), ops), Policy.make(Network((layer,), (), ops)))


def test_a_batch_below_one_is_an_error() -> None:
    with pytest.raises(DeviceError, match="batch"):
        load_profile("bitfusion", batch=0)


def test_a_full_memory_of_variants_starts_over(monkeypatch: pytest.MonkeyPatch) -> None:
    network, fresh = NETS["resnet8"], load_profile("tpu-like")
    space, rng = Space.build(network, fresh.pairs), np.random.default_rng(3)
    policies = [space.sample(rng) for _ in range(60)]
    whole = fresh.estimate_many(network, policies)
    monkeypatch.setattr("tightrope.estimators.analytic.table._MOST", 5)
    again = load_profile("tpu-like")
    assert [again.estimate(network, policy) for policy in policies] == whole
