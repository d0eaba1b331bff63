"""The ONNX graph of a model without its layers' weights, at any widths and batch size.

Each layer is one opaque node `tightrope.Layer(x) <name>`, and behind the input and every operator that an input reaches stands
an identity `tightrope.Point(x) <name>`, so that the exporter cannot fold over the places where a policy changes the graph.
Parameters outside of the layers are graph inputs.

`torch.onnx.export` takes a second or two, which is too slow for a trial. So the graph is exported a few times at widths
and batches chosen so that every size tells which group it follows; after that any size is filled in within a millisecond.
"""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import fx, nn

from tightrope.compressors.capture import tensor_of
from tightrope.compressors.cut import resized
from tightrope.compressors.prepare import Prepared
from tightrope.compressors.trace import Traced, input_names
from tightrope.spaces.errors import ExportError
from tightrope.spaces.network import Extent

log = logging.getLogger(__name__)
OPSET = 20
DOMAIN = "tightrope"
MOST_PROBES = 6
BATCHES = (2, 7, 5, 3, 11, 13)
"""Of the probes. The second batch grows by more than any group shrinks, so that no product of the two stands still."""
Path = tuple[Any, ...]
Form = tuple[int, int, Extent]  # factor * batch ** power * extent
Learnt = tuple[onnx.ModelProto, list[tuple[Path, Form]]]


def layer_call(x: torch.Tensor, name: str, tail: tuple[int, ...], lead: int) -> torch.Tensor:
    """Stands for a layer in the exported graph; its output has the first `lead` sizes of `x`, then `tail`."""
    shape = [*x.shape[:lead], *tail]
    made: torch.Tensor = torch.onnx.ops.symbolic(f"{DOMAIN}::Layer", [x], {"name": name}, dtype=x.dtype, shape=shape, version=1)
    return made


def point_call(x: torch.Tensor, name: str) -> torch.Tensor:
    """Marks the tensor of an operator in the exported graph."""
    made: torch.Tensor = torch.onnx.ops.symbolic(f"{DOMAIN}::Point", [x], {"name": name}, dtype=x.dtype, shape=x.shape, version=1)
    return made


