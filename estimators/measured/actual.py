"""The nodes that ONNX Runtime really makes of a model, to hold predictions against."""

import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from tightrope.estimators.measured.nodes import LETTERS, Node

Signature = tuple[str, tuple[tuple[str, tuple[int, ...]], ...], tuple[tuple[int, ...], ...], str, tuple[int, ...]]
"""Operator, type and shape of each tensor that it reads, shapes of its constants but scalars, activation, permutation."""


def predicted(nodes: Iterable[Node]) -> "Counter[Signature]":
    """Signatures of predicted nodes."""
    found: Counter[Signature] = Counter()
    for node in nodes:
        attributes = dict(node.attributes)
        reads = tuple((t.type, tuple(map(int, t.shape))) for t in node.ins)
        constants = tuple(tuple(map(int, c[1])) for c in node.constants if c and c[1])
        found[node.kind, reads, constants, attributes.get("activation", ""), tuple(attributes.get("perm", ()))] += 1
    return found


def actual(model: onnx.ModelProto | bytes, without: Sequence[str] = ()) -> "Counter[Signature]":
    """Signatures of the nodes of a model's optimised graph; the graph is run once for the shapes of its tensors."""
    graph = optimised(model, without)
    shapes = _shapes(graph)
    constants = {t.name: tuple(t.dims) for t in graph.graph.initializer}
    found: Counter[Signature] = Counter()
    for node in graph.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        kind = (node.domain + ":" if node.domain else "") + node.op_type
        reads = tuple(shapes[name] for name in node.input if name in shapes)
        fixed = tuple(constants[name] for name in node.input if constants.get(name))
        found[kind, reads, fixed, attributes.get("activation", b"").decode(), tuple(attributes.get("perm", ()))] += 1
    return found


def _options(level: str) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    return options


def optimised(model: onnx.ModelProto | bytes, without: Sequence[str] = ()) -> onnx.ModelProto:
    """The graph that ONNX Runtime makes of a model on this machine, `without` some of its optimisers."""
    data = model if isinstance(model, bytes) else model.SerializeToString()
    options = _options("ORT_ENABLE_ALL")
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"], disabled_optimizers=[*without])
        return onnx.load(options.optimized_model_filepath)


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[str, tuple[int, ...]]]:
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    names = [name for node in model.graph.node for name in node.output if name]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(
        probe.SerializeToString(), _options("ORT_DISABLE_ALL"), providers=["CPUExecutionProvider"]
    )
    feeds = {i.name: np.zeros(i.shape, np.int64 if "int64" in i.type else np.float32) for i in session.get_inputs()}
    found = zip(names, session.run(names, feeds), strict=True)
    return {name: (LETTERS.get(a.dtype.name, a.dtype.name), a.shape) for name, a in (*found, *feeds.items())}
