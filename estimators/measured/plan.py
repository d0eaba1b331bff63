"""What no policy changes about a network's graph in ONNX Runtime, read off its own optimised graphs once.

The skeleton's operators between layers are optimised by ONNX Runtime itself, with every layer an operator that it does not fuse:
once freely, and once with the tensor of every operator kept, which is what remains where a policy holds tensors
in between in 8 bits. Sizes are found at a few widths and kept as forms over the widths of groups.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from tightrope.estimators.measured.nodes import LETTERS, Wide
from tightrope.spaces.errors import DeviceError
from tightrope.spaces.network import Extent, Network

DOMAIN = "tightrope"
_OFF = ["ConvActivationFusion", "ConvAddActivationFusion", "ConvAddFusion", "ConvMulFusion", "NchwcTransformer", "NhwcTransformer"]
LEAST_PROBES, MOST_PROBES = 4, 8
_MANY = 64  # constants of whole numbers up to this length are kept with their values
Skeletons = Callable[[Mapping[str, int], int], onnx.ModelProto]


@dataclass(frozen=True)
class Constant:
    """A constant input: letter of its type, slots of its shape, and its values where they matter (slots, or text)."""

    letter: str
    shape: tuple[int, ...]
    values: tuple[int, ...] | str | None


@dataclass(frozen=True, eq=False)
class Op:
    """A node of an optimised graph. `inputs` are names of tensors, constants, or None for one left out."""

    kind: str
    attributes: tuple[tuple[str, Any], ...]
    inputs: tuple[str | Constant | None, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Region:
    """The nodes that make one tensor of the skeleton from others, `reads`; `inside` are tensors of operators merged away.

    `raw` is the skeleton's own operator where there is just one.
    """

    ops: tuple[Op, ...]
    reads: tuple[str, ...]
    inside: frozenset[str]
    raw: str


@dataclass(frozen=True)
class Call:
    """One call of a layer; `source` and `made` are tensors, `op` the operator of the network."""

    layer: str
    source: str
    made: str
    op: str


@dataclass
class Plan:
    """The graph between layers, in the order of the skeleton.

    `steps` are calls of layers and names of tensors that operators make, each with a region in `pinned` and, unless it is
    merged away, in `free`. `points` tell which tensor is which point, `shapes` every tensor's shape as slots, `slots` the sizes,
    `letters` every tensor's type.
    """

    batch: int
    steps: list[Call | str] = field(default_factory=list)
    free: dict[str, Region] = field(default_factory=dict)
    pinned: dict[str, Region] = field(default_factory=dict)
    points: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    letters: dict[str, str] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    slots: list[tuple[int, Extent]] = field(default_factory=list)

    def sizes(self, widths: Mapping[str, int]) -> list[int]:
        """The size of every slot at these widths."""
        return [
            Wide(factor * e.at(widths), ("width", factor, e.fixed, e.terms)) if e.terms else factor * e.fixed
            for factor, e in self.slots
        ]


def make(network: Network, skeletons: Skeletons, batch: int) -> Plan:
    """Derive the plan of a network from its skeletons.

    Raises:
        DeviceError: ONNX Runtime does not know an operator, or a size follows no sum of widths.
    """
    probes = _probes(network)
    sources = [skeletons(widths, batch) for widths in probes]
    plan = Plan(batch)
    alias, raw = _read(plan, sources[0], {p.name for p in network.parameters})
    plan.outputs = tuple(alias.get(o.name, o.name) for o in sources[0].graph.output)
    forms = _Forms(plan, network, probes)
    for pin in (False, True):
        graphs = [_optimised(_standard(s, network, w, pin)) for s, w in zip(sources, probes, strict=True)]
        shapes = [_shapes(g) for g in graphs]
        _regions(plan, forms, graphs, shapes, raw, plan.pinned if pin else plan.free)
    held = set(plan.pinned)
    plan.steps = [s for s in plan.steps if isinstance(s, Call) or s in held]
    return plan


def _probes(network: Network) -> list[dict[str, int]]:
    """Sets of small widths, until no two groups are alike in all; none is 1, where transposes would vanish."""
    rng = np.random.default_rng(0)
    found: list[dict[str, int]] = []
    while len(found) < LEAST_PROBES or (
        len(found) < MOST_PROBES and len({tuple(f[g] for f in found) for g in network.widths}) < len(network.widths)
    ):
        found.append({g: int(rng.integers(2, max(4, min(w, 24)) + 1)) for g, w in network.widths.items()})
    return found


def _name(node: onnx.NodeProto) -> str:
    return cast(str, next(a.s for a in node.attribute if a.name == "name").decode())


def _read(plan: Plan, model: onnx.ModelProto, parameters: set[str]) -> tuple[dict[str, str], dict[str, onnx.NodeProto]]:
    """Note calls, points and tensors; return what each point stands for, and each tensor's maker with points left out."""
    alias: dict[str, str] = {}
    raw: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:
        source = alias.get(node.input[0], node.input[0]) if node.input else ""
        if node.domain == DOMAIN and node.op_type == "Point":
            alias[node.output[0]] = source
            plan.points[source] = _name(node)
        elif node.domain == DOMAIN:
            plan.steps.append(Call(_name(node), source, node.output[0], ""))
        else:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            for i, name in enumerate(node.input):
                copy.input[i] = alias.get(name, name)
            for name in node.output:
                raw[name] = copy
                plan.steps.append(name)
    plan.steps = [
        Call(s.layer, s.source, s.made, plan.points.get(s.made, "")) if isinstance(s, Call) else s for s in plan.steps
    ]  # fmt: skip
    plan.inputs = tuple(i.name for i in model.graph.input if i.name not in parameters)
    return alias, raw


