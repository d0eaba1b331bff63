"""The graph of a traced model as plain data: it travels to workers, stands in a file's metadata, and executes nothing when read."""

import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import fx

from tightrope.compressors.capture import tensor_of
from tightrope.compressors.trace import Traced, input_names
from tightrope.spaces.errors import ExportError, FormatError
from tightrope.spaces.fields import Fields, parse
from tightrope.spaces.network import Extent, Network, Op

VERSION = 1
Kind = Literal["input", "layer", "parameter", "op", "output"]
_ITEMS = {8: "l", 1: "b"}
_PLAIN = {"getitem": operator.getitem, "mul": operator.mul, "add": operator.add, "sub": operator.sub, "floordiv": operator.floordiv}


@dataclass(frozen=True, slots=True)
class Ref:
    """What another node makes."""

    node: str


@dataclass(frozen=True, slots=True)
class Size:
    """A size that follows the widths; times the batch where `per_example`."""

    extent: Extent
    per_example: bool = False

    def over(self, batch: int) -> Extent:
        """The size at a batch size, as it follows the widths."""
        return times(self.extent, batch) if self.per_example else self.extent


def times(extent: Extent, factor: int) -> Extent:
    """A multiple of a size."""
    return Extent(extent.fixed * factor, tuple((group, repeat * factor) for group, repeat in extent.terms))


@dataclass(frozen=True, slots=True)
class Node:
    """One operator. `name` is that of the network's where it is one of these; `target` names the layer, parameter or function.

    `args` are None, numbers, words, dtypes, `Ref`, `Size` and tuples of them. `shape` is the shape of the tensor that it makes,
    None where it makes anything else; `item` is `f` for floating point, `l` for whole numbers, `b` for flags.
    """

    name: str
    kind: Kind
    target: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    shape: tuple[Size, ...] | None = None
    item: str = "f"

    @property
    def floating(self) -> bool:
        """Whether it makes a floating-point tensor."""
        return self.shape is not None and self.item == "f"

    @property
    def base(self) -> str:
        """The plain name of an operator: `conv2d` of `aten.conv2d.default`."""
        return self.target.removeprefix("aten.").partition(".")[0]


