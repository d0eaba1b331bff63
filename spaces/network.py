"""A model as plain data: its layers, the groups that tie their channels, and the operators around them.

A `Network` holds no tensor. Every size that pruning can change is an `Extent`, a linear form over the widths of
groups, so that shapes, MACs and bytes of any policy are arithmetic.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from tightrope.spaces.errors import NetworkError
from tightrope.spaces.fields import Fields, nearest

VERSION = 1
Kind = Literal["conv", "depthwise", "linear"]
Widths = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Extent:
    """A size that follows the widths of groups: `fixed + sum(repeat * width(group))`.

    The input of a linear layer behind a flattened 7x7 map of group `g` is `Extent(0, (("g", 49),))`; a concat of two
    groups has two terms.
    """

    fixed: int = 0
    terms: tuple[tuple[str, int], ...] = ()

    def at(self, widths: Widths) -> int:
        """The size at these widths."""
        return self.fixed + sum(repeat * widths[group] for group, repeat in self.terms)

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(group for group, _ in self.terms)

    def to_json(self) -> Any:
        return [self.fixed, dict(self.terms)] if self.terms else self.fixed

    @staticmethod
    def from_json(value: Any, where: str) -> "Extent":
        if isinstance(value, int) and not isinstance(value, bool):
            return Extent(value)
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], dict):
            whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (value[0], *value[1].values()))
            if whole and min(value[1].values(), default=1) > 0 <= value[0]:
                return Extent(value[0], tuple(value[1].items()))
        raise NetworkError(f"{where} must be a whole number or [fixed, {{group: repeat}}], got {value!r}")


@dataclass(frozen=True, slots=True)
class Layer:
    """One compressible operator: a convolution, a depthwise convolution or a linear layer.

    `in_size` and `out_size` are the spatial extents `(height, width)` of one example; a linear layer that is applied
    to tokens has `(1, tokens)`. `calls` counts how often a forward pass runs it. `activation` is the operator that a
    runtime fuses behind it (`relu`, `relu6`), if any. `frozen` is why its output channels cannot be pruned, or empty.
    """

    name: str
    kind: Kind
    inputs: Extent
    outputs: Extent
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    in_size: tuple[int, int] = (1, 1)
    out_size: tuple[int, int] = (1, 1)
    bias: bool = True
    calls: int = 1
    activation: str = ""
    frozen: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Channels that are pruned together or not at all; `width` is their count in the dense model.

    One channel of a group may be several of a layer (a head of an attention block): the layers' extents say how many.
    """

    name: str
    width: int


@dataclass(frozen=True, slots=True)
class Op:
    """One operator of the model's graph and the tensor it makes, at batch 1.

    `kind` is the operator's lower-case name (`conv2d`, `add`, `softmax`, ...) or `layer`, in which case `layer` names it;
    `inputs` are the names of the operators it reads, `input` among them for the model's own inputs. `bytes_per_item` is
    the item size of the tensor.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    shape: tuple[Extent, ...]
    layer: str = ""
    bytes_per_item: int = 4


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter or buffer outside the layers (a norm, an embedding): stored and exported at 32 bits."""

    name: str
    shape: tuple[Extent, ...]


