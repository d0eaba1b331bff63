"""Cross-layer equalisation: channels are stretched in one layer and shrunk in the next, which changes nothing in between."""

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from tightrope.compressors.capture import base
from tightrope.compressors.ties import Axis
from tightrope.compressors.trace import Traced
from tightrope.spaces.points import MOVERS

HOMOGENEOUS = MOVERS | frozenset(
    "relu leaky_relu add sub cat concat stack mean sum avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices "
    "constant_pad_nd pad upsample_nearest2d upsample_bilinear2d".split()
)
"""Operators for which `f(s x) = s f(x)` with `s > 0`, where all they read is stretched alike. ReLU6, GELU and norms are not."""
ROUNDS = 20
TINY = 1e-9  # a range that is none: the channel stays as it is
Vector = NDArray[np.float64]


@dataclass
class _Span:
    """Tensors with nothing between them but homogeneous operators, and the layers that write and read them."""

    writers: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    open: bool = False  # something else writes or reads them too


def equalised(tracing: Traced) -> Traced:
    """The same function, its weights equalised.

    Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1: a channel that has
    range `r1` in the weights that write it and `r2` in those that read it is divided by `sqrt(r1 / r2)` in the first and
    multiplied by it in the second, until nothing changes. Only where all that lies between is positively homogeneous.
    """
    skeleton = copy.deepcopy(tracing.skeleton)
    spans = [span for span in _spans(tracing.skeleton) if _whole(span, tracing)]
    for _ in range(ROUNDS):
        if max((_equalise(span, skeleton, tracing) for span in spans), default=0.0) < 1e-2:
            break
    return replace(tracing, skeleton=skeleton)


def _spans(skeleton: fx.GraphModule) -> Iterator[_Span]:
    """All spans that are written and read by layers alone, each by one call of it."""
    nodes = [node for node in skeleton.graph.nodes if _holds_tensors(node)]
    parent: dict[fx.Node, fx.Node] = {node: node for node in nodes}

    def find(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    for node in nodes:
        if _passes(node):
            for source in filter(_holds_tensors, node.all_input_nodes):
                parent[find(source)] = find(node)
    calls = Counter(str(node.target) for node in nodes if node.op == "call_module")
    spans: dict[fx.Node, _Span] = defaultdict(_Span)
    for node in nodes:
        if _passes(node):
            continue
        name = str(node.target)
        once = node.op == "call_module" and calls[name] == 1
        written = spans[find(node)]
        written.writers += [name] * once
        written.open |= not once
        for source in filter(_holds_tensors, node.all_input_nodes):
            read = spans[find(source)]
            read.readers += [name] * once
            read.open |= not once
    return (span for span in spans.values() if not span.open and span.writers and span.readers)


def _holds_tensors(node: fx.Node) -> bool:
    """Whether a node is no size or other number."""
    return not isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def _passes(node: fx.Node) -> bool:
    """Whether an operator is homogeneous in the tensors that it reads; `x + 1` is not."""
    name = base(node)
    if name not in HOMOGENEOUS or node.op != "call_function":
        return False
    if name in ("add", "sub"):
        return all(isinstance(a, fx.Node) and _holds_tensors(a) for a in node.args[:2])
    return not (name in ("constant_pad_nd", "pad") and any(a for a in node.args[2:] if not isinstance(a, str)))


def _channels(tracing: Traced, layer: str, dim: int) -> Axis:
    """The channels that a layer writes (0) or reads (1); a depthwise one reads those that it writes."""
    depthwise = tracing.network.layer(layer).kind == "depthwise"
    return tracing.ties.axes[layer, 0 if depthwise else dim]


def _whole(span: _Span, tracing: Traced) -> bool:
    """Whether each channel that a span's layers write or read is known by its group."""
    layers = [tracing.network.layer(name) for name in span.readers]
    grouped = any(x.groups > 1 and x.kind != "depthwise" for x in layers)
    axes = [_channels(tracing, w, 0) for w in span.writers] + [_channels(tracing, r, 1) for r in span.readers]
    return not grouped and all((axis.group >= 0).all() for axis in axes)


def _equalise(span: _Span, skeleton: fx.GraphModule, tracing: Traced) -> float:
    """One pass over a span; the largest change, as the logarithm of a factor."""
    ranges: tuple[dict[int, Vector], dict[int, Vector]] = ({}, {})
    sides = [(0, name) for name in span.writers] + [(1, name) for name in span.readers]
    for side, name in sides:
        axis = _channels(tracing, name, side)
        widest = _weight(skeleton, tracing, name, side).detach().flatten(1).abs().amax(1).double().numpy()
        for group in np.unique(axis.group).tolist():
            own = axis.group == group
            known = ranges[side].setdefault(group, np.zeros(tracing.network.widths[axis.names[group]]))
            np.maximum.at(known, axis.channel[own], widest[own])
    factors = {}
    for group in ranges[0].keys() & ranges[1].keys():
        written, read = ranges[0][group], ranges[1][group]
        factors[group] = np.sqrt(np.maximum(written, TINY) / np.maximum(read, TINY))
        factors[group][(written <= TINY) | (read <= TINY)] = 1
    with torch.no_grad():
        for side, name in sides:
            axis = _channels(tracing, name, side)
            along = np.ones(len(axis.group))
            for group, factor in factors.items():
                own = axis.group == group
                along[own] = factor[axis.channel[own]]
            layer: Any = skeleton.get_submodule(name)
            weight, by = _weight(skeleton, tracing, name, side), torch.from_numpy(along).float()
            shaped = by.reshape(-1, *[1] * (weight.dim() - 1))
            if side:
                weight *= shaped
            else:
                weight /= shaped
                if layer.bias is not None:
                    layer.bias /= by
    return max((float(np.abs(np.log(f)).max()) for f in factors.values()), default=0.0)


def _weight(skeleton: fx.GraphModule, tracing: Traced, name: str, side: int) -> Tensor:
    """A view of a layer's weights, the channels that it writes (0) or reads (1) first."""
    layer: Any = skeleton.get_submodule(name)
    reads = side == 1 and tracing.network.layer(name).kind != "depthwise"
    weight: Tensor = layer.weight.transpose(0, 1) if reads else layer.weight
    return weight