class Skeleton:
    """`at(widths, batch)` gives the graph; see the module's own words."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self._learnt: dict[int, Learnt | None] = {}  # by batch; 0: for any

    def __getstate__(self) -> dict[str, Any]:
        """What was learnt travels to workers as bytes; the traced model stays behind, unless it is needed for every graph."""
        learnt = {b: v and (v[0].SerializeToString(), v[1]) for b, v in self._learnt.items()}
        return {"traced": self.traced if not any(learnt.values()) else None, "_learnt": learnt}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.traced = state["traced"]
        self._learnt = {b: v and (onnx.ModelProto.FromString(v[0]), v[1]) for b, v in state["_learnt"].items()}

    def at(self, widths: Mapping[str, int], batch: int = 1) -> onnx.ModelProto:
        """The graph at these widths, with static shapes throughout.

        Raises:
            ExportError: the exporter does not know an operator, which the message names.
        """
        learnt = self._learn(0) or self._learn(batch)
        if learnt is None:
            return self._export(widths, batch)
        model = onnx.ModelProto()
        model.CopyFrom(learnt[0])
        for path, (factor, power, extent) in learnt[1]:
            _put(model, path, factor * batch**power * extent.at(widths))
        return model

    @property
    def any_batch(self) -> bool:
        """Whether one learnt graph serves all batch sizes."""
        return self._learn(0) is not None

    def _learn(self, batch: int) -> Learnt | None:
        """Export at a few widths (and batches, for batch 0), and find for every size the form that it follows."""
        if batch not in self._learnt:
            self._learnt[batch] = self._find(batch)
        return self._learnt[batch]

    def _find(self, batch: int) -> Learnt | None:
        fixed = batch or self.traced.skeleton.meta["batch"]
        points = _probes(self.traced.network.widths)
        batches = [fixed] * len(points) if fixed else [*BATCHES[: len(points)]]
        first = self._export(points[0], batches[0])
        models = [first, *(self._export(w, b) for w, b in zip(points[1:], batches[1:], strict=True))]
        slots = [dict(_sizes(m)) for m in models]
        nodes = [[(n.op_type, list(n.input), list(n.output)) for n in m.graph.node] for m in models]
        if any(s.keys() != slots[0].keys() for s in slots) or any(n != nodes[0] for n in nodes):
            log.info("the exported graph changes its form with the %s", "widths" if fixed else "batch")
            return None
        if not _constants_agree(models):
            log.info("constants of the exported graph change with the %s", "widths" if fixed else "batch")
            return None
        forms = _Forms(self.traced, points, batches)
        found = []
        for path in slots[0]:
            values = tuple(s[path] for s in slots)
            if len(set(values)) > 1:
                form = forms.of(values)
                if form is None:
                    log.info("size %s of the exported graph follows neither a group nor the batch", path)
                    return None
                found.append((path, form))
        return first, found

    def _export(self, widths: Mapping[str, int], batch: int) -> onnx.ModelProto:
        traced = self.traced
        graph = resized(traced.skeleton, traced.ties, widths)
        graph.set_codegen(fx.graph.CodeGen())
        names = {node.name: name for node, name in input_names(traced.skeleton).items()}
        ops = {op.name: op for op in traced.network.ops}
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        lifted = _lift_parameters(graph, traced, inputs[-1])
        for node in list(graph.nodes):
            if node.op == "call_module":
                module, tail = traced.layer(str(node.target)), [e.at(widths) for e in ops[node.name].shape]
                lead = 1 if isinstance(module, nn.Conv2d) else len(tail) - 1
                node.op, node.args = "call_function", (node.args[0], str(node.target), tuple(tail[lead:]), lead)
                node.target = layer_call
        floats = {n.name for n in traced.skeleton.graph.nodes if _is_float(n, traced)}
        for node in list(graph.nodes):
            name = names.get(node.name, node.name)
            if name in ops and node.name in floats and node.name not in lifted:
                with graph.inserting_after(node):
                    point = graph.call_function(point_call, (node, name))
                node.replace_all_uses_with(point, delete_user_cb=lambda user, point=point: user is not point)
        for node in graph.nodes:
            if node.op == "output":
                flat = [a for a in torch.utils._pytree.tree_leaves(node.args) if isinstance(a, fx.Node)]
                node.args = (tuple(flat),)
        root = nn.Module()
        for node in graph.nodes:
            if node.op == "get_attr":
                root.register_buffer(str(node.target).replace(".", "_"), tensor_of(traced.skeleton, str(node.target)).detach())
                node.target = str(node.target).replace(".", "_")
        module = fx.GraphModule(root, graph)
        values = [_at_batch(value, batch) for value in traced.example]
        shapes = {p.name: [e.at(widths) for e in p.shape] for p in traced.network.parameters}
        values += [torch.zeros(shapes[name]) for name in lifted.values()]
        model = _to_onnx(module, tuple(values))
        tensors = sum(isinstance(value, torch.Tensor) for value in values) - len(lifted)
        renamed = dict(zip([i.name for i in model.graph.input][tensors:], lifted.values(), strict=True))
        return _rename(model, renamed)


def skeleton_of(prepared: Prepared) -> Skeleton:
    """The skeleton of a prepared model, made once."""
    if prepared.skeleton is None:
        if prepared.traced is None:
            raise ExportError("these prepared arrays carry no graph; prepare the model again to export it")
        prepared.skeleton = Skeleton(prepared.traced)
    found: Skeleton = prepared.skeleton
    return found


def _constants_agree(models: Sequence[onnx.ModelProto]) -> bool:
    """Whether every floating-point constant has the same values in all graphs; one that changes its shape must be uniform."""
    for tensors in zip(*(m.graph.initializer for m in models), strict=True):
        if tensors[0].data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL):
            continue
        arrays = [numpy_helper.to_array(t) for t in tensors]
        if any(a.shape != arrays[0].shape for a in arrays):
            if any((a != arrays[0].reshape(-1)[0]).any() for a in arrays):
                return False
        elif any(not np.array_equal(a, arrays[0]) for a in arrays):
            return False
    return True


def _is_float(node: fx.Node, traced: Traced) -> bool:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return value.is_floating_point()
    return node.op == "call_module" or node.name in traced.ties.shapes


def _lift_parameters(graph: fx.Graph, traced: Traced, last: fx.Node) -> dict[str, str]:
    """Make graph inputs of parameters outside of the layers; node names to parameter names."""
    known = {p.name for p in traced.network.parameters}
    made: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target) in known:
            if str(node.target) not in made:
                with graph.inserting_after(last):
                    last = made[str(node.target)] = graph.placeholder("parameter_" + str(node.target).replace(".", "_"))
            node.replace_all_uses_with(made[str(node.target)])
            graph.erase_node(node)
    return {node.name: name for name, node in made.items()}


def _at_batch(value: Any, batch: int) -> Any:
    if not isinstance(value, torch.Tensor) or not value.dim():
        return value
    return value.repeat(math.ceil(batch / len(value)), *[1] * (value.dim() - 1))[:batch].clone()


def _to_onnx(module: fx.GraphModule, values: tuple[Any, ...]) -> onnx.ModelProto:
    loud = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loud]
    try:
        for logger in loud:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, values, strict=False)
            made = torch.onnx.export(program, dynamo=True, verbose=False, optimize=True, opset_version=OPSET)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if "Error" in line or "No ONNX" in line] or str(error).splitlines()
        raise ExportError(f"the model cannot be exported to ONNX: {(lines or ['no reason given'])[0].strip()[:300]}") from error
    finally:
        for logger, level in zip(loud, levels, strict=True):
            logger.setLevel(level)
    assert made is not None
    model: onnx.ModelProto = made.model_proto
    return _normal(model)


def _normal(model: onnx.ModelProto) -> onnx.ModelProto:
    """Take out of a graph what depends on the values of sizes: shared constants, and the order of what is on record."""
    graph = model.graph
    constants = {t.name: t for t in graph.initializer}
    shapes = {info.name: info for info in graph.value_info}
    made, order = [], []
    for number, node in enumerate(graph.node):
        del node.metadata_props[:]
        for index, name in enumerate(node.input):
            if name in constants:
                own = onnx.TensorProto()
                own.CopyFrom(constants[name])
                own.name = node.input[index] = f"constant_{number}_{index}"
                made.append(own)
        order += [shapes[name] for name in node.output if name in shapes]
    for info in [*order, *graph.input, *graph.output]:
        del info.metadata_props[:]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(made)
    graph.value_info.extend(order)
    return model


def _rename(model: onnx.ModelProto, names: Mapping[str, str]) -> onnx.ModelProto:
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in names:
                node.input[index] = names[name]
    for info in model.graph.input:
        info.name = names.get(info.name, info.name)
    return model


def _probes(widths: Mapping[str, int]) -> list[dict[str, int]]:
    """The dense widths, then others, until no two groups shrink alike."""
    rng = np.random.default_rng(0)
    points = [dict(widths)]
    while len(points) < MOST_PROBES:
        points.append({g: int(rng.integers(max(2 if w > 2 else 1, w // 2), max(w, 2))) for g, w in widths.items()})
        lines = [tuple(p[g] / w for p in points) for g, w in widths.items()]
        if len(set(lines)) == len(lines):
            break
    return points


class _Forms:
    def __init__(self, traced: Traced, points: Sequence[Mapping[str, int]], batches: Sequence[int]) -> None:
        self.batches = batches
        extents = [e for shape in traced.ties.shapes.values() for e in shape]
        extents += [r.extent for rewrites in traced.ties.rewrites.values() for r in rewrites]
        extents += [*traced.ties.inputs.values(), *traced.ties.outputs.values()]
        extents += [Extent(0, (term,)) for e in extents for term in e.terms]
        known = {Extent(1): None, **{e: None for e in extents if e.terms}}
        self.known = [(e, [e.at(p) for p in points]) for e in known]
        self.cache: dict[tuple[int, ...], Form | None] = {}

    def of(self, values: tuple[int, ...]) -> Form | None:
        """The form that takes these values at the probes."""
        if values not in self.cache:
            self.cache[values] = self._find(values)
        return self.cache[values]

    def _find(self, values: tuple[int, ...]) -> Form | None:
        found: Form | None = None
        for power in (0, 1):
            for extent, at in self.known:
                bases = [a * b**power for a, b in zip(at, self.batches, strict=True)]
                factor = values[0] // bases[0] if bases[0] else 0
                fits = factor and all(factor * base == value for base, value in zip(bases, values, strict=True))
                if fits and (found is None or (factor < found[0] and found[2].terms)):
                    found = factor, power, extent
        return found


def _sizes(model: onnx.ModelProto) -> Iterator[tuple[Path, int]]:
    """Every whole number of a graph that could be a size, with its place."""
    graph = model.graph
    for kind in ("input", "output", "value_info"):
        for index, info in enumerate(getattr(graph, kind)):
            for dim, size in enumerate(info.type.tensor_type.shape.dim):
                yield (kind, index, dim), size.dim_value
    for index, tensor in enumerate(graph.initializer):
        if tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32) and math.prod(tensor.dims) <= 64:
            for position, value in enumerate(numpy_helper.to_array(tensor).ravel().tolist()):
                yield ("initializer", index, position), value
        elif tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL):
            for dim, size in enumerate(tensor.dims):
                yield ("filled", index, dim), size
    for index, node in enumerate(graph.node):
        for number, attribute in enumerate(node.attribute):
            if attribute.type == onnx.AttributeProto.INT:
                yield ("attribute", index, number, -1), attribute.i
            for position, value in enumerate(attribute.ints):
                yield ("attribute", index, number, position), value


def _put(model: onnx.ModelProto, path: Path, value: int) -> None:
    graph, (kind, index, *rest) = model.graph, path
    if kind in ("input", "output", "value_info"):
        getattr(graph, kind)[index].type.tensor_type.shape.dim[rest[0]].dim_value = value
    elif kind == "initializer":
        tensor = graph.initializer[index]
        array = numpy_helper.to_array(tensor).copy()
        array.reshape(-1)[rest[0]] = value
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    elif kind == "filled":  # a constant that the exporter made, such as the ones of a norm without weight
        tensor = graph.initializer[index]
        array = numpy_helper.to_array(tensor)
        shape = list(array.shape)
        shape[rest[0]] = value
        tensor.CopyFrom(numpy_helper.from_array(np.full(shape, array.reshape(-1)[0], array.dtype), tensor.name))
    elif rest[1] == -1:
        graph.node[index].attribute[rest[0]].i = value
    else:
        graph.node[index].attribute[rest[0]].ints[rest[1]] = value