def _standard(model: onnx.ModelProto, network: Network, widths: Mapping[str, int], pin: bool) -> onnx.ModelProto:
    """The skeleton as ONNX Runtime can load it: points dropped, linear layers as Einsum, which nothing fuses with."""
    alias: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    constants = list(model.graph.initializer)
    for node in model.graph.node:
        inputs = [alias.get(name, name) for name in node.input]
        if node.domain == DOMAIN and node.op_type == "Point":
            alias[node.output[0]] = inputs[0]
            continue
        if node.domain == DOMAIN:
            layer = network.layer(_name(node))
            sizes = layer.inputs.at(widths), layer.outputs.at(widths)
            weight = f"weight of {layer.name}"
            if layer.kind == "linear":
                array = np.zeros(sizes[::-1], np.float32)
                made = helper.make_node("Einsum", [inputs[0], weight], node.output, equation="...k,nk->...n")
            else:
                groups = sizes[0] if layer.kind == "depthwise" else layer.groups
                array = np.zeros((sizes[1], sizes[0] // groups, *layer.kernel), np.float32)
                made = helper.make_node(
                    "Conv", [inputs[0], weight], node.output, strides=layer.stride, pads=[*layer.padding] * 2,
                    dilations=layer.dilation, group=groups, kernel_shape=layer.kernel,
                )  # fmt: skip
            if all(t.name != weight for t in constants):
                constants.append(numpy_helper.from_array(array, weight))
        else:
            made = onnx.NodeProto()
            made.CopyFrom(node)
            for i, name in enumerate(inputs):
                made.input[i] = name
        nodes.append(made)
    parameters = {p.name for p in network.parameters}
    given = [i for i in model.graph.input if i.name not in parameters]
    constants += [
        numpy_helper.from_array(np.ones([d.dim_value for d in i.type.tensor_type.shape.dim], np.float32), i.name)
        for i in model.graph.input
        if i.name in parameters
    ]
    names = [alias.get(o.name, o.name) for o in model.graph.output]
    if pin:
        made_here = {name for node in nodes for name in node.output}
        names = list(dict.fromkeys([*names, *(name for name in alias.values() if name in made_here)]))
    outputs = [onnx.ValueInfoProto(name=name) for name in names]
    graph = helper.make_graph(nodes, "plan", given, outputs, constants)
    opsets = [o for o in model.opset_import if o.domain != DOMAIN]
    return helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)


def _optimised(model: onnx.ModelProto) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(Path(folder) / "plan.onnx")
        try:
            onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=_OFF
            )
        except Exception as error:  # onnxruntime's errors share no base class of their own
            raise DeviceError(f"ONNX Runtime cannot run the network's graph: {error}") from error
        return onnx.load(options.optimized_model_filepath)


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every tensor of a graph, by running it."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    names = list(dict.fromkeys(name for node in model.graph.node for name in node.output if name))
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {i.name: np.zeros(i.shape, np.int64 if "int64" in i.type else np.float32) for i in session.get_inputs()}
    found = {name: (array.shape, array.dtype.name) for name, array in zip(names, session.run(names, feeds), strict=True)}
    return found | {name: (array.shape, array.dtype.name) for name, array in feeds.items()}


