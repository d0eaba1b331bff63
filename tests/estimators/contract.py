"""What every device promises. A device's tests inherit `DeviceContract` and say how to make one."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from handmade import Handmade, mobilenet, resnet8, vit

from tightrope.estimators.device import Device
from tightrope.spaces import Choice, Cost, Network, Policy, Space
from tightrope.spaces.cost import METRICS
from tightrope.spaces.errors import DeviceError, PolicyError

NETS = {net.__name__: Handmade(net).network for net in (resnet8, mobilenet, vit)}
POLICIES: dict[tuple[str, str], list[Policy]] = {}


class DeviceContract:
    """Inherit, and give `make`; the nets and the policies are here. Override `networks` where a device costs fewer."""

    networks = tuple(NETS)

    def make(self, batch: int = 1) -> Device:
        """A device as a user gets it, at this batch size."""
        raise NotImplementedError

    @pytest.fixture
    def device(self) -> Device:
        return self.make()

    @pytest.fixture(params=[*NETS])
    def network(self, request: pytest.FixtureRequest) -> Network:
        if request.param not in self.networks:
            pytest.skip("the device does not cost this net")
        return NETS[request.param]

    @pytest.fixture
    def policies(self, device: Device, network: Network) -> list[Policy]:
        """The dense policy and twelve drawn from the space of the device."""
        key = device.name, network.fingerprint
        if key not in POLICIES:
            space, rng = Space.build(network, device.pairs), np.random.default_rng(7)
            POLICIES[key] = [space.dense, *(space.sample(rng) for _ in range(12))]
        return POLICIES[key]

    def test_costs_are_finite_and_above_zero(self, device: Device, network: Network, policies: list[Policy]) -> None:
        for cost in device.estimate_many(network, policies):
            for metric in METRICS:
                value = cost.metric(metric)
                assert value is not None or metric not in device.metrics
                assert value is None or (math.isfinite(value) and value > 0), metric

    def test_units_are_never_negative_and_add_up(self, device: Device, network: Network, policies: list[Policy]) -> None:
        for policy in policies[:4]:
            cost = device.estimate(network, policy)
            assert {u.layer for u in cost.units} >= {x.name for x in network.layers}
            for unit in cost.units:
                parts = [unit.compute_ms, unit.memory_ms, unit.stall_ms, unit.overhead_ms]
                assert unit.latency_ms >= 0 and all(p is None or p >= 0 for p in [*parts, unit.energy_mj])
                if None not in parts:
                    assert math.isclose(sum(p or 0 for p in parts), unit.latency_ms, rel_tol=1e-9, abs_tol=1e-12)
            if device.simulated:
                assert sum(u.latency_ms for u in cost.units) <= cost.latency_ms * (1 + 1e-9)

    def test_the_interval_holds_the_latency(self, device: Device, network: Network, policies: list[Policy]) -> None:
        cost = device.estimate(network, policies[0])
        assert cost.interval_ms is not None
        assert cost.interval_ms[0] <= cost.latency_ms <= cost.interval_ms[1]

    def test_provenance_names_the_device_and_says_simulated(self, device: Device, network: Network, policies: list[Policy]) -> None:
        cost = device.estimate(network, policies[0])
        assert device.name in cost.provenance
        assert cost.simulated == device.simulated == cost.provenance.startswith("simulated")

    def test_many_equal_one_by_one(self, device: Device, network: Network, policies: list[Policy]) -> None:
        many = device.estimate_many(network, policies)
        assert many == [device.estimate(network, policy) for policy in policies]
        assert device.estimate_many(network, []) == []

    def test_another_device_of_the_name_says_the_same(self, device: Device, network: Network, policies: list[Policy]) -> None:
        assert device.estimate_many(network, policies) == self.make().estimate_many(network, policies[::-1])[::-1]

    def test_costs_survive_json(self, device: Device, network: Network, policies: list[Policy]) -> None:
        cost = device.estimate(network, policies[1])
        assert Cost.from_json(json.loads(json.dumps(cost.to_json()))) == cost

    def test_fewer_bits_never_cost_more_bytes(self, device: Device, network: Network, policies: list[Policy]) -> None:
        dense = policies[0]
        for layer in network.layers[1:-1][:4]:
            pairs = sorted(device.pairs(layer))
            variants = [changed(network, dense, layer.name, pair) for pair in pairs]
            sizes = {pair: c.size_bytes for pair, c in zip(pairs, device.estimate_many(network, variants), strict=True)}
            ram = {p: c.peak_ram_bytes for p, c in zip(pairs, device.estimate_many(network, variants), strict=True)}
            for (w, a), (wider, bigger) in ((p, q) for p in pairs for q in pairs if p[0] <= q[0] and p[1] <= q[1]):
                assert a < bigger or sizes[w, a] <= sizes[wider, bigger]  # the file keeps a scale where activations are narrow
                if device.simulated:  # a runtime decodes between precisions, and integer kernels have workspaces
                    assert (ram[w, a] or 0) <= (ram[wider, bigger] or 0)

    def test_a_batch_costs_more_and_not_far_above_its_share(self, device: Device, network: Network, policies: list[Policy]) -> None:
        one, four = device.estimate(network, policies[0]), self.make(batch=4).estimate(network, policies[0])
        assert four.size_bytes == one.size_bytes
        assert four.macs == 4 * one.macs
        assert one.latency_ms < four.latency_ms <= 8 * one.latency_ms  # above 4: it may outgrow a cache
        if one.energy_mj is not None and four.energy_mj is not None:
            assert one.energy_mj < four.energy_mj

    def test_an_unknown_kind_of_layer_is_an_error(self, device: Device, network: Network) -> None:
        strange = replace(network.layers[0], kind="lstm")  # type: ignore[arg-type]
        with pytest.raises(DeviceError, match="lstm"):
            device.pairs(strange)
        other = Network((strange, *network.layers[1:]), network.groups, network.ops, network.parameters)
        with pytest.raises(DeviceError, match="lstm"):
            device.estimate(other, Policy.make(other))

    def test_an_unknown_operator_is_an_error(self, device: Device, network: Network, policies: list[Policy]) -> None:
        ops = (*network.ops[:-1], replace(network.ops[-2], name="odd", kind="fourier"), network.ops[-1])
        other = Network(network.layers, network.groups, ops, network.parameters)
        policy = Policy(other.fingerprint, policies[0].widths, policies[0].choices)
        with pytest.raises(DeviceError, match="fourier"):
            device.estimate_many(other, [policy])

    def test_bits_that_it_does_not_execute_are_an_error(self, device: Device, network: Network, policies: list[Policy]) -> None:
        layer = network.layers[1]
        foreign = next((w, a) for w in (2, 3, 8, 32) for a in (2, 3, 8, 32) if (w, a) not in set(device.pairs(layer)))
        with pytest.raises(DeviceError, match=layer.name):
            device.estimate(network, changed(network, policies[0], layer.name, foreign))

    def test_a_policy_of_another_network_is_an_error(self, device: Device, network: Network, policies: list[Policy]) -> None:
        stray = Policy("0" * 16, policies[0].widths, policies[0].choices)
        for ask in (lambda: device.estimate(network, stray), lambda: device.estimate_many(network, [policies[0], stray])):
            with pytest.raises(PolicyError, match="belongs to the model"):
                ask()


def changed(network: Network, policy: Policy, layer: str, pair: tuple[int, int]) -> Policy:
    """The policy with other bits at one layer."""
    choices = {x.name: policy.choice(x.name) for x in network.layers} | {layer: Choice(*pair)}
    return Policy.make(network, dict(policy.widths), choices)