@dataclass(frozen=True)
class Graph:
    """The nodes of a model in order, and its network.

    `constants` are tensors that no policy changes and no parameter holds. `batch` is the one batch size that the model runs at,
    None where it runs at any.
    """

    network: Network
    nodes: tuple[Node, ...]
    constants: Mapping[str, torch.Tensor]
    batch: int | None = None

    @cached_property
    def by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @staticmethod
    def of(tracing: Traced) -> "Graph":
        """The graph of a traced model.

        Raises:
            ExportError: an operator or an argument is none that plain data could name.
        """
        skeleton, network = tracing.skeleton, tracing.network
        names = {node: node.name for node in skeleton.graph.nodes} | input_names(skeleton)
        actual = _shapes(tracing)
        shapes = {op.name: (_sized(op, network, actual[op.name]), _ITEMS.get(op.bytes_per_item, "f")) for op in network.ops}
        parameters = {p.name: p.shape for p in network.parameters}
        rewrites, nodes, constants = tracing.ties.rewrites, [], {}
        for node in skeleton.graph.nodes:
            name, target = names[node], str(node.target)
            if node.op == "placeholder":
                nodes.append(Node(name, "input", target, (), (), *shapes.get(name, (None, "f"))))
            elif node.op == "get_attr":
                if target in parameters:
                    nodes.append(Node(name, "parameter", target, shape=tuple(map(Size, parameters[target]))))
                else:
                    constants[target] = tensor_of(skeleton, target).detach().clone()
                    item = "f" if constants[target].is_floating_point() else _ITEMS.get(constants[target].element_size(), "l")
                    nodes.append(
                        Node(name, "parameter", target, (), (), tuple(Size(Extent(n)) for n in constants[target].shape), item)
                    )
            elif node.op == "output":
                nodes.append(Node(name, "output", "", (_plain(_structured(skeleton, node), names, name),)))
            else:
                args = [_plain(a, names, name) for a in node.args]
                for rewrite in rewrites.get(node.name, ()):
                    first, *rest = rewrite.path
                    size = Size(rewrite.extent, rewrite.per_example)
                    args[first] = size if not rest else (*args[first][: rest[0]], size, *args[first][rest[0] + 1 :])
                kwargs = tuple((k, _plain(v, names, name)) for k, v in node.kwargs.items())
                kind: Kind = "layer" if node.op == "call_module" else "op"
                known = target if kind == "layer" else _name_of(node.target)
                nodes.append(Node(name, kind, known, tuple(args), kwargs, *shapes.get(name, (None, "f"))))
        return Graph(network, tuple(nodes), constants, skeleton.meta["batch"])

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION, "network": self.network.to_json(), "constants": sorted(self.constants), "batch": self.batch,
            "nodes": [
                {"name": n.name, "kind": n.kind, "target": n.target, "args": _written(n.args), "kwargs": dict(_written(n.kwargs)),
                 "shape": None if n.shape is None else [_written(size) for size in n.shape], "item": n.item}
                for n in self.nodes
            ],
        }  # fmt: skip

    @staticmethod
    def from_json(text: str, constants: Mapping[str, torch.Tensor], where: str) -> "Graph":
        """The graph of `to_json` as text.

        Raises:
            FormatError: it is none; the message names the field.
        """
        top = parse(text, where)
        top.only("version", "network", "constants", "nodes", "batch")
        top.version(VERSION)
        network = Network.from_json(Fields(top.take("network", dict), f"{where}.network"))
        names = top.take("constants", list)
        missing = [name for name in names if name not in constants]
        if missing:
            raise FormatError(f"{where}.constants names {missing[0]!r}, which is not among the tensors")
        nodes: list[Node] = []
        known: set[str] = set()
        for f in top.each("nodes"):
            kind, shape = f.take("kind", str), f.take("shape", (list, type(None)))
            if kind not in ("input", "layer", "parameter", "op", "output"):
                raise FormatError(f"{f.where}.kind must be input, layer, parameter, op or output, got {kind!r}")
            args = _read(f.take("args", list), f"{f.where}.args", known)
            kwargs = tuple((k, _read(v, f"{f.where}.kwargs", known)) for k, v in f.take("kwargs", dict).items())
            sizes = None if shape is None else _read(shape, f"{f.where}.shape", known)
            if not all(isinstance(size, Size) for size in sizes or ()):
                raise FormatError(f"{f.where}.shape must be sizes, got {shape!r}")
            nodes.append(Node(f.take("name", str), kind, f.take("target", str), args, kwargs, sizes, f.take("item", str, "f")))
            known.add(nodes[-1].name)
            if kind == "op":
                function(nodes[-1].target)
            if kind == "layer":
                network.layer(nodes[-1].target)
        batch = top.take("batch", (int, type(None)))
        return Graph(network, tuple(nodes), {name: constants[name] for name in names}, batch)


def function(target: str) -> Callable[..., Any]:
    """The function that a target names: one of ATen's operators, or arithmetic on sizes.

    Raises:
        FormatError: it names neither.
    """
    if target in _PLAIN:
        return _PLAIN[target]
    space, _, rest = target.partition(".")
    packet, _, overload = rest.partition(".")
    found = (
        getattr(getattr(torch.ops.aten, packet or "none", None), overload or "default", None)
        if space == "aten" and packet != "from_file"
        else None
    )
    if not isinstance(found, torch._ops.OpOverload):
        raise FormatError(f"{target!r} is not an operator of torch's; the file may be of a newer version")
    return found


class _Recorder(fx.Interpreter):
    """Runs a skeleton and keeps the shapes of what its nodes make."""

    def __init__(self, skeleton: fx.GraphModule) -> None:
        super().__init__(skeleton)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.shapes[n.name] = tuple(value.shape)
        return value


