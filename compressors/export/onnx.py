"""ONNX files that ONNX Runtime executes as the policy says.

`write` takes a skeleton, the model's graph without layer weights, and puts a payload into it. In a skeleton each call of a
layer is one node `Layer` of domain `tightrope` (attribute `name`: the layer), and behind the model's input and behind every
floating-point operator stands an identity `Point` (attribute `name`: the operator in the network). What comes out is standard
ONNX: an integer layer is a convolution or `Gemm` between DequantizeLinear and QuantizeLinear, which ONNX Runtime
fuses to one integer node; weight-only linear layers are its `MatMulNBits`. `check` asserts that this is what it does.
"""

import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from tightrope.compressors.payload import Part, Payload, affine
from tightrope.spaces.errors import ExportError
from tightrope.spaces.network import Network
from tightrope.spaces.points import is_integer, points
from tightrope.spaces.policy import Policy
from tightrope.spaces.unit import Unit, lower

DOMAIN = "tightrope"
MOVES = frozenset("MaxPool Reshape Transpose Flatten Squeeze Unsqueeze Slice Gather Expand Split Identity DepthToSpace".split())
"""Operators of one data input that only move values, so that 8-bit codes pass through them as they are."""
RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
WEIGHT_ONLY = (2, 4, 8)
PANEL = 16
BLOCK = 32
"""Weights that share a scale in a `MatMulNBits` node; ours repeat the scale of the output channel."""
_TYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int8": TensorProto.INT8,
          "int32": TensorProto.INT32, "int64": TensorProto.INT64}  # fmt: skip


Shape = tuple[int, ...] | None


@dataclass
class _Value:
    """A tensor of the skeleton as the written graph holds it.

    `names` has the written tensors by form, `(is it u8 codes, shape)`; further forms are derived from what is there. `step` is
    `(scale, zero point)` of the codes, None without. `shape` is the tensor's own; None stands for the shape it was made in.
    """

    names: dict[tuple[bool, Shape], str]
    step: tuple[float, int] | None = None
    shape: Shape = None

    @property
    def coded(self) -> bool:
        return self.step is not None


