"""A model becomes a network: layers, groups and operators as plain data, and the skeleton that a policy is applied to."""

import logging
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from tightrope.compressors.capture import Inputs, arguments, at_least_two, base, capture
from tightrope.compressors.cut import assemble, cut_layer, kept_channels, resized
from tightrope.compressors.flow import Analysis
from tightrope.compressors.ties import Kept, Ties, resolve
from tightrope.spaces.errors import TraceError
from tightrope.spaces.network import Extent, Group, Layer, Network, Op, Parameter
from tightrope.spaces.points import written

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traced:
    """A traced model: its network as plain data, its skeleton (`capture.py`) and what is tied in it (`ties.py`).

    `example` are positional arguments of the skeleton, with a batch of at least two where the batch is free. `source` is what
    was traced: where this travels to, it is traced again, because what a graph knows of its nodes cannot be pickled.
    """

    network: Network
    skeleton: fx.GraphModule
    ties: Ties
    example: tuple[Any, ...]
    source: tuple[nn.Module, Inputs] = field(repr=False)

    def __reduce__(self) -> Any:
        return traced, self.source

    def layer(self, name: str) -> nn.Module:
        """The dense layer, batch norm folded in."""
        return self.skeleton.get_submodule(name)

    def everything(self) -> Kept:
        return {group.name: np.ones(group.width, bool) for group in self.network.groups}


def trace(model: nn.Module, example_inputs: Inputs) -> Network:
    """The network of any `nn.Module`; the model is left as it was.

    Args:
        model: it is traced in evaluation mode, for inference.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments; dimension 0 is the batch.

    Raises:
        TraceError: it cannot be traced, or has no convolution or linear layer; the message names what stopped it.
    """
    return traced(model, example_inputs).network


def traced(model: nn.Module, example_inputs: Inputs) -> Traced:
    """`trace` with all that a compressor needs besides the network."""
    skeleton = capture(model, example_inputs)
    args, kwargs = arguments(example_inputs)
    wide = at_least_two if skeleton.meta["batch"] is None else (lambda value: value)
    example = tuple(map(wide, [*args, *kwargs.values()]))
    batch = next((int(v.shape[0]) for v in example if isinstance(v, torch.Tensor) and v.dim()), 1)
    without: dict[str, str] = {}
    while True:
        analysis = Analysis(skeleton, example)
        if not analysis.outs:
            raise TraceError("the model has no convolution or linear layer that could be compressed")
        ties = resolve(analysis, batch, without)
        failed = _uncuttable(skeleton, ties, example)
        if not failed:
            network = _network(skeleton, analysis, ties, batch)
            for layer in network.layers:
                if layer.frozen and layer.name != network.layers[-1].name:
                    log.info("channels of %s are not pruned: %s", layer.name, layer.frozen)
            return Traced(network, skeleton, ties, example, (model, example_inputs))
        without |= failed


def _uncuttable(skeleton: fx.GraphModule, ties: Ties, example: tuple[Any, ...]) -> dict[str, str]:
    """Layers of groups that cannot be cut after all: all groups are cut at once, one by one only where that fails."""

    def attempt(groups: list[str]) -> str:
        kept = {g: np.arange(ties.groups[g]) % 2 == 0 if g in groups else np.ones(ties.groups[g], bool) for g in ties.groups}
        try:
            module = cut(skeleton, ties, kept)
            with torch.no_grad():
                run(module, example)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            return str(error).strip().splitlines()[0]
        return ""

    if not attempt(list(ties.groups)):
        return {}
    failed: dict[str, str] = {}
    for group in ties.groups:
        reason = attempt([group])
        if reason:
            failed |= {n: f"a cut fails: {reason}" for n, extent in ties.outputs.items() if group in extent.groups}
    if not failed:  # each can be cut alone but not all together: leave all out
        failed = {n: "cuts fail together" for n, extent in ties.outputs.items() if extent.terms}
    return failed


def run(module: nn.Module, example: tuple[Any, ...]) -> Any:
    """Call a skeleton with positional arguments, whatever names its inputs have."""
    if isinstance(module, fx.GraphModule):
        return fx.Interpreter(module).run(*example, enable_io_processing=False)
    return module(*example)


def cut(skeleton: fx.GraphModule, ties: Ties, kept: Kept) -> fx.GraphModule:
    """The skeleton with these channels only; nothing else is changed."""
    widths = {group: int(flags.sum()) for group, flags in kept.items()}
    layers = {name: cut_layer(skeleton.get_submodule(name), *kept_channels(ties, name, kept)) for name in ties.outputs}
    return assemble(skeleton, resized(skeleton, ties, widths), ties, kept, layers)


