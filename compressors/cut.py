"""Building a smaller skeleton: cut layers, cut parameters, and sizes in the graph's arguments that follow."""

import copy
import operator
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from tightrope.compressors.capture import place, tensor_of
from tightrope.compressors.ties import Kept, Ties

Index = NDArray[np.int64]


def kept_channels(ties: Ties, layer: str, kept: Kept) -> tuple[Index, Index]:
    """Output and input channels of a layer's weight that remain."""
    return ties.axes[layer, 0].keep(kept), ties.axes[layer, 1].keep(kept)


def cut_layer(module: nn.Module, outputs: Index, inputs: Index) -> nn.Module:
    """A copy of a convolution or linear layer with these channels only. `inputs` index one conv group."""
    source: Any = module
    weight = source.weight.detach()[torch.from_numpy(outputs)][:, torch.from_numpy(inputs)]
    bias = None if source.bias is None else source.bias.detach()[torch.from_numpy(outputs)]
    return build_layer(module, weight, bias)


def build_layer(like: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None, **changes: Any) -> nn.Module:
    """A layer with these tensors and the geometry of `like`, but for `changes` of stride, padding or dilation."""
    layer: nn.Linear | nn.Conv2d
    if isinstance(like, nn.Conv2d):
        depthwise = like.groups > 1 and like.groups == like.in_channels == like.out_channels
        groups = len(weight) if depthwise else like.groups
        geometry: dict[str, Any] = {"stride": like.stride, "padding": like.padding, "dilation": like.dilation, **changes}
        layer = nn.Conv2d(
            weight.shape[1] * groups,
            len(weight),
            (weight.shape[2], weight.shape[3]),
            groups=groups,
            bias=bias is not None,
            device="meta",
            **geometry,
        )
    else:
        layer = nn.Linear(weight.shape[1], len(weight), bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone().contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone().contiguous())
    return layer.train(like.training)


def cut_parameter(ties: Ties, name: str, value: torch.Tensor, kept: Kept) -> torch.Tensor:
    """A parameter outside of the layers with the channels that remain."""
    for dim in range(value.dim()):
        if (name, dim) in ties.axes:
            value = value.index_select(dim, torch.from_numpy(ties.axes[name, dim].keep(kept)))
    return value


def resized(skeleton: fx.GraphModule, ties: Ties, widths: Mapping[str, int]) -> fx.Graph:
    """A copy of the skeleton's graph whose arguments spell out the sizes at these widths."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of its own tree specs
        graph = copy.deepcopy(skeleton.graph)
    graph._tracer_cls = None  # the exporter's own needs arguments when a worker unpacks a module of this graph
    batch: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder" and batch is None:
            batch = node
        for rewrite in ties.rewrites.get(node.name, ()):
            size: Any = rewrite.extent.at(widths)
            if rewrite.per_example:
                assert batch is not None
                with graph.inserting_before(node):
                    size = graph.call_function(torch.ops.aten.sym_size.int, (batch, 0))
                    size = graph.call_function(operator.mul, (size, rewrite.extent.at(widths)))
            args = list(node.args)
            if len(rewrite.path) == 1:
                args[rewrite.path[0]] = size
            else:
                outer, inner = rewrite.path
                args[outer] = [*args[outer][:inner], size, *args[outer][inner + 1 :]]
            node.args = tuple(args)
    return graph


def assemble(skeleton: fx.GraphModule, graph: fx.Graph, ties: Ties, kept: Kept, layers: Mapping[str, nn.Module]) -> fx.GraphModule:
    """A module of this graph, with these layers and the skeleton's other tensors cut to the channels kept."""
    root = nn.Module()
    for node in graph.nodes:
        if node.op == "call_module":
            place(root, str(node.target), layers[str(node.target)])
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        path = str(node.target)
        value = tensor_of(skeleton, path)
        *parents, last = path.split(".")
        owner = root
        for name in parents:
            if not isinstance(getattr(owner, name, None), nn.Module):
                owner.add_module(name, nn.Module())
            owner = getattr(owner, name)
        if hasattr(owner, last):
            continue
        cut = cut_parameter(ties, path, value.detach(), kept).clone()
        if isinstance(value, nn.Parameter):
            owner.register_parameter(last, nn.Parameter(cut, requires_grad=value.requires_grad))
        else:
            owner.register_buffer(last, cut)
    module = fx.GraphModule(root, graph)
    module.meta.update(skeleton.meta)
    return module
