"""Payloads with random weights for networks of any make: what the real compressor would hand to an exporter."""

import numpy as np

from tightrope.compressors.payload import Part, Payload
from tightrope.spaces.network import Network
from tightrope.spaces.points import MOVERS, points
from tightrope.spaces.policy import Policy
from tightrope.spaces.unit import units_of


def random_payload(network: Network, policy: Policy, seed: int = 0) -> Payload:
    """Weights scaled to keep values of order one, ranges of a few units."""
    rng = np.random.default_rng(seed)
    widths = policy.all_widths(network)
    ranges: dict[str, tuple[float, float]] = {}
    kinds = {op.name: op for op in network.ops}
    for name in ["input", *kinds]:
        low, high = {"relu": (0.0, 4.0), "relu6": (0.0, 6.0)}.get(kinds[name].kind if name in kinds else "", (-4.0, 4.5))
        if name in kinds and kinds[name].kind in MOVERS:
            low, high = ranges[kinds[name].inputs[0]]
        ranges[name] = (low, high)
    parts = {}
    for op in network.ops:
        if op.kind != "layer" or op.layer in parts:
            continue
        found = []
        for unit in units_of(network.layer(op.layer), policy.choice(op.layer), widths):
            fan = unit.in_channels // unit.groups * unit.kernel[0] * unit.kernel[1]
            shape = (unit.out_channels, unit.in_channels // unit.groups, *unit.kernel)
            weight = rng.normal(0, fan**-0.5, shape[:2] if unit.kind == "linear" else shape).astype(np.float32)
            bias = rng.normal(0, 0.1, unit.out_channels).astype(np.float32) if unit.bias else None
            codes = scales = None
            if unit.weight_bits < 32:
                most = 2 ** (unit.weight_bits - 1) - 1
                scales = (np.abs(weight.reshape(len(weight), -1)).max(1) / most).astype(np.float32)
                by = scales.reshape(-1, *[1] * (weight.ndim - 1))
                codes = np.clip(np.rint(weight / by), -most, most).astype(np.int8)
                weight = (codes * by).astype(np.float32)
            act = (ranges[op.inputs[0]] if unit.part == 0 else (-3.0, 3.0)) if unit.act_bits < 32 else None
            found.append(Part(unit, weight, bias, codes, scales, act))
        parts[op.layer] = tuple(found)
    held = points(network, policy)
    parameters = {p.name: rng.normal(1.0, 0.1, [e.at(widths) for e in p.shape]).astype(np.float32) for p in network.parameters}
    return Payload(policy, parts, {n: ranges[n] for n in held}, parameters)
