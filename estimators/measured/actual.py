"""The nodes that ONNX Runtime really makes of a model, and the memory that it takes, to hold predictions against."""

import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from tightrope.estimators.measured.nodes import LETTERS, Node, model

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


def arena_taken(net: onnx.ModelProto | bytes) -> int:
    """Bytes that ONNX Runtime's arena really takes in the second call of a model, whose inputs and outputs are the caller's.

    They are read off its log: one arena of the process takes what is asked for and no more, and is shrunk after each call.
    """
    _share_arena()
    _caller(model("Exp{}(f:1)->f:1", ()).SerializeToString())()  # leaves nothing of models before in the arena
    call = _caller(net if isinstance(net, bytes) else net.SerializeToString())
    call()
    return sum(int(size) for size in re.findall(r"Extended allocation by (\d+) bytes", _logged(call)))


@cache
def _share_arena() -> None:
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )  # fmt: skip
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(0, 1, -1, -1))  # 1: kSameAsRequested


def _caller(data: bytes) -> Callable[[], None]:
    """A call of a model that allocates in the shared arena and shrinks it afterwards."""
    options, run = _options("ORT_ENABLE_ALL"), onnxruntime.RunOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    run.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for given in session.get_inputs():
        zeros = np.zeros(given.shape, np.int64 if "int64" in given.type else np.float32)
        binding.bind_ortvalue_input(given.name, onnxruntime.OrtValue.ortvalue_from_numpy(zeros))
    for made in session.get_outputs():
        binding.bind_ortvalue_output(made.name, onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(made.shape, np.float32)))
    return lambda: session.run_with_iobinding(binding, run)


def _logged(work: Callable[[], None]) -> str:
    """What ONNX Runtime writes to its log meanwhile, all of it."""
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        onnxruntime.set_default_logger_severity(0)
        try:
            work()
        finally:
            onnxruntime.set_default_logger_severity(2)
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        return file.read().decode(errors="replace")


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
