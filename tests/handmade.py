"""Three nets written by hand as `Network` plus skeleton, for tests that must not depend on torch or on the tracer.

A net is a function over a `Recorder`: each call notes one operator, symbolically for the `Network` and, at given widths,
as ONNX nodes for the skeleton.
"""

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tightrope.spaces.network import Extent, Group, Layer, Network, Op, Parameter

Shape = tuple[Extent, ...]


class Recorder:
    """Notes a net; tensors are named after the operator that makes them and `shapes` has their symbolic shapes."""

    def __init__(self, widths: Mapping[str, int] | None = None, batch: int = 1) -> None:
        self.widths, self.batch = widths, batch
        self.layers: list[Layer] = []
        self.groups: dict[str, int] = {}
        self.ops: list[Op] = []
        self.parameters: list[Parameter] = []
        self.shapes: dict[str, Shape] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.consts: list[onnx.TensorProto] = []
        self.values: dict[str, str] = {}

    def group(self, name: str, width: int) -> Extent:
        self.groups.setdefault(name, width)
        return Extent(0, ((name, 1),))

    def at(self, extent: Extent) -> int:
        return extent.at(self.widths if self.widths is not None else self.groups)

    def dims(self, shape: Shape) -> list[int]:
        """Concrete sizes; the first axis is the batch."""
        return [self.batch, *(self.at(e) for e in shape[1:])]

    def input(self, *shape: int) -> str:
        self.shapes["input"] = tuple(map(Extent, shape))
        self.point("input", "x")
        return "input"

    def parameter(self, name: str, *shape: Extent) -> str:
        if all(p.name != name for p in self.parameters):
            self.parameters.append(Parameter(name, shape))
        return name

    def const(self, array: np.ndarray) -> str:
        self.consts.append(numpy_helper.from_array(array, f"const{len(self.consts)}"))
        return self.consts[-1].name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: object) -> None:
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))

    def point(self, name: str, value: str) -> None:
        self.values[name] = name + ".p"
        self.nodes.append(helper.make_node("Point", [value], [name + ".p"], domain="tightrope"))
        self.nodes[-1].attribute.append(helper.make_attribute("name", name))

    def op(
        self, name: str, kind: str, inputs: tuple[str, ...], shape: Shape, onnx_kind: str, *consts: str, **attributes: object
    ) -> str:
        self.ops.append(Op(name, kind, inputs, shape))
        self.shapes[name] = shape
        self.node(onnx_kind, [self.values[i] for i in inputs] + list(consts), name, **attributes)
        self.point(name, name)
        return name

    def layer(self, name: str, x: str, layer: Layer, shape: Shape) -> str:
        self.layers.append(layer)
        self.ops.append(Op(name, "layer", (x,), shape, layer=name))
        self.shapes[name] = shape
        self.nodes.append(helper.make_node("Layer", [self.values[x]], [name], domain="tightrope"))
        self.nodes[-1].attribute.append(helper.make_attribute("name", name))
        self.point(name, name)
        return name

    def conv(self, name: str, x: str, out: Extent, k: int = 3, s: int = 1, act: str = "") -> str:
        b, channels, h, w = self.shapes[x]
        pad, depthwise = k // 2, out == channels and name.startswith("dw")
        size = tuple((e.fixed + 2 * pad - k) // s + 1 for e in (h, w))
        layer = Layer(
            name, "depthwise" if depthwise else "conv", channels, out, (k, k), (s, s), (pad, pad), (1, 1),
            self.at(out) if depthwise and self.widths is None else 1, (h.fixed, w.fixed), size, activation=act,
        )  # fmt: skip
        y = self.layer(name, x, layer, (b, out, *map(Extent, size)))
        return self.act(name + "_" + act, y, act) if act else y

    def linear(self, name: str, x: str, out: Extent) -> str:
        *lead, features = self.shapes[x]
        tokens = lead[1].fixed if len(lead) == 2 else 1
        return self.layer(name, x, Layer(name, "linear", features, out, in_size=(1, tokens), out_size=(1, tokens)), (*lead, out))

    def act(self, name: str, x: str, kind: str) -> str:
        shape = self.shapes[x]
        if kind == "relu6":
            limits = [self.const(np.float32(0)), self.const(np.float32(6))]
            return self.op(name, kind, (x,), shape, "Clip", *limits)
        return self.op(name, kind, (x,), shape, {"relu": "Relu", "hardswish": "HardSwish", "gelu": "Gelu"}[kind])

    def reshape(self, name: str, x: str, shape: Shape) -> str:
        return self.op(name, "reshape", (x,), shape, "Reshape", self.const(np.array(self.dims(shape), np.int64)))

    def permute(self, name: str, x: str, *perm: int) -> str:
        return self.op(name, "permute", (x,), tuple(self.shapes[x][p] for p in perm), "Transpose", perm=list(perm))

    def add(self, name: str, a: str, b: str) -> str:
        return self.op(name, "add", (a, b), self.shapes[a], "Add")

    def pool(self, name: str, x: str) -> str:
        b, c, *_ = self.shapes[x]
        return self.reshape(name + "_flat", self.op(name, "mean", (x,), (b, c, Extent(1), Extent(1)), "GlobalAveragePool"), (b, c))

    def network(self) -> Network:
        groups = tuple(Group(n, w) for n, w in self.groups.items())
        return Network(tuple(self.layers), groups, tuple(self.ops), tuple(self.parameters))

    def skeleton(self, output: str) -> onnx.ModelProto:
        f = TensorProto.FLOAT
        inputs = [helper.make_tensor_value_info("x", f, self.dims(self.shapes["input"]))]
        inputs += [helper.make_tensor_value_info(p.name, f, [self.at(e) for e in p.shape]) for p in self.parameters]
        outputs = [helper.make_tensor_value_info(self.values[output], f, self.dims(self.shapes[output]))]
        graph = helper.make_graph(self.nodes, "net", inputs, outputs, self.consts)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("tightrope", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


class Handmade:
    """A net as `network` and, by `at(widths, batch)`, as skeleton."""

    def __init__(self, net: Callable[[Recorder], str]) -> None:
        self._net = net
        recorder = Recorder()
        net(recorder)
        self.network = recorder.network()

    def at(self, widths: Mapping[str, int], batch: int = 1) -> onnx.ModelProto:
        recorder = Recorder({**self.network.widths, **widths}, batch)
        return recorder.skeleton(self._net(recorder))


def resnet8(r: Recorder) -> str:
    """Residual, 32-64-128 at 28x28; stem and shortcuts share groups with the block outputs."""
    x = r.conv("stem", r.input(1, 1, 28, 28), r.group("g0", 32), act="relu")
    before = Extent(0, (("g0", 1),))
    for i, (width, stride) in enumerate(((32, 1), (64, 2), (128, 2))):
        out = before if i == 0 else r.group(f"g{i}", width)
        y = r.conv(f"s{i}c1", x, r.group(f"m{i}", width), s=stride, act="relu")
        y = r.conv(f"s{i}c2", y, out)
        short = x if i == 0 else r.conv(f"s{i}sc", x, out, k=1, s=stride)
        x = r.act(f"s{i}relu", r.add(f"s{i}add", y, short), "relu")
        before = out
    return r.linear("head", r.pool("pool", x), Extent(10))


def mobilenet(r: Recorder) -> str:
    """Depthwise, inverted residuals with relu6 and hard-swish at 28x28."""
    x = r.conv("stem", r.input(1, 1, 28, 28), r.group("g0", 16), act="relu6")
    for i, (width, stride, act) in enumerate(((16, 1, "relu6"), (32, 2, "relu6"), (32, 1, "hardswish"), (64, 2, "hardswish"))):
        channels = r.shapes[x][1]
        inner = r.group(f"e{i}", 3 * r.groups.get(channels.groups[0], 16))
        out = channels if stride == 1 and r.groups.get(channels.groups[0]) == width else r.group(f"g{i + 1}", width)
        fused = act if act == "relu6" else ""
        y = r.conv(f"b{i}expand", x, inner, k=1, act=fused)
        y = y if fused else r.act(f"b{i}act1", y, act)
        y = r.conv(f"dw{i}", y, inner, s=stride, act=fused)
        y = y if fused else r.act(f"b{i}act2", y, act)
        y = r.conv(f"b{i}project", y, out, k=1)
        x = r.add(f"b{i}add", x, y) if out == channels else y
    x = r.conv("top", x, r.group("top", 128), k=1, act="relu6")
    return r.linear("head", r.pool("pool", x), Extent(10))


def vit(r: Recorder) -> str:
    """Patches of 4x4, two blocks of four heads, 64 features; heads and the inner width of the MLP can be pruned."""
    one, tokens, dim, head = Extent(1), Extent(49), r.group("dim", 64), 16
    r.input(1, 1, 28, 28)
    layer = Layer("patch", "conv", one, dim, (4, 4), (4, 4), in_size=(28, 28), out_size=(7, 7))
    x = r.layer("patch", "input", layer, (one, dim, Extent(7), Extent(7)))
    x = r.permute("tokens", r.reshape("flat", x, (one, dim, tokens)), 0, 2, 1)
    x = r.op("embed", "add", (x,), r.shapes[x], "Add", r.parameter("position", one, tokens, dim))

    def norm(name: str, x: str) -> str:
        names = [r.parameter(f"{name}.{p}", dim) for p in ("weight", "bias")]
        return r.op(name, "layer_norm", (x,), r.shapes[x], "LayerNormalization", *names, epsilon=1e-5)

    for i in range(2):
        r.group(f"heads{i}", 4)
        heads, inner = Extent(0, ((f"heads{i}", 1),)), Extent(0, ((f"heads{i}", head),))
        y = norm(f"n{i}a", x)

        def split(part: str, i: int = i, y: str = y, heads: Extent = heads, inner: Extent = inner) -> str:
            out = r.linear(f"{part}{i}", y, inner)
            return r.permute(f"{part}{i}t", r.reshape(f"{part}{i}r", out, (one, tokens, heads, Extent(head))), 0, 2, 1, 3)

        q, k, v = split("q"), split("k"), split("v")
        kt = r.permute(f"kt{i}", k, 0, 1, 3, 2)
        scores = r.op(f"qk{i}", "matmul", (q, kt), (one, heads, tokens, tokens), "MatMul")
        scaled = r.op(f"scale{i}", "mul", (scores,), r.shapes[scores], "Mul", r.const(np.float32(0.25)))
        weights = r.op(f"soft{i}", "softmax", (scaled,), r.shapes[scores], "Softmax", axis=-1)
        mixed = r.op(f"mix{i}", "matmul", (weights, v), (one, heads, tokens, Extent(head)), "MatMul")
        joined = r.reshape(f"join{i}", r.permute(f"mt{i}", mixed, 0, 2, 1, 3), (one, tokens, inner))
        x = r.add(f"add{i}a", x, r.linear(f"proj{i}", joined, dim))
        y = r.act(f"gelu{i}", r.linear(f"up{i}", norm(f"n{i}b", x), r.group(f"mlp{i}", 128)), "gelu")
        x = r.add(f"add{i}b", x, r.linear(f"down{i}", y, dim))
    mean = r.op("mean", "mean", (norm("last", x),), (one, dim), "ReduceMean", r.const(np.array([1], np.int64)), keepdims=0)
    return r.linear("head", mean, Extent(10))
