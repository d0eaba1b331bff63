"""The module that runs a payload in torch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from tightrope.compressors.capture import place
from tightrope.compressors.kernels.linear import QuantLinear
from tightrope.compressors.kernels.onednn import Int8Linear, QuantConv2d
from tightrope.compressors.payload import Part, Payload, affine
from tightrope.compressors.runtime.graph import Graph, Node, Ref, Size, function
from tightrope.compressors.runtime.lower import Lowering, Step
from tightrope.spaces.unit import Unit

aten = torch.ops.aten
MANY_ROWS, MANY_MACS = 64, 64 << 20  # from there on oneDNN's linear is faster than ours at 8 bits, by a tenth at 128x1024x1024


def executable(graph: Graph, payload: Payload, *, batch: int = 1, lowering: Lowering | None = None) -> fx.GraphModule:
    """The module that runs a payload: integer layers on the compiled kernels and oneDNN, everything else in plain torch.

    It takes the model's inputs and returns what the model returns, at any batch size where the model allows that, and gives what
    the module of `compress` gives but for rounding. For inference; it has no parameters to train.

    Args:
        batch: the batch size that it is built to be fast at.

    Raises:
        ExportError: the policy has bits that do not run in torch (`lower.py` says which do).
    """
    return _Builder(graph, payload, batch, lowering or Lowering(graph)).run()


class _Builder:
    def __init__(self, graph: Graph, payload: Payload, batch: int, lowering: Lowering) -> None:
        self.source, self.payload, self.batch = graph, payload, batch
        self.lowered = lowering.lower(payload.policy)
        self.widths = payload.policy.all_widths(graph.network)
        inner = {f"{name}.{p.unit.part}": p.act_range for name, parts in payload.parts.items() for p in parts if p.unit.part}
        self.ranges: dict[str, Any] = {**payload.ranges, **inner}
        self.root, self.graph = nn.Module(), fx.Graph()
        self.made: dict[str, fx.Node] = {}
        self.paths: dict[tuple[Any, ...], str] = {}
        self.rows: fx.Node | None = None

    def run(self) -> fx.GraphModule:
        steps = iter(self.lowered.steps)
        inputs = [node for node in self.source.nodes if node.kind == "input"]
        for node in inputs:
            self.made[node.name] = self.graph.placeholder(node.target)
        self.first = self.made[inputs[0].name]
        for node in self.source.nodes:
            if node.kind == "parameter":
                self.made[node.name] = self.parameter(node)
        for step in steps:
            self.made[step.makes] = self.step(step)
        (returned,) = self.source.nodes[-1].args
        self.graph.output(self.filled(returned, self.lowered.outputs))
        module = fx.GraphModule(self.root, self.graph)
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
        return module.eval().requires_grad_(False)

    def parameter(self, node: Node) -> fx.Node:
        *parents, last = node.target.split(".")
        owner = self.root
        for name in parents:
            if not isinstance(getattr(owner, name, None), nn.Module):
                owner.add_module(name, nn.Module())
            owner = getattr(owner, name)
        if last not in owner._buffers:
            known = self.payload.parameters.get(node.target)
            value = self.source.constants[node.target] if known is None else torch.from_numpy(known.copy())
            owner.register_buffer(last, value)
        return self.graph.get_attr(node.target)

    def step(self, step: Step) -> fx.Node:
        call = self.graph.call_function
        if step.kind == "op":
            args, kwargs = self.filled(step.node.args, step.reads), self.filled(dict(step.node.kwargs), step.reads)
            return call(function(step.node.target), tuple(args), kwargs)
        (key,) = step.reads.values()
        given = self.made[key]
        if step.kind == "part":
            return self.graph.call_module(self.module(step), (given,))
        if step.kind == "contiguous":
            return call(aten.contiguous.default, (given,))
        if step.kind == "channels_last":
            return call(aten.contiguous.default, (given,), {"memory_format": torch.channels_last})
        scale, zero = affine(*self.ranges[step.x or step.y])
        if step.kind == "dequantize":
            return call(torch.ops.tightrope.dequantize.default, (given, scale, zero))
        if step.activation and not implied(step.activation, scale, zero):
            given = call(function(step.node.target), (given, *step.node.args[1:]))
        return call(torch.ops.tightrope.quantize.default, (given, scale, zero))

    def filled(self, value: Any, reads: Mapping[str, str]) -> Any:
        """Arguments with nodes in the place of references, and sizes at these widths."""
        if isinstance(value, Ref):
            return self.made[reads[value.node]]
        if isinstance(value, Size):
            size = value.extent.at(self.widths)
            if not value.per_example:
                return size
            if self.rows is None:
                with self.graph.inserting_after(self.first):
                    self.rows = self.graph.call_function(aten.sym_size.int, (self.first, 0))
            return self.graph.call_function(function("mul"), (self.rows, size))
        if isinstance(value, dict):
            return {k: self.filled(v, reads) for k, v in value.items()}
        return [self.filled(v, reads) for v in value] if isinstance(value, tuple) else value

    def module(self, step: Step) -> str:
        """The path of the module that runs a part: a layer that is called on other codes is another module."""
        assert step.unit is not None
        key = (step.unit.layer, step.unit.part, step.x, step.y, step.activation)
        if key not in self.paths:
            parts = self.payload.parts[step.unit.layer]
            path = step.unit.layer + (f".{step.unit.part}" if len(parts) > 1 else "")
            path += f"_call{len(self.paths)}" if path in self.paths.values() else ""
            self.paths[key] = path
            ranges = [affine(*self.ranges[name]) if name else None for name in (step.x, step.y)]
            rows = self.batch * step.unit.out_size[0] * step.unit.out_size[1]
            place(self.root, path, layer_of(parts[step.unit.part], ranges[0], ranges[1], step.activation, rows))
        return self.paths[key]


def implied(activation: str, scale: float, zero: int) -> bool:
    """Whether codes of this step stand for nothing that the activation cuts off."""
    return zero == 0 and (activation == "relu" or 255 * scale <= 6 * (1 + 1e-6))


def layer_of(
    part: Part, x: tuple[float, int] | None, y: tuple[float, int] | None, activation: str = "", rows: int = 1
) -> nn.Module:
    """The module that runs one part of a layer.

    Args:
        x, y: scale and zero point of the codes that it reads and writes; None for floating point.
        rows: that a linear layer is called with at once.
    """
    unit = part.unit
    bias = None if part.bias is None else torch.from_numpy(part.bias.copy())
    if part.codes is None or part.scales is None or x is None:
        return _floating(unit, torch.from_numpy(np.ascontiguousarray(part.weight)), bias)
    codes = torch.from_numpy((part.codes.astype(np.int16) + 2 ** (unit.weight_bits - 1)).astype(np.uint8))
    scales = torch.from_numpy(part.scales.astype(np.float32))
    steps: dict[str, Any] = {"x_scale": x[0], "x_zero": x[1]}
    if y is not None:
        steps |= {"y_scale": y[0], "y_zero": y[1]}
    act = "none" if not activation or (y is not None and implied(activation, *y)) else activation
    if unit.kind != "linear":
        return QuantConv2d.from_codes(
            codes, scales, bias, bits=unit.weight_bits, stride=unit.stride, padding=unit.padding, dilation=unit.dilation,
            groups=unit.groups, size=unit.in_size, activation=act, **steps,
        )  # fmt: skip
    if unit.weight_bits == 8 and rows >= MANY_ROWS and rows * codes.numel() >= MANY_MACS:
        return Int8Linear.from_codes(codes, scales, bias, activation=act, **steps)
    return QuantLinear.from_codes(codes, scales[:, None], None, bias, bits=unit.weight_bits, activation=act, **steps)


def _floating(unit: Unit, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    layer: nn.Linear | nn.Conv2d
    if unit.kind == "linear":
        layer = nn.Linear(unit.in_channels, unit.out_channels, bias is not None, device="meta")
    else:
        layer = nn.Conv2d(
            unit.in_channels, unit.out_channels, unit.kernel, unit.stride, unit.padding, unit.dilation, unit.groups,
            bias is not None, device="meta",
        )  # fmt: skip
        weight = weight.contiguous(memory_format=torch.channels_last)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer.eval()