class _Forms:
    """Finds the slot of a size from the values that it takes at the probes."""

    def __init__(self, plan: Plan, network: Network, probes: Sequence[Mapping[str, int]]) -> None:
        self.plan = plan
        extents = [e for op in network.ops for e in op.shape]
        extents += [e for layer in network.layers for e in (layer.inputs, layer.outputs)]
        extents += [Extent(0, ((g.name, 1),)) for g in network.groups]
        self.known = {tuple(e.at(p) for p in probes): e for e in reversed(extents) if e.terms}
        self.found: dict[tuple[int, ...], int] = {}

    def slot(self, values: tuple[int, ...]) -> int:
        if values not in self.found:
            self.found[values] = len(self.plan.slots)
            self.plan.slots.append(self._form(values))
        return self.found[values]

    def _form(self, values: tuple[int, ...]) -> tuple[int, Extent]:
        if len(set(values)) == 1:
            return 1, Extent(values[0])
        for known, extent in self.known.items():
            factor = values[0] // known[0] if known[0] else 0
            if factor and all(factor * k == v for k, v in zip(known, values, strict=True)):
                return factor, extent
        raise DeviceError(
            f"a size of the network's graph, {values} at probed widths, follows no width of the network; report the model"
        )

    def shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(self.slot(values) for values in zip(*shapes, strict=True))


def _regions(
    plan: Plan, forms: _Forms, graphs: Sequence[onnx.ModelProto], shapes: Sequence[dict[str, tuple[tuple[int, ...], str]]],
    raw: Mapping[str, onnx.NodeProto], found: dict[str, Region],
) -> None:  # fmt: skip
    """Cut an optimised graph into the nodes that make each tensor of the skeleton."""
    constants = [{t.name: numpy_helper.to_array(t) for t in g.graph.initializer} for g in graphs]
    layers = {s.made for s in plan.steps if isinstance(s, Call)}
    made: dict[str, Op] = {}
    by_output = [{node.output[0]: node for node in g.graph.node} for g in graphs]
    for first in graphs[0].graph.node:
        nodes = [known.get(first.output[0], first) for known in by_output]
        if len({n.op_type for n in nodes}) > 1 or not all(first.output[0] in known for known in by_output):
            raise DeviceError(f"ONNX Runtime optimises the network differently at other widths (operator {nodes[0].output[0]!r})")
        if nodes[0].output[0] in layers:
            continue
        inputs = tuple(_input(forms, n, constants) for n in zip(*(node.input for node in nodes), strict=True))
        op = Op(
            (nodes[0].domain + ":" if nodes[0].domain else "") + nodes[0].op_type,
            _attributes(nodes[0]),
            inputs,
            tuple(nodes[0].output),
        )
        made |= dict.fromkeys(op.outputs, op)
    for name in shapes[0]:
        plan.shapes.setdefault(name, forms.shape([s[name][0] for s in shapes]))
        plan.letters.setdefault(name, LETTERS.get(shapes[0][name][1], "f"))
    stops = set(plan.points) | layers | set(plan.outputs)
    for name, op in made.items():
        if name not in stops or name in found:
            continue
        ops: list[Op] = []
        reads: dict[str, None] = {}

        def walk(op: Op, ops: list[Op] = ops, reads: dict[str, None] = reads) -> None:
            for given in op.inputs:
                if isinstance(given, str):
                    if given in stops or given not in made:
                        reads[given] = None
                    elif made[given] not in ops:
                        walk(made[given])
            if op not in ops:
                ops.append(op)

        walk(op)
        covered: list[onnx.NodeProto] = []
        waiting = [name]
        while waiting:
            node = raw.get(waiting.pop())
            if node is not None and not any(node is c for c in covered):
                covered.append(node)
                waiting += [i for i in node.input if i not in reads]
        inside = frozenset(o for node in covered for o in node.output if o in plan.points and o != name and o not in op.outputs)
        real = [n for n in covered if n.op_type != "Constant"]
        found[name] = Region(tuple(ops), tuple(reads), inside, real[0].op_type if len(real) == 1 else "")


def _input(forms: _Forms, names: Sequence[str], constants: Sequence[Mapping[str, np.ndarray]]) -> str | Constant | None:
    if not names[0]:
        return None
    if names[0] not in constants[0]:
        return names[0]
    arrays = [c[n] for c, n in zip(constants, names, strict=True)]
    first = arrays[0]
    letter = LETTERS.get(first.dtype.name)
    if letter is None:
        raise DeviceError(f"a constant of type {first.dtype} in the network's graph is not supported")
    values: tuple[int, ...] | str | None = None
    if first.dtype.kind in "iu" and first.size <= _MANY:
        values = tuple(forms.slot(tuple(int(v) for v in each)) for each in zip(*(a.ravel() for a in arrays), strict=True))
    elif first.size == 1:
        values = repr(float(first.item()))
    return Constant(letter, forms.shape([a.shape for a in arrays]), values)


def _attributes(node: onnx.NodeProto) -> tuple[tuple[str, Any], ...]:
    found = []
    for a in sorted(node.attribute, key=lambda a: a.name):
        value: Any = helper.get_attribute_value(a)
        if isinstance(value, bytes):
            value = value.decode()
        elif not isinstance(value, (int, float)):
            value = tuple(value)
        found.append((a.name, value))
    return tuple(found)