def _network(skeleton: fx.GraphModule, analysis: Analysis, ties: Ties, batch: int) -> Network:
    ops = tuple(_ops(skeleton, analysis, ties))
    calls: dict[str, list[fx.Node]] = {}
    for node in skeleton.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    groups = tuple(Group(name, width) for name, width in ties.groups.items())

    def layer(name: str, activation: str = "") -> Layer:
        return _layer(skeleton.get_submodule(name), name, calls[name], analysis, ties, activation, batch)

    bare = tuple(map(layer, calls))
    parameters = tuple(Parameter(n, shape) for n, shape in ties.parameters.items())
    parameters += tuple(
        Parameter(n, tuple(map(Extent, p.shape)))
        for n, p in skeleton.named_parameters()
        if n not in ties.parameters and n.rpartition(".")[0] not in calls
    )
    kinds = {op.name: op.kind for op in ops}
    behind = written(Network(bare, groups, ops))
    fused = {op.layer: kinds[behind[op.name]] for op in ops if op.kind == "layer" and behind[op.name] != op.name}
    layers = tuple(layer(name, fused.get(name, "")) for name in calls)
    return Network(layers, groups, ops, parameters)


def _layer(module: Any, name: str, nodes: list[fx.Node], analysis: Analysis, ties: Ties, activation: str, batch: int) -> Layer:
    before, after = analysis.record.shapes[nodes[0].args[0]], analysis.record.shapes[nodes[0]]  # type: ignore[index]
    calls = len(nodes)
    if isinstance(module, nn.Conv2d) and before[0] % batch == 0:
        calls *= before[0] // batch  # frames or windows that the model put into the batch
    common: dict[str, Any] = {
        "calls": calls,
        "bias": module.bias is not None,
        "activation": activation,
        "frozen": ties.frozen.get(name, ""),
    }
    if isinstance(module, nn.Linear):
        tokens = (1, max(1, prod(before[:-1]) // batch))
        return Layer(name, "linear", ties.inputs[name], ties.outputs[name], in_size=tokens, out_size=tokens, **common)
    depthwise = module.groups > 1 and module.groups == module.in_channels == module.out_channels
    return Layer(
        name, "depthwise" if depthwise else "conv", ties.inputs[name], ties.outputs[name], tuple(module.kernel_size),
        tuple(module.stride), tuple(module.padding), tuple(module.dilation), module.groups,
        (before[2], before[3]), (after[2], after[3]), **common,
    )  # fmt: skip


def input_names(skeleton: fx.GraphModule) -> dict[fx.Node, str]:
    """Names of the model's inputs as operators: `input` for the first, `input:NAME` for others."""
    nodes = [node for node in skeleton.graph.nodes if node.op == "placeholder"]
    return {node: f"input:{node.name}" if i else "input" for i, node in enumerate(nodes)}


def _ops(skeleton: fx.GraphModule, analysis: Analysis, ties: Ties) -> list[Op]:
    """The operators that an input reaches and that make a tensor, in the order of the graph."""
    ops, names = [], input_names(skeleton)
    for node in skeleton.graph.nodes:
        if node in analysis.record.shapes and (node in names or any(a in names for a in node.all_input_nodes)):
            names.setdefault(node, node.name)
            kind = "input" if node.op == "placeholder" else op_kind(node)
            inputs = tuple(names[a] for a in node.all_input_nodes if a in names)
            shape, item = ties.shapes[node.name], abs(analysis.record.items[node])
            ops.append(Op(names[node], kind, inputs, shape, str(node.target) if kind == "layer" else "", item))
        elif node.op == "call_function" and any(a in names for a in node.all_input_nodes):
            names.setdefault(node, names[next(a for a in node.all_input_nodes if a in names)])  # several tensors: a split
    return ops


def op_kind(node: fx.Node) -> str:
    """The operator's plain name; every spelling of ReLU and ReLU6 is `relu` or `relu6`."""
    name = base(node)
    limits = node.args[1:3] if len(node.args) > 2 else (node.kwargs.get("min"), node.kwargs.get("max"))
    if name in ("hardtanh", "clamp") and limits == (0, 6):
        return "relu6"
    if name in ("clamp", "clamp_min") and len(node.args) == 2 and node.args[1] == 0:
        return "relu"
    return name
