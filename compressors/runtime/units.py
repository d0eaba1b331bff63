"""The operators of a policy one by one, as a device times them: each a *family*, text that says all but some sizes, and those.

The text is like that of ONNX Runtime's nodes (`estimators/measured/nodes.py`): `QuantConv2d{k=3,3;...}(u:1,*,28,28;=s:*,*,3,3)->`
with `*` for a size that follows the policy, `f`, `u`, `s`, `l` and `b` for fp32, codes, weights, whole numbers and flags. A family
can be timed once a policy was lowered to it. How sizes follow a policy is told by forms, which are those of the same module.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch

from tightrope.compressors.payload import Part
from tightrope.compressors.runtime.build import layer_of
from tightrope.compressors.runtime.graph import Graph, Node, Ref, Size, function
from tightrope.compressors.runtime.lower import Lowering, Step
from tightrope.spaces.errors import DeviceError
from tightrope.spaces.network import Extent
from tightrope.spaces.policy import Policy
from tightrope.spaces.unit import Unit

Key = tuple[str, tuple[int, ...]]
Form = tuple[Any, ...]
Call = Callable[[], object]
X, Y = (0.05, 128), (0.1, 64)  # scales and zero points do not matter to time
SCALARS = frozenset({"sym_size", "mul", "add", "sub", "floordiv"})
_KINDS = {"u": torch.uint8, "l": torch.int64, "b": torch.bool}


@dataclass(frozen=True)
class Operator:
    """An operator that torch runs: its family and sizes, the forms of these, and the layer or node that it belongs to."""

    key: Key
    forms: tuple[Form, ...]
    owner: str


@dataclass(frozen=True)
class _Family:
    """A family's text, the sizes in it that follow the widths, and how a call is made at other sizes."""

    text: str
    slots: tuple[Extent, ...]
    make: Callable[[Iterator[int]], Call]


