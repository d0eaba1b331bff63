"""Even policies: the largest share of each precision, with layers at more bits where that costs less."""

from collections.abc import Sequence
from dataclasses import dataclass

from problems import Additive, residual_network

from tightrope.search.agent import Problem
from tightrope.search.agents.uniform import Even
from tightrope.spaces import Budget, Cost, Layer, Network, Policy, Score, Space


@dataclass(frozen=True)
class Runtime(Additive):
    """Integers take a quarter of the time, in the stem thirty times as long; each end of a run of them costs."""

    name: str = "runtime"

    def pairs(self, layer: Layer) -> Sequence[tuple[int, int]]:
        return [(8, 8), (32, 32)]

    def estimate(self, network: Network, policy: Policy) -> Cost:
        widths, integers, ms = policy.all_widths(network), False, 0.0
        for layer in network.layers:
            work = 1e-4 * layer.outputs.at(widths) * layer.inputs.at(widths)
            integer = policy.choice(layer.name).act_bits == 8
            ms += work * (30.0 if layer.name == "stem" else 0.25) if integer else work
            ms += 0.02 if integer != integers else 0.0
            integers = integer
        return Cost(ms, 1, 1, simulated=True, provenance=self.name)


def problem(budget: str) -> Problem:
    network, device = residual_network(), Runtime()
    space = Space.build(network, device.pairs, ranks=False)
    limits = Budget.parse(budget).resolve(device.estimate(network, space.dense), device.metrics, device.name)
    return Problem(space, device, limits, Score(99.0, 0.0, 1))


def test_a_layer_that_is_faster_in_floating_point_stays_there() -> None:
    given = problem("latency<=0.4x")
    policies = Even(given).policies
    assert all(given.limits.met(given.cost(p)) for p in policies)
    mixed = [p for p in policies if p.choice("a1").act_bits == 8]
    assert mixed and all(p.choice("stem").act_bits == 32 for p in mixed)
    whole = given.space.uniform(1.0, (8, 8))
    assert not given.limits.met(given.cost(whole)) and all(dict(p.widths) == {} for p in mixed)


def test_nothing_is_lifted_where_more_bits_cost_more() -> None:
    network, device = residual_network(), Additive()
    space = Space.build(network, device.pairs, ranks=False)
    limits = Budget.parse("latency<=0.4x").resolve(device.estimate(network, space.dense), device.metrics, device.name)
    for policy in Even(Problem(space, device, limits, Score(99.0, 0.0, 1))).policies:
        inner = {(policy.choice(x.name).weight_bits, policy.choice(x.name).act_bits) for x in network.layers[1:-1]}
        assert len(inner) == 1