def _shapes(tracing: Traced) -> dict[str, list[tuple[int, tuple[int, ...]]]]:
    """For each operator of the network, its shape at a batch size or two."""
    fixed = tracing.skeleton.meta["batch"]
    names = {node.name: name for node, name in input_names(tracing.skeleton).items()}
    found: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for batch in (fixed,) if fixed else (2, 3):
        recorder = _Recorder(tracing.skeleton)
        with torch.no_grad():
            recorder.run(*(at_batch(value, batch) for value in tracing.example), enable_io_processing=False)
        for name, shape in recorder.shapes.items():
            found.setdefault(names.get(name, name), []).append((batch, shape))
    return found


def _sized(op: Op, network: Network, actual: Sequence[tuple[int, tuple[int, ...]]]) -> tuple[Size, ...]:
    """The sizes of an operator's tensor, and which of them follow the batch."""
    sizes = []
    for dim, extent in enumerate(op.shape):
        per_example = len({shape[dim] for _, shape in actual}) > 1
        batch, shape = actual[0]
        here, known = shape[dim] // (batch if per_example else 1), extent.at(network.widths)
        sizes.append(Size(times(extent, here // known) if known and here % known == 0 else Extent(here), per_example))
    return tuple(sizes)


def at_batch(value: Any, batch: int) -> Any:
    """An input with its examples repeated to this batch size."""
    if not isinstance(value, torch.Tensor) or not value.dim():
        return value
    return value.repeat(math.ceil(batch / len(value)), *[1] * (value.dim() - 1))[:batch].clone()


def _name_of(target: Any) -> str:
    for name, known in _PLAIN.items():
        if target is known:
            return name
    name = str(target)
    if not name.startswith("aten."):
        raise ExportError(f"operator {name} cannot be written down: only ATen's operators can")
    return "aten.reshape.default" if name == "aten.view.default" else name  # images run with channels last, which no view fits


def _structured(skeleton: fx.GraphModule, node: fx.Node) -> Any:
    """What the model returns, in its own structure."""
    codegen = skeleton.graph._codegen
    if isinstance(codegen, fx.graph._PyTreeCodeGen) and codegen.pytree_info.out_spec is not None:
        leaves = torch.utils._pytree.tree_leaves(node.args[0])
        return torch.utils._pytree.tree_unflatten(leaves, codegen.pytree_info.out_spec)
    return node.args[0]


def _plain(value: Any, names: Mapping[fx.Node, str], where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if isinstance(value, fx.Node):
        return Ref(names[value])
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v, names, where) for v in value)
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: _plain(v, names, where) for k, v in value.items()}
    if isinstance(value, torch.device):
        return "cpu"
    if isinstance(value, torch.layout) and value is torch.strided:
        return None
    raise ExportError(f"an argument of operator {where!r} cannot be written down: {value!r}")


def _written(value: Any) -> Any:
    if isinstance(value, Ref):
        return {"ref": value.node}
    if isinstance(value, Size):
        return {"size": value.extent.to_json(), "per_example": value.per_example}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, dict):
        return {"dict": {k: _written(v) for k, v in value.items()}}
    return [_written(v) for v in value] if isinstance(value, tuple) else value


def _read(value: Any, where: str, known: set[str]) -> Any:
    if isinstance(value, list):
        return tuple(_read(v, where, known) for v in value)
    if not isinstance(value, dict):
        return value
    if value.keys() == {"ref"}:
        if value["ref"] not in known:
            raise FormatError(f"{where} refers to node {value['ref']!r}, which does not stand before it")
        return Ref(value["ref"])
    if value.keys() == {"size", "per_example"}:
        return Size(Extent.from_json(value["size"], where), bool(value["per_example"]))
    if value.keys() == {"dtype"} and isinstance(getattr(torch, str(value["dtype"]), None), torch.dtype):
        return getattr(torch, value["dtype"])
    if value.keys() == {"dict"} and isinstance(value["dict"], dict):
        return {k: _read(v, where, known) for k, v in value["dict"].items()}
    raise FormatError(f"{where} must hold plain values, refs, sizes and dtypes, got {json.dumps(value)[:80]}")