class Units:
    """`operators(policy)` are those of a policy at a batch size, `call(key)` is one of them alone."""

    def __init__(self, graph: Graph, batch: int, lowering: Lowering | None = None) -> None:
        self.graph, self.batch = graph, batch
        self.lowering = lowering or Lowering(graph)
        self._known: dict[Any, _Family | None] = {}
        self._made: dict[str, Callable[[Iterator[int]], Call]] = {}

    def operators(self, policy: Policy) -> list[Operator]:
        """The operators of a policy, in order; those that only count sizes are left out.

        Raises:
            DeviceError: an operator reads what is neither a tensor nor a size.
        """
        widths = policy.all_widths(self.graph.network)
        found: list[Operator] = []
        for step in self.lowering.lower(policy).steps:
            if step.kind == "part":
                assert step.unit is not None
                found.append(self._part(step, step.unit))
                continue
            key = (step.kind, step.node.name, bool(step.x))
            if key not in self._known:
                self._known[key] = self._operator(step) if step.kind == "op" else self._change(step)
            family = self._known[key]
            if family is not None:
                self._made.setdefault(family.text, family.make)
                sizes = tuple(slot.at(widths) for slot in family.slots)
                found.append(Operator((family.text, sizes), tuple(map(_form, family.slots)), step.node.name))
        return found

    def call(self, key: Key) -> Call:
        """One operator alone, on tensors of its own, ready to be called."""
        family, sizes = key
        return self._made[family](iter(sizes))

    # --- layers ---------------------------------------------------------------------------------------------------

    def _part(self, step: Step, unit: Unit) -> Operator:
        layer, coded = self.graph.network.layer(unit.layer), step.x != ""
        free = bool(layer.inputs.terms) or unit.part > 0, bool(layer.outputs.terms) or not step.final
        linear, depthwise = unit.kind == "linear", unit.kind == "depthwise"
        shape = self._shape(step.node)
        lead = [e.fixed for e in (shape[:-1] if linear else shape[:1])]
        each = 1 if depthwise else unit.in_channels // unit.groups
        spec = (
            (unit.groups, depthwise and free[0]), (unit.in_channels, free[0]), (unit.out_channels, free[1]),
            (each, free[0] and not depthwise),
        )  # fmt: skip
        reads = _form(layer.inputs) if unit.part == 0 else ("inner", layer.name, unit.part - 1)
        makes = _form(layer.outputs) if step.final else ("inner", layer.name, unit.part)
        forms = reads, reads, makes, ("share", reads, unit.groups)
        sizes = tuple(value for value, follows in spec if follows)
        group, inputs, outputs, inner = ("*" if follows else str(value) for value, follows in spec)
        before, read, made = ",".join(map(str, lead)), "u" if coded else "f", "u" if step.y else "f"
        if linear:
            name = f"QuantLinear{unit.weight_bits}" if coded else "Linear"
            text = f"{name}{{}}({read}:{before},{inputs};=s:{outputs},{inner})->{made}:{before},"
        else:
            pairs = {"k": unit.kernel, "s": unit.stride, "p": unit.padding, "d": unit.dilation}
            fixed = ";".join(f"{name}={a},{b}" for name, (a, b) in pairs.items())
            (height, width), (down, along) = unit.in_size, unit.kernel
            name = "QuantConv2d" if coded else "Conv2d"
            text = f"{name}{{{fixed};group={group}}}({read}:{before},{inputs},{height},{width};"
            text += f"=s:{outputs},{inner},{down},{along})"
            text += f"->{made}:{before},"
        if text not in self._made:

            def make(given: Iterator[int]) -> Call:
                groups, inputs, outputs, each = (next(given) if follows else value for value, follows in spec)
                like = replace(unit, in_channels=inputs, out_channels=outputs, groups=groups)
                return _layer_call(like, each, step, lead)

            self._made[text] = make
        told = tuple(form for form, (_, follows) in zip(forms, spec, strict=True) if follows)
        return Operator((text, sizes), told, unit.layer)

    # --- other operators ------------------------------------------------------------------------------------------

    def _tensor(self, node: Node, slots: list[Extent], letter: str = "") -> str:
        """The text of a tensor; its sizes that follow the widths are added to `slots`."""
        return f"{letter or node.item}:" + ",".join(_text(e, slots) for e in self._shape(node))

    def _shape(self, node: Node) -> list[Extent]:
        return [size.over(self.batch) for size in node.shape or ()]

    def _change(self, step: Step) -> _Family:
        """A step that quantises, decodes or lays out a tensor."""
        slots: list[Extent] = []
        letter = "u" if step.kind == "dequantize" else "f"
        given = self._tensor(step.node, slots, letter)
        images = len(step.node.shape or ()) == 4 and step.kind != "channels_last"

        def make(sizes: Iterator[int]) -> Call:
            x = _filled(given, sizes, images)
            operators = torch.ops.tightrope
            if step.kind == "quantize":
                return lambda: operators.quantize.default(x, *X)
            if step.kind == "dequantize":
                return lambda: operators.dequantize.default(x, *X)
            format_ = torch.channels_last if step.kind == "channels_last" else torch.contiguous_format
            return lambda: torch.ops.aten.contiguous.default(x, memory_format=format_)

        return _Family(f"{step.kind}{{}}({given})->", tuple(slots), make)

    def _operator(self, step: Step) -> _Family | None:
        node = step.node
        if node.base == "getitem" or (node.shape is None and node.base in SCALARS):
            return None
        slots: list[Extent] = []
        told: list[str] = []
        given: list[str] = []
        tensors: list[Node] = []

        def describe(value: Any) -> Any:
            """Arguments as data: sizes as the place of their slot, tensors as their number."""
            if isinstance(value, Ref):
                other = self.graph.by_name[value.node]
                if other.shape is None:
                    return describe(Size(self._scalar(other)))
                tensors.append(other)
                told.append(f"#{len(tensors) - 1}")
                return Ref(str(len(tensors) - 1))
            if isinstance(value, Size):
                extent = value.over(self.batch)
                told.append(_text(extent, slots))
                return Size(extent) if extent.terms else extent.fixed
            if isinstance(value, dict):
                made = {}
                for name, each in value.items():
                    told.append(name + "=")
                    made[name] = describe(each)
                return made
            if isinstance(value, tuple):
                told.append("[")
                items = tuple(describe(v) for v in value)
                told.append("]")
                return items
            told.append(str(value))
            return value

        arguments = describe((node.args, dict(node.kwargs)))
        for other in tensors:
            coded = step.x != "" and other.floating and not given
            given.append(self._tensor(other, slots, "u" if coded else ""))
        text = f"{node.target}{{{','.join(told).replace('}', ')')}}}({';'.join(given)})->"
        images = [len(t.shape or ()) == 4 for t in tensors]

        def make(sizes: Iterator[int]) -> Call:
            args, kwargs = _instance(arguments, sizes)
            made = [_filled(t, sizes, i) for t, i in zip(given, images, strict=True)]
            operator, args, kwargs = function(node.target), _placed(args, made), _placed(kwargs, made)
            return lambda: operator(*args, **kwargs)

        return _Family(text, tuple(slots), make)

    def _scalar(self, node: Node) -> Extent:
        """The value of a node that counts sizes."""
        values = []
        for value in node.args:
            other = self.graph.by_name[value.node] if isinstance(value, Ref) else None
            if other is not None and other.shape is None:
                values.append(self._scalar(other))
            elif other is None:
                values.append(value.extent if isinstance(value, Size) else Extent(int(value)))
        if node.base == "sym_size" and isinstance(node.args[0], Ref):
            return self._shape(self.graph.by_name[node.args[0].node])[values[-1].fixed]
        if node.base in SCALARS and all(not v.terms for v in values):
            return Extent(int(function(node.target)(*(v.fixed for v in values))))
        raise DeviceError(f"operator {node.name!r} must make a tensor or count sizes to be timed, but it is {node.target}")