class _Writer:
    """One run of `write`: the graph as it grows, and the value that stands for each tensor of the skeleton."""

    def __init__(self, skeleton: onnx.ModelProto, network: Network, payload: Payload) -> None:
        self.source, self.opsets = skeleton.graph, skeleton.opset_import
        self.network, self.payload = network, payload
        self.held = points(network, payload.policy)
        self.model = onnx.ModelProto(ir_version=skeleton.ir_version, producer_name="tightrope")
        self.graph = self.model.graph
        self.values: dict[str, _Value] = {}
        self.made: set[str] = set()  # names of initialisers
        self.other: dict[tuple[str, tuple[float, int], int], str] = {}  # codes at another step, by their name, the step and bits
        self.count = 0
        dims = self.source.input[0].type.tensor_type.shape.dim
        self.batch = int(dims[0].dim_value) if dims else 1
        self.shapes = {op.name: op.shape for op in network.ops}
        self.widths = payload.policy.all_widths(network)
        self.point_of = {node.input[0]: _name(node) for node in self.source.node if node.op_type == "Point"}
        self.constants = {t.name: t for t in self.source.initializer}
        self.constants |= {n.output[0]: n.attribute[0].t for n in self.source.node if n.op_type == "Constant"}
        self.wanted = self.look_ahead()
        self.rounded = self.look_ahead(frozenset({"Relu", "Clip"}))

    def look_ahead(self, through: frozenset[str] = frozenset()) -> dict[str, str]:
        """For each tensor whose only use is to be held in 8 bits, at once or behind operators that only move it: that point."""
        reads = Counter(name for node in self.source.node for name in node.input) + Counter(o.name for o in self.source.output)
        wanted: dict[str, str] = {}
        for node in reversed(self.source.node):
            is_point = node.domain == DOMAIN and node.op_type == "Point"
            passes = is_point or node.op_type in MOVES or node.op_type in through
            source, made = node.input[0] if node.input else "", node.output[0]
            if is_point and _name(node) in self.held:
                wanted[source] = _name(node)
            elif passes and made in wanted and reads[made] == reads[source] == 1:
                wanted[source] = wanted[made]
        return wanted

    def run(self) -> onnx.ModelProto:
        self.graph.name = self.source.name or "network"
        self.graph.initializer.extend(self.source.initializer)
        for given in self.source.input:
            if given.name in self.payload.parameters:
                self.tensor(given.name, np.asarray(self.payload.parameters[given.name], np.float32))
            else:
                self.graph.input.append(given)
        for node in self.source.node:
            if node.domain != DOMAIN:
                self.copy(node)
            elif node.op_type == "Point":
                self.values[node.output[0]] = self.point(_name(node), self.value(node.input[0]))
            else:
                self.values[node.output[0]] = self.layer(node)
        self.outputs()
        self.model.opset_import.extend(o for o in self.opsets if o.domain not in (DOMAIN, "com.microsoft"))
        self.model.opset_import.add(domain="com.microsoft", version=1)
        return self.model

    # --- the graph ------------------------------------------------------------------------------------------------

    def tensor(self, name: str, array: NDArray[Any]) -> str:
        """An initialiser, made once under its name."""
        if name not in self.made:
            self.made.add(name)
            made = self.graph.initializer.add(name=name, data_type=_TYPES[array.dtype.name], raw_data=array.tobytes())
            made.dims.extend(array.shape)
        return name

    def node(self, kind: str, inputs: Iterable[str], name: str = "", domain: str = "", **attributes: float | Sequence[int]) -> str:
        """A node of one output; returns the output's name."""
        self.count += 1
        output = name or f"written/{kind}_{self.count}"
        made = self.graph.node.add(op_type=kind, name=output, domain=domain)
        made.input.extend(inputs)
        made.output.append(output)
        for key, given in attributes.items():
            if isinstance(given, int):
                made.attribute.add(name=key, type=onnx.AttributeProto.INT, i=given)
            elif isinstance(given, float):
                made.attribute.add(name=key, type=onnx.AttributeProto.FLOAT, f=given)
            else:
                made.attribute.add(name=key, type=onnx.AttributeProto.INTS).ints.extend(given)
        return output

    def copy(self, node: onnx.NodeProto) -> None:
        """An operator of the skeleton: on the codes where it only moves values, else in floating point."""
        if self.implied(node):
            self.values[node.output[0]] = self.value(node.input[0])
            return
        first = self.value(node.input[0]) if node.input else _Value({})
        if node.op_type in MOVES and node.output[0] in self.wanted:
            first = self.held_as(self.wanted[node.output[0]], first)
        shape = self.reshaped(node)
        if shape is not None:
            self.values[node.output[0]] = _Value(first.names, first.step, shape)
            return
        on_codes = first.coded and node.op_type in MOVES
        inputs = [
            self.form(self.value(name) if i else first, codes=on_codes and i == 0) if name else ""
            for i, name in enumerate(node.input)
        ]
        made = self.graph.node.add()
        made.CopyFrom(node)
        made.input[:] = inputs
        for name in node.output:
            self.values[name] = _Value({(on_codes, None): name}, first.step if on_codes else None)

    def reshaped(self, node: onnx.NodeProto) -> Shape:
        """The shape that a reshape gives, so that it is written only where a reader needs it; None for other operators."""
        if node.op_type not in RESHAPES:
            return None
        if node.op_type == "Reshape" and node.input[1] in self.constants:
            shape = tuple(onnx.numpy_helper.to_array(self.constants[node.input[1]]).tolist())
            if min(shape, default=1) > 0:
                return shape
        name = self.point_of.get(node.output[0], "")
        return self.shape(name) if name in self.shapes else None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an operator's tensor at this batch size."""
        first, *rest = (extent.at(self.widths) for extent in self.shapes[name])
        return (first * self.batch, *rest)

    def implied(self, node: onnx.NodeProto) -> bool:
        """Whether an activation's limits are those of the codes that its output is held in, so that it does nothing."""
        if node.op_type not in ("Relu", "Clip") or node.output[0] not in self.wanted or self.value(node.input[0]).coded:
            return False
        scale, zero = affine(*self.range(self.wanted[node.output[0]]))
        if node.op_type == "Relu":
            return zero == 0
        limits = [self.constant(i) for i in (*node.input[1:3], "", "")[:2]]
        low, high = (x if x is not None else s * np.inf for x, s in zip(limits, (-1, 1), strict=True))
        return low <= -zero * scale * (1 - 1e-6) and (255 - zero) * scale <= high * (1 + 1e-6)

    def constant(self, name: str) -> float | None:
        """The value of a scalar constant, None for an input left out."""
        return float(onnx.numpy_helper.to_array(self.constants[name]).item()) if name in self.constants else None

    def outputs(self) -> None:
        """Give each output of the model its name, by renaming the tensor that stands for it."""
        taken: dict[str, str] = {}
        makers = {name for node in self.graph.node for name in node.output}
        for output in self.source.output:
            name = self.form(self.value(output.name))
            self.graph.output.append(output)
            if name == output.name:
                continue
            if name in makers and name not in taken:
                taken[name] = output.name
            else:
                self.node("Identity", [taken.get(name, name)], output.name)
        for node in self.graph.node if taken else ():
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    if name in taken:
                        names[i] = taken[name]

    # --- values ---------------------------------------------------------------------------------------------------

    def value(self, name: str) -> _Value:
        """What stands for a tensor of the skeleton; inputs and initialisers stand for themselves."""
        return self.values.setdefault(name, _Value({(False, None): name}))

    def form(self, value: _Value, *, codes: bool = False, shape: Shape = None) -> str:
        """The name of a value in a form, made where it is missing: reshaped as codes, decoded last."""
        names, shape = value.names, shape or value.shape
        if (codes, shape) not in names:
            if not codes and value.coded:
                names[codes, shape] = self.quantise("DequantizeLinear", self.form(value, codes=True, shape=shape), value.step)
            else:
                assert shape is not None
                near = next(name for (coded, _), name in names.items() if coded == codes)
                to = self.tensor("written/shape_" + "x".join(map(str, shape)), np.array(shape, np.int64))
                names[codes, shape] = self.node("Reshape", [near, to])
        return names[codes, shape]

    def quantise(self, kind: str, name: str, step: tuple[float, int] | None) -> str:
        """A QuantizeLinear or DequantizeLinear of u8 with one scale and zero point."""
        return self.node(kind, [name, *self.step(step)])

    def step(self, step: tuple[float, int] | None) -> list[str]:
        """The scale and zero point of u8 codes as initialisers."""
        scale, zero = cast("tuple[float, int]", step)
        return [
            self.tensor(f"written/scale_{scale!r}_{zero}", np.array(scale, np.float32)),
            self.tensor(f"written/zero_{zero}", np.array(zero, np.uint8)),
        ]

    def recoded(self, name: str, before: tuple[float, int] | None, step: tuple[float, int], bits: int) -> str:
        """u8 codes at another step, at most `2**bits - 1`.

        A leaky ReLU of slope 1 changes nothing but the step, which ONNX Runtime looks up in a table of 256 codes: faster than
        decoding, clipping and quantising, with the same result. Layers that read the same share it.
        """
        key = name, step, bits
        if key not in self.other:
            made = self.node("QLinearLeakyRelu", [name, *self.step(before), *self.step(step)], domain="com.microsoft", alpha=1.0)
            most = self.tensor(f"written/most_{2**bits - 1}", np.array(2**bits - 1, np.uint8))
            self.other[key] = self.node("Clip", [made, "", most])
        return self.other[key]

    def point(self, name: str, value: _Value) -> _Value:
        """What readers of a point read: its codes where the policy holds it in 8 bits, else what was written."""
        if value.shape is None and name in self.shapes:
            value.shape = self.shape(name)
            value.names = {(coded, value.shape): made for (coded, _), made in value.names.items()}
        return self.held_as(name, value) if name in self.held else value

    def held_as(self, name: str, value: _Value) -> _Value:
        """The value as the codes of a point; codes that were moved there stay as they are."""
        if value.coded:
            return value
        step = affine(*self.range(name))
        (_, shape), given = next(iter(value.names.items()))
        return _Value({(True, shape): self.quantise("QuantizeLinear", given, step)}, step, value.shape)

    def range(self, name: str) -> tuple[float, float]:
        if name not in self.payload.ranges:
            raise ExportError(
                f"the payload must have the range of every point held in 8 bits, but {name!r} is missing; calibrate for this policy"
            )
        return self.payload.ranges[name]

    # --- layers ---------------------------------------------------------------------------------------------------

    def layer(self, node: onnx.NodeProto) -> _Value:
        """A layer's call: one node, or one for each factor of a low-rank layer."""
        name = _name(node)
        value = self.value(node.input[0])
        lead = self.shape(self.point_of[node.output[0]])[:-1] if self.network.layer(name).kind == "linear" else ()
        parts = self.payload.parts[name]
        if parts[0].unit.weight_bits == 32 and value.coded and len(parts) == 1 and node.output[0] in self.rounded:
            value = self.shielded(parts[0].unit, value, lead)
        for part in parts:
            value = self.part(part, value, lead)
        return value

    def shielded(self, unit: Unit, value: _Value, lead: tuple[int, ...]) -> _Value:
        """The codes decoded with one scale repeated for each channel.

        Between codes decoded with a single scale and codes, ONNX Runtime would quantise the weights of a floating-point
        layer by itself, with one scale for the whole tensor.
        """
        scale, zero = cast("tuple[float, int]", value.step)
        channels, shape = unit.in_channels, rows(unit, lead)
        steps = [
            self.tensor(f"written/scales_{scale!r}_{channels}", np.full(channels, scale, np.float32)),
            self.tensor(f"written/zeros_{zero}_{channels}", np.full(channels, zero, np.uint8)),
        ]
        made = self.node("DequantizeLinear", [self.form(value, codes=True, shape=shape), *steps], axis=1)
        return _Value({(False, shape): made}, shape=shape)

    def part(self, part: Part, value: _Value, lead: tuple[int, ...]) -> _Value:
        """One unit; `lead` are the sizes before the features of a linear layer."""
        unit, key = part.unit, f"{part.unit.layer}.{part.unit.part}"
        if unit.weight_bits <= 8 and unit.act_bits <= 8:
            return self.integer(part, value, key, lead)
        if unit.act_bits <= 8 or (unit.weight_bits < 32 and (unit.kind != "linear" or unit.weight_bits not in WEIGHT_ONLY)):
            raise ExportError(
                f"ONNX Runtime has no {unit.kind} with {unit.weight_bits}-bit weights and {unit.act_bits}-bit activations, "
                f"as layer {unit.layer!r} asks; give it 8 and 8 bits or 32 and 32, or export packed safetensors"
            )
        if unit.weight_bits < 32:
            return self.weight_only(part, value, key, lead, part is self.payload.parts[unit.layer][-1])
        inputs = [self.tensor(key + ".weight", part.weight)]
        if part.bias is not None:
            inputs.append(self.tensor(key + ".bias", part.bias))
        return self.multiply(unit, value, inputs, lead)

    def multiply(self, unit: Unit, value: _Value, weights: list[str], lead: tuple[int, ...]) -> _Value:
        """The convolution, or the Gemm on rows x features, of floating-point tensors."""
        x = self.form(value, shape=rows(unit, lead))
        if unit.kind == "linear":
            shape = (*lead, unit.out_channels)
            flat = (int(np.prod(lead)), unit.out_channels)
            return _Value({(False, flat): self.node("Gemm", [x, *weights], transB=1)}, shape=shape)
        pads, kernel = (*unit.padding, *unit.padding), unit.kernel
        y = self.node(
            "Conv", [x, *weights], kernel_shape=kernel, strides=unit.stride, pads=pads, dilations=unit.dilation, group=unit.groups
        )
        return _Value({(False, None): y})

    def integer(self, part: Part, value: _Value, key: str, lead: tuple[int, ...]) -> _Value:
        """An integer layer: what it reads as u8 codes, int8 weights for each channel, int32 bias; all decoded in front of it."""
        unit = part.unit
        if part.codes is None or part.scales is None or part.act_range is None:
            raise ExportError(f"part {unit.part} of integer layer {unit.layer!r} needs codes, scales and the range of its input")
        step = affine(*part.act_range, unit.act_bits)
        if unit.act_bits < 8 or not value.coded:
            shape = rows(unit, lead)
            x = self.form(value, codes=value.coded, shape=shape)
            if value.coded:
                x = self.recoded(x, value.step, step, unit.act_bits)
            else:
                if unit.act_bits < 8:
                    limits = [(0 - step[1]) * step[0], (2**unit.act_bits - 1 - step[1]) * step[0]]
                    x = self.node("Clip", [x, *(self.tensor(f"written/limit_{v!r}", np.array(v, np.float32)) for v in limits)])
                x = self.quantise("QuantizeLinear", x, step)
            value = _Value({(True, shape): x}, step, shape)
        scale = cast("tuple[float, int]", value.step)[0]
        scales = np.ascontiguousarray(part.scales.reshape(-1), np.float32)
        inputs = [self.decoded(key + ".weight", part.codes, scales)]
        if part.bias is not None:
            steps = scales * np.float32(scale)
            codes = np.clip(np.rint(part.bias / steps.astype(np.float64)), -(2**31) + 1, 2**31 - 1).astype(np.int32)
            inputs.append(self.decoded(key + ".bias", codes, steps))
        return self.multiply(unit, value, inputs, lead)

    def decoded(self, name: str, codes: NDArray[Any], scales: NDArray[np.float32]) -> str:
        """Constant codes behind a DequantizeLinear along axis 0, with zero points of zero."""
        steps = [
            self.tensor(name + "_scale", scales),
            self.tensor(f"written/zero_{codes.dtype}_{len(scales)}", np.zeros(len(scales), codes.dtype)),
        ]
        return self.node("DequantizeLinear", [self.tensor(name, codes), *steps], axis=0)

    def weight_only(self, part: Part, value: _Value, key: str, lead: tuple[int, ...], last: bool) -> _Value:
        """A linear layer of packed low-bit weights that are decoded while it multiplies in floating point.

        For more than one row ONNX Runtime's kernel works on whole panels of output features and leaves what is beyond the last
        one as it was in memory, denormal numbers too, which slows it down many times; so panels are filled up with zeros.
        """
        unit, bits = part.unit, part.unit.weight_bits
        if part.codes is None or part.scales is None:
            raise ExportError(f"part {unit.part} of layer {unit.layer!r} with {bits}-bit weights needs codes and scales")
        width = self.form(value)
        read = unit.in_channels if unit.part == 0 else (value.shape or (unit.in_channels,))[-1]
        made = filled(unit.out_channels, lead)
        blocks = -(-read // BLOCK)
        codes, scales = np.zeros((made, read), np.int8), np.zeros((made, blocks), np.float32)
        codes[: len(part.codes), : unit.in_channels] = part.codes
        scales[: len(part.codes)] = part.scales.reshape(-1, 1)
        inputs = [width, self.tensor(key + ".weight", pack_blocks(codes, bits, blocks)), self.tensor(key + ".weight_scale", scales)]
        if part.bias is not None:
            inputs += ["", "", self.tensor(key + ".bias", np.pad(part.bias, (0, made - unit.out_channels)))]
        sizes: Any = {"K": read, "N": made, "bits": bits, "block_size": BLOCK}
        name = self.node("MatMulNBits", inputs, domain="com.microsoft", **sizes)
        if last and made > unit.out_channels:
            ends = (0, unit.out_channels, -1)
            name = self.node("Slice", [name, *(self.tensor(f"written/slice_{e}", np.array([e], np.int64)) for e in ends)])
            made = unit.out_channels
        return _Value({(False, (*lead, made)): name}, shape=(*lead, made))


def filled(features: int, lead: tuple[int, ...]) -> int:
    """Output features of a weight-only layer as it is written: whole panels where there is more than one row."""
    return -(-features // PANEL) * PANEL if int(np.prod(lead)) > 1 else features


def rows(unit: Unit, lead: tuple[int, ...]) -> Shape:
    """The shape in which a layer reads: rows x features if it is linear on more axes, else None for the tensor's own."""
    return (int(np.prod(lead)), unit.in_channels) if len(lead) > 1 else None


def write(skeleton: onnx.ModelProto, network: Network, payload: Payload) -> onnx.ModelProto:
    """Put a payload into a skeleton made at the payload's widths.

    Integer layers below 8 bits are held and run as int8 with the same values. A layer that ONNX Runtime cannot run as the
    policy says (weight-only convolutions; 3, 5, 6 or 7 bits weight-only) raises `ExportError`.
    """
    return _Writer(skeleton, network, payload).run()


def optimised(model: onnx.ModelProto | bytes) -> onnx.ModelProto:
    """The graph that ONNX Runtime makes of a model on this machine, all its optimisations on."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        data = model if isinstance(model, bytes) else model.SerializeToString()
        try:
            onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no base class of their own
            raise ExportError(f"ONNX Runtime cannot load the exported graph: {error}") from error
        return onnx.load(options.optimized_model_filepath)


def check(model: onnx.ModelProto | bytes, network: Network, policy: Policy) -> None:
    """Raise `ExportError` unless every integer layer of the policy runs as an integer node in ONNX Runtime."""
    graph = optimised(model).graph
    integer = {name for node in graph.node if node.op_type.startswith(("QLinear", "QGemm", "MatMulInteger")) for name in node.input}
    failed = [
        unit.layer + (f" (part {unit.part})" if unit.part else "")
        for unit in lower(network, policy)
        if is_integer(policy.choice(unit.layer)) and f"{unit.layer}.{unit.part}.weight" not in integer
    ]
    if failed:
        raise ExportError(
            "every integer layer must become an integer node in ONNX Runtime, but these would run in floating point: "
            + ", ".join(failed)
        )


def pack_blocks(codes: NDArray[np.int8], bits: int, blocks: int) -> NDArray[np.uint8]:
    """Signed codes `n x k` as `MatMulNBits` wants them: `n x blocks x (BLOCK * bits / 8)`, offset by half, low bits first."""
    padded = np.full((len(codes), blocks * BLOCK), 2 ** (bits - 1), np.uint8)
    padded[:, : codes.shape[1]] = codes.astype(np.int16) + 2 ** (bits - 1)
    each = 8 // bits
    lanes = padded.reshape(len(codes), blocks, BLOCK // each, each) << (np.arange(each, dtype=np.uint8) * bits)
    return cast("NDArray[np.uint8]", np.bitwise_or.reduce(lanes, axis=-1))


def _name(node: onnx.NodeProto) -> str:
    """The attribute `name` of a node of our domain."""
    return cast(str, next(a.s for a in node.attribute if a.name == "name").decode())
