"""Units: the concrete operators that a policy lowers to, one layer or low-rank factor each."""

from dataclasses import dataclass, replace
from math import prod

from tightrope.spaces.network import Extent, Kind, Layer, Network
from tightrope.spaces.policy import Choice, Policy

PARTS = {"": 1, "svd": 2, "spatial": 2, "tucker": 3}
"""Units that a layer becomes in each low-rank form."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One layer, or one factor of a low-rank layer, at the sizes and bit-widths that a policy gives it.

    Channels are counted whole (all conv groups together). `first` and `last` mark the ends of the network. `part` counts the
    factors of one layer from 0. `calls` is how often one forward pass runs it.
    """

    layer: str
    kind: Kind
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    weight_bits: int
    act_bits: int
    bias: bool = True
    part: int = 0
    calls: int = 1
    first: bool = False
    last: bool = False

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.out_channels * (self.in_channels // self.groups) * prod(self.kernel)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all calls, for one example."""
        return self.weights * prod(self.out_size) * self.calls

    @property
    def size_bytes(self) -> int:
        """Bytes that the packed file holds for it.

        Weights at `weight_bits` each, rounded up to a whole byte; below 32 bits a float32 scale for each output channel and
        a float32 scale and zero point for its input; a float32 bias for each output channel where there is one.
        """
        size = -(-self.weights * self.weight_bits // 8) + (4 * self.out_channels if self.bias else 0)
        if self.weight_bits < 32:
            size += 4 * self.out_channels
        return size + (8 if self.act_bits < 32 else 0)


def units_of(layer: Layer, choice: Choice, widths: dict[str, int]) -> tuple[Unit, ...]:
    """The one to three units that a layer becomes."""
    inputs, outputs = layer.inputs.at(widths), layer.outputs.at(widths)
    groups = inputs if layer.kind == "depthwise" else layer.groups
    whole = Unit(
        layer.name, layer.kind, inputs, outputs, layer.kernel, layer.stride, layer.padding, layer.dilation, groups,
        layer.in_size, layer.out_size, choice.weight_bits, choice.act_bits, layer.bias, calls=layer.calls,
    )  # fmt: skip
    rank = choice.rank
    if rank is None:
        return (whole,)
    point = replace(whole, kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1))
    if choice.form == "svd":
        return (
            replace(point, out_channels=rank, stride=layer.stride, bias=False),
            replace(point, in_channels=rank, in_size=layer.out_size, part=1),
        )
    if choice.form == "spatial":  # k x 1 down the columns, then 1 x k along the rows
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = layer.kernel, layer.stride, layer.padding, layer.dilation
        middle = (layer.out_size[0], layer.in_size[1])
        return (
            replace(whole, out_channels=rank, kernel=(kh, 1), stride=(sh, 1), padding=(ph, 0), dilation=(dh, 1),
                    out_size=middle, bias=False),
            replace(whole, in_channels=rank, kernel=(1, kw), stride=(1, sw), padding=(0, pw), dilation=(1, dw),
                    in_size=middle, part=1),
        )  # fmt: skip
    inner, outer = min(rank, inputs), min(rank, outputs)
    return (
        replace(point, out_channels=inner, out_size=layer.in_size, bias=False),
        replace(whole, in_channels=inner, out_channels=outer, part=1, bias=False),
        replace(point, in_channels=outer, in_size=layer.out_size, part=2),
    )


def lower(network: Network, policy: Policy) -> tuple[Unit, ...]:
    """All units of a policy, in the order of the network's layers."""
    widths = policy.all_widths(network)
    units = [unit for layer in network.layers for unit in units_of(layer, policy.choice(layer.name), widths)]
    first, last = network.layers[0].name, network.layers[-1].name
    return tuple(
        replace(u, first=True) if u.layer == first and u.part == 0 else replace(u, last=True) if u.layer == last else u
        for u in units
    )


def macs(network: Network, policy: Policy) -> int:
    """Multiply-accumulates of one example."""
    return sum(unit.macs for unit in lower(network, policy))


def size_bytes(network: Network, policy: Policy) -> int:
    """Bytes of all tensors in the packed file that the policy exports to (`compressors/export/packed.py`)."""
    widths = policy.all_widths(network)
    rest = sum(4 * prod(extent.at(widths) for extent in p.shape) for p in network.parameters)
    return rest + sum(unit.size_bytes for unit in lower(network, policy))


def full(extent: Extent, network: Network) -> int:
    """An extent at the dense widths."""
    return extent.at(network.widths)