@dataclass(frozen=True)
class Network:
    """All layers and groups of a model, in the order in which a forward pass meets them."""

    layers: tuple[Layer, ...]
    groups: tuple[Group, ...] = ()
    ops: tuple[Op, ...] = ()
    parameters: tuple[Parameter, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            raise NetworkError("a network needs at least one convolution or linear layer, got none")
        for what, names in (("layer", [x.name for x in self.layers]), ("group", [g.name for g in self.groups])):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise NetworkError(f"{what} names must differ, but {sorted(twice)} stand twice")
        known = self.widths
        for layer in self.layers:
            for group in (*layer.inputs.groups, *layer.outputs.groups):
                if group not in known:
                    raise NetworkError(f"layer {layer.name!r} names group {group!r}, which the network has not got")
            if min(layer.inputs.at(known), layer.outputs.at(known), *layer.kernel, *layer.out_size) < 1:
                raise NetworkError(f"every size of layer {layer.name!r} must be at least 1, got {layer}")

    @cached_property
    def widths(self) -> dict[str, int]:
        """The dense width of every group."""
        return {group.name: group.width for group in self.groups}

    @cached_property
    def by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    def layer(self, name: str) -> Layer:
        """The layer of this name; an unknown one is answered with the nearest."""
        if name not in self.by_name:
            raise NetworkError(f"the network has no layer {name!r}{nearest(name, self.by_name)}")
        return self.by_name[name]

    def writers(self, group: str) -> tuple[Layer, ...]:
        """Layers whose output channels belong to the group."""
        return tuple(layer for layer in self.layers if group in layer.outputs.groups)

    def readers(self, group: str) -> tuple[Layer, ...]:
        """Layers whose input channels belong to the group."""
        return tuple(layer for layer in self.layers if group in layer.inputs.groups)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that tell this network from any other."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "groups": {group.name: group.width for group in self.groups},
            "layers": [
                {
                    "name": x.name, "kind": x.kind, "inputs": x.inputs.to_json(), "outputs": x.outputs.to_json(),
                    "kernel": [*x.kernel], "stride": [*x.stride], "padding": [*x.padding], "dilation": [*x.dilation],
                    "groups": x.groups, "in_size": [*x.in_size], "out_size": [*x.out_size], "bias": x.bias,
                    "calls": x.calls, "activation": x.activation, "frozen": x.frozen,
                }
                for x in self.layers
            ],
            "ops": [
                {"name": o.name, "kind": o.kind, "inputs": [*o.inputs], "shape": [e.to_json() for e in o.shape],
                 "layer": o.layer, "bytes_per_item": o.bytes_per_item}
                for o in self.ops
            ],
            "parameters": [{"name": p.name, "shape": [e.to_json() for e in p.shape]} for p in self.parameters],
        }  # fmt: skip

    @staticmethod
    def from_json(value: object, where: str = "network") -> "Network":
        top = value if isinstance(value, Fields) else Fields(value, where)
        top.only("version", "groups", "layers", "ops", "parameters")
        top.version(VERSION)

        def extents(fields: Fields, key: str) -> tuple[Extent, ...]:
            return tuple(Extent.from_json(v, f"{fields.where}.{key}") for v in fields.take(key, list))

        layers = []
        for f in top.each("layers"):
            kind = f.take("kind", str)
            if kind not in ("conv", "depthwise", "linear"):
                raise NetworkError(f"{f.where}.kind must be conv, depthwise or linear, got {kind!r}")

            def pair(key: str, fields: Fields = f) -> tuple[int, int]:
                a, b = fields.ints(key, 2)
                return a, b

            layers.append(
                Layer(
                    f.take("name", str), kind, Extent.from_json(f.take("inputs", (int, list)), f.where + ".inputs"),
                    Extent.from_json(f.take("outputs", (int, list)), f.where + ".outputs"), pair("kernel"), pair("stride"),
                    pair("padding"), pair("dilation"), f.take("groups", int), pair("in_size"), pair("out_size"),
                    f.take("bias", bool), f.take("calls", int), f.take("activation", str), f.take("frozen", str),
                )
            )  # fmt: skip
        groups = []
        for name, width in top.items("groups"):
            if isinstance(width, bool) or not isinstance(width, int) or width < 1:
                raise NetworkError(f"{top.where}.groups.{name} must be a whole number of at least 1, got {width!r}")
            groups.append(Group(name, width))
        ops = tuple(
            Op(o.take("name", str), o.take("kind", str), tuple(o.take("inputs", list)), extents(o, "shape"),
               o.take("layer", str), o.take("bytes_per_item", int))
            for o in top.each("ops")
        )  # fmt: skip
        parameters = tuple(Parameter(p.take("name", str), extents(p, "shape")) for p in top.each("parameters"))
        return Network(tuple(layers), tuple(groups), ops, parameters)


def full_rank(layer: Layer, form: str, widths: Widths) -> int:
    """The rank at which a factorisation of `layer` in this form (`svd`, `spatial`, `tucker`) loses nothing."""
    inputs, outputs = layer.inputs.at(widths), layer.outputs.at(widths)
    if form == "spatial":
        return min(inputs * layer.kernel[0], outputs * layer.kernel[1])
    return max(inputs, outputs) if form == "tucker" else min(inputs, outputs)


def forms(layer: Layer) -> tuple[str, ...]:
    """The low-rank forms that a layer can take: `svd` for linear and 1x1, `spatial` and `tucker` for k x k."""
    if layer.groups > 1 or layer.kind == "depthwise":
        return ()
    return ("svd",) if math.prod(layer.kernel) == 1 else ("spatial", "tucker")