def _form(extent: Extent) -> Form:
    return "width", 1, extent.fixed, extent.terms


def _text(extent: Extent, slots: list[Extent]) -> str:
    if extent.terms:
        slots.append(extent)
    return "*" if extent.terms else str(extent.fixed)


def _instance(value: Any, sizes: Iterator[int]) -> Any:
    """Arguments with their sizes filled in."""
    if isinstance(value, Size):
        return next(sizes)
    if isinstance(value, dict):
        return {k: _instance(v, sizes) for k, v in value.items()}
    return tuple(_instance(v, sizes) for v in value) if isinstance(value, tuple) else value


def _placed(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """Arguments with tensors in the place of their numbers."""
    if isinstance(value, Ref):
        return tensors[int(value.node)]
    if isinstance(value, dict):
        return {k: _placed(v, tensors) for k, v in value.items()}
    return [_placed(v, tensors) for v in value] if isinstance(value, tuple) else value


def _filled(text: str, sizes: Iterator[int], image: bool) -> torch.Tensor:
    """A tensor of this text: small values, or zeros where it is no floating point."""
    letter, dims = text.split(":")
    shape = [next(sizes) if d == "*" else int(d) for d in dims.split(",") if d]
    made = torch.rand(shape) if letter == "f" else torch.zeros(shape, dtype=_KINDS[letter])
    return made.contiguous(memory_format=torch.channels_last) if image else made


def _layer_call(unit: Unit, each: int, step: Step, lead: Sequence[int]) -> Call:
    """A layer's part with weights of no meaning; `each` are the inputs of a conv group, `lead` the sizes before the channels."""
    linear, bits = unit.kind == "linear", unit.weight_bits
    shape = (unit.out_channels, each) if linear else (unit.out_channels, each, *unit.kernel)
    weight, most = torch.randn(shape), 2 ** (bits - 1) - 1
    codes = None if bits == 32 else (weight * most / 3).clamp(-most, most).to(torch.int8).numpy()
    scales = None if bits == 32 else np.full(len(weight), 0.01, np.float32)
    part = Part(unit, (weight / 16).numpy(), np.zeros(len(weight), np.float32) if unit.bias else None, codes, scales)
    module = layer_of(part, X if step.x else None, Y if step.y else None, step.activation, prod(lead))
    x_shape = (*lead, unit.in_channels) if linear else (*lead, unit.in_channels, *unit.in_size)
    x = torch.randint(0, 256, x_shape, dtype=torch.uint8) if step.x else torch.rand(x_shape)
    if not linear:
        x = x.contiguous(memory_format=torch.channels_last)
    return lambda: module(x)
