"""From a policy to the nodes of ONNX Runtime's optimised graph, without building it.

Three steps, each what the exporter or a stage of ONNX Runtime's optimiser does: the graph as it is written with its integer
nodes fused (here), then blocked layouts of floating-point convolutions and channels-last layouts of integer ones (`layouts.py`).
Blocks are as wide as the instruction set has them.
"""

from collections.abc import Sequence
from typing import Any

from tightrope.estimators.measured.layouts import block_layouts, blockable, channels_last
from tightrope.estimators.measured.nodes import Node, Tensor, Wide, product, share, up
from tightrope.estimators.measured.plan import Call, Constant, Op, Plan, Region
from tightrope.spaces.network import Network
from tightrope.spaces.points import points
from tightrope.spaces.policy import Policy
from tightrope.spaces.unit import Unit, units_of

MOVES = frozenset("MaxPool Reshape Transpose Flatten Squeeze Unsqueeze Slice Gather Expand Split Identity DepthToSpace".split())
RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
FUSED = {
    "Conv": "com.microsoft:QLinearConv", "Gemm": "com.microsoft:QGemm", "MatMul": "QLinearMatMul",
    "Add": "com.microsoft:QLinearAdd", "Mul": "com.microsoft:QLinearMul",
    "GlobalAveragePool": "com.microsoft:QLinearGlobalAveragePool", "AveragePool": "com.microsoft:QLinearAveragePool",
    "Concat": "com.microsoft:QLinearConcat", "Sigmoid": "com.microsoft:QLinearSigmoid",
    "LeakyRelu": "com.microsoft:QLinearLeakyRelu", "Softmax": "com.microsoft:QLinearSoftmax",
}  # fmt: skip
"""What ONNX Runtime makes of an operator whose tensors are all decoded from codes and whose result is coded at once."""
INTEGER = frozenset(FUSED.values())
ACTIVATIONS = {
    "Relu": (), "Sigmoid": (), "Tanh": (), "Clip": (0.0, 6.0), "LeakyRelu": (0.01,), "HardSigmoid": (0.2, 0.5), "HardSwish": (),
}  # fmt: skip
"""Activations that it fuses into a floating-point convolution, with parameters that stand for any."""
GEMM_ACTIVATIONS = frozenset({"Relu", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "Elu", "Softplus"})
INPUT = "input"  # what nodes that change the network's input belong to
FLOATING, SHIELDED = "floating", "shielded"
"""Marks of layers in floating point, and of ones that read codes and write codes (see `shielded` in the exporter)."""
PANEL, BLOCK = 16, 32
STEP = (("f", (), None), ("u", (), None))
"""Scale and zero point of a u8 tensor, as constant inputs."""


class _Value:
    """A tensor of the skeleton by form, `(is it codes, shape)`, as in the exporter."""

    __slots__ = ("coded", "forms", "shape")

    def __init__(self, forms: dict[tuple[bool, tuple[int, ...]], Tensor], shape: tuple[int, ...], coded: bool = False) -> None:
        self.forms, self.shape, self.coded = forms, shape, coded


class Lowering:
    """Lowers policies of one network; `plan` is what no policy changes, `block` the channels in a block (`layouts.BLOCKS`)."""

    def __init__(self, network: Network, plan: Plan, block: int) -> None:
        self.network, self.plan, self.block = network, plan, block
        self.merged: dict[str, list[str]] = {}
        self.reads: dict[str, int] = {}
        for name, region in plan.free.items():
            for inside in region.inside:
                self.merged.setdefault(inside, []).append(name)
        for step in plan.steps:
            for name in (step.source,) if isinstance(step, Call) else plan.pinned[step].reads:
                self.reads[name] = self.reads.get(name, 0) + 1
        for name in plan.outputs:
            self.reads[name] = self.reads.get(name, 0) + 1

    def nodes(self, policy: Policy) -> list[Node]:
        """The nodes of the optimised graph; those that change layout or precision belong to whatever made what they read."""
        nodes = fuse_activations(decode(_Graph(self, policy).run()), self.block)
        nodes = fuse_sums(channels_last(block_layouts(nodes, self.block)))
        for node in nodes:
            source: Node | None = node
            while source is not None and not source.layer:
                source = source.ins[0].maker if source.ins else None
            node.layer = source.layer if source is not None else INPUT
        return nodes


class _Graph:
    """One policy's graph as the exporter writes it, with integer nodes fused."""

    def __init__(self, owner: Lowering, policy: Policy) -> None:
        self.owner, self.plan, self.network, self.policy = owner, owner.plan, owner.network, policy
        self.widths = policy.all_widths(owner.network)
        self.sizes = self.plan.sizes(self.widths)
        held = points(owner.network, policy)
        self.held = {tensor for tensor, name in self.plan.points.items() if name in held}
        self.wanted = self.look_ahead()
        self.nodes: list[Node] = []
        self.values: dict[str, _Value] = {}

    def look_ahead(self) -> set[str]:
        """Tensors whose only use is to be held in 8 bits, at once or behind operators that only move them."""
        wanted, reads = set(self.held), self.owner.reads
        for step in reversed(self.plan.steps):
            if not isinstance(step, Call) and step in wanted:
                region = self.plan.pinned[step]
                if moves(region) and reads[region.reads[0]] == 1 and (step in self.held or reads[step] == 1):
                    wanted.add(region.reads[0])
        return wanted

    def run(self) -> list[Node]:
        for name in self.plan.inputs:
            shape = self.shape(self.plan.shapes[name])
            self.values[name] = _Value({(False, shape): Tensor(shape, False, self.plan.letters[name])}, shape)
            self.hold(name)
        for step in self.plan.steps:
            if isinstance(step, Call):
                self.call(step)
            else:
                self.operator(step)
        for name in self.plan.outputs:
            value = self.values[name]
            made = self.form(value, value.shape)
            if made.coded:
                made = dequantised(made, self.nodes)
            made.is_output = True
        return self.nodes

    # --- values ---------------------------------------------------------------------------------------------------

    def shape(self, slots: Sequence[int]) -> tuple[int, ...]:
        sizes = self.sizes
        return tuple([sizes[slot] for slot in slots])

    def form(self, value: _Value, shape: tuple[int, ...]) -> Tensor:
        """The value in a shape. Codes stay codes: `decode` decodes them for readers in floating point."""
        forms, coded = value.forms, value.coded
        if (coded, shape) not in forms:
            near = next(tensor for (c, _), tensor in forms.items() if c == coded)
            made = forms[coded, shape] = Tensor(shape, coded, near.letter)
            self.nodes.append(Node("Reshape", [near], [made], (), (None, ("l", (len(shape),), shape))))
        return forms[coded, shape]

    def hold(self, name: str) -> None:
        if name in self.held:
            self.values[name] = self.quantised(self.values[name])

    def quantised(self, value: _Value) -> _Value:
        """The value as codes: its maker becomes an integer node where it can, else a QuantizeLinear follows."""
        if value.coded:
            return value
        (_, shape), tensor = next(iter(value.forms.items()))
        maker = tensor.maker
        from_codes = maker is not None and bool(maker.ins) and not tensor.uses and all(t.coded for t in maker.ins)
        if maker is not None and from_codes and maker.kind in FUSED and maker.raw != FLOATING:
            fuse(maker)
            tensor.coded = True
            return _Value({(True, shape): tensor}, value.shape, True)
        if maker is not None and from_codes and maker.raw == FLOATING:
            maker.raw = SHIELDED
        made = Tensor(shape, True)
        self.nodes.append(Node("QuantizeLinear", [tensor], [made], (), (None, *STEP)))
        return _Value({(True, shape): made}, value.shape, True)

    # --- operators ------------------------------------------------------------------------------------------------

    def operator(self, name: str) -> None:
        """The nodes that make a tensor, merged with those before it where ONNX Runtime does."""
        if name in self.values:  # another output of operators that are there
            return self.hold(name)
        free, merged = self.plan.free.get(name), self.owner.merged.get(name, ())
        if merged and free is None and all(self.mergeable(other) for other in merged):
            return None
        self.emit(name, self.plan.pinned[name] if free is None or not self.mergeable(name) else free)
        return self.hold(name)

    def mergeable(self, name: str) -> bool:
        """Whether operators before this tensor merge: none of their tensors is held, and no product is of two coded ones."""
        region = self.plan.free[name]
        if not region.inside:
            return True
        if region.inside & self.held:
            return False
        pinned = self.plan.pinned
        products = [pinned[i] for i in (*region.inside, name) if i in pinned and pinned[i].raw == "MatMul"]
        return not any(all(r in self.values and self.values[r].coded for r in p.reads) for p in products)

    def emit(self, name: str, region: Region) -> None:
        for read in region.reads:
            if read not in self.values:  # merged away for others
                self.emit(read, self.plan.pinned[read])
                self.hold(read)
        first = self.values[region.reads[0]]
        if region.raw in ("Relu", "Clip") and name in self.wanted and not first.coded:
            self.values[name] = first  # the codes' limits are the activation's
            return
        on_codes = moves(region)
        if on_codes and name in self.wanted:
            first = self.quantised(first)
        if on_codes and len(region.ops) == 1 and region.raw in RESHAPES:
            self.values[name] = _Value(first.forms, self.shape(self.plan.shapes[name]), first.coded)
            return
        made = {
            read: self.form(v, v.shape) for read in region.reads for v in [first if read == region.reads[0] else self.values[read]]
        }
        for op in region.ops:
            self.nodes.append(self.node(op, region, made, self.plan.points.get(name, "")))
        for output in region.ops[-1].outputs:
            tensor = made[output]
            self.values[output] = _Value({(tensor.coded, tensor.shape): tensor}, tensor.shape, tensor.coded)

    def node(self, op: Op, region: Region, made: dict[str, Tensor], layer: str) -> Node:
        """A node as ONNX Runtime has it; one that only moves values moves codes, and they are decoded behind it."""
        constants = tuple(
            [None if isinstance(i, str) else "" if i is None else self.constant(i) for i in op.inputs]
        )  # fmt: skip
        ins = [made[i] for i in op.inputs if isinstance(i, str)]
        coded = op.kind in MOVES and bool(ins) and ins[0].coded
        outs = [Tensor(self.shape(self.plan.shapes[o]), coded, self.plan.letters[o]) for o in op.outputs]
        made |= zip(op.outputs, outs, strict=True)
        return Node(op.kind, ins, outs, op.attributes, constants, layer, region, region.raw)

    def constant(self, given: Constant) -> tuple[str, tuple[int, ...], tuple[int, ...] | str | None]:
        values = given.values
        return given.letter, self.shape(given.shape), self.shape(values) if isinstance(values, tuple) else values

    # --- layers ---------------------------------------------------------------------------------------------------

    def call(self, call: Call) -> None:
        """A layer's call: one node, or one for each factor of a low-rank layer."""
        layer = self.network.layer(call.layer)
        units = units_of(layer, self.policy.choice(call.layer), self.widths)
        value, out = self.values[call.source], self.shape(self.plan.shapes[call.made])
        channel = len(out) - 1 if layer.kind == "linear" else 1
        for unit in units:
            if unit.weight_bits <= 8 and unit.act_bits <= 8:
                value = self.quantised(value)
            inner = Wide(unit.out_channels, ("inner", unit.layer, unit.part))
            made, read = out[channel] if unit.part == len(units) - 1 else inner, value.shape[channel]
            if layer.kind != "linear":
                value = self.convolution(unit, value, read, made)
            elif unit.weight_bits < 32 and unit.act_bits == 32:
                value = self.weight_only(unit, value, read, (*out[:-1], made), unit.part == len(units) - 1)
            else:
                value = self.gemm(unit, value, read, (*out[:-1], made))
        self.values[call.made] = value
        self.hold(call.made)

    def gemm(self, unit: Unit, value: _Value, read: int, shape: tuple[int, ...]) -> _Value:
        rows = shape[0] if len(shape) == 2 else product(shape[:-1])
        x, made = self.form(value, (rows, read)), Tensor((rows, shape[-1]))
        bias = (("f", (shape[-1],), None),) if unit.bias else ()
        constants = (None, ("f", (shape[-1], read), None), *bias)
        raw = FLOATING if unit.weight_bits == 32 else ""
        self.nodes.append(Node("Gemm", [x], [made], (("transB", 1),), constants, unit.layer, None, raw))
        return _Value({(False, made.shape): made}, shape)

    def weight_only(self, unit: Unit, value: _Value, read: int, shape: tuple[int, ...], last: bool) -> _Value:
        lead, out = shape[:-1], shape[-1]
        n = up(out, PANEL) if product(lead) > 1 else out
        x, made = self.form(value, value.shape), Tensor((*lead, n))
        blocks = share(up(read, BLOCK), BLOCK)
        bias = ("", "", ("f", (n,), None)) if unit.bias else ()
        constants = (None, ("u", (n, blocks, BLOCK * unit.weight_bits // 8), None), ("f", (n, blocks), None), *bias)
        attributes = (("K", read), ("N", n), ("bits", unit.weight_bits), ("block_size", BLOCK))
        self.nodes.append(Node("com.microsoft:MatMulNBits", [x], [made], attributes, constants, unit.layer))
        if last and n != out:
            limits = (("l", (1,), (0,)), ("l", (1,), (out,)), ("l", (1,), (-1,)))
            whole, made = made, Tensor(shape)
            self.nodes.append(Node("Slice", [whole], [made], (), (None, *limits), unit.layer))
        return _Value({(False, made.shape): made}, made.shape)

    def convolution(self, unit: Unit, value: _Value, read: int, made: int) -> _Value:
        x, kernel, stride, padding, dilation = self.form(value, value.shape), unit.kernel, unit.stride, unit.padding, unit.dilation
        size = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
        tensor = Tensor((x.shape[0], made, *size))
        groups = read if unit.kind == "depthwise" else unit.groups
        each = 1 if unit.kind == "depthwise" else share(read, groups)
        bias = (("f", (made,), None),) if unit.bias else ()
        attributes = (
            ("dilations", dilation), ("group", groups), ("kernel_shape", kernel), ("pads", padding + padding), ("strides", stride),
        )  # fmt: skip
        constants = (None, ("f", (made, each, *kernel), None), *bias)
        raw = FLOATING if unit.weight_bits == 32 else ""
        self.nodes.append(Node("Conv", [x], [tensor], attributes, constants, unit.layer, None, raw))
        return _Value({(False, tensor.shape): tensor}, tensor.shape)


def moves(region: Region) -> bool:
    """Whether a region only moves the values of one tensor."""
    return len(region.reads) == 1 and all(op.kind in MOVES for op in region.ops)


def fuse(node: Node) -> None:
    """Make an integer node of one whose tensors are all codes and whose result becomes codes."""
    kind, node.kind = node.kind, FUSED[node.kind]
    if kind in ("Conv", "Gemm"):
        (_, shape, _), *bias = node.constants[1:]
        codes: list[Any] = [("i", shape[:1], None) for _ in bias]
        step = (("f", shape[:1], None), ("s", shape[:1], None))
        weight = ("s", shape, None)
        if kind == "Conv":
            node.constants = (None, *STEP, weight, *step, *STEP, *codes)
        else:
            node.attributes = (("alpha", 1.0), ("transA", 0), ("transB", 1))
            node.constants = (None, *STEP, weight, *step, *(codes or [""]), *STEP)
    elif kind == "Concat":
        node.constants = (*STEP, *[x for _ in node.ins for x in (None, *STEP)])
    elif len(node.ins) == 2:
        node.attributes, node.constants = (), (None, *STEP, None, *STEP, *STEP)
    else:
        node.constants = (None, *STEP, *STEP)


def dequantised(codes: Tensor, nodes: list[Node], by_channel: bool = False) -> Tensor:
    """The floating-point values of codes, by a node added to `nodes`."""
    made, channels = Tensor(codes.shape), codes.shape[1:2]
    step = (("f", channels, None), ("u", channels, None)) if by_channel else STEP
    nodes.append(Node("DequantizeLinear", [codes], [made], (("axis", 1),) if by_channel else (), (None, *step)))
    return made


def decode(nodes: list[Node]) -> list[Node]:
    """Put a DequantizeLinear in front of every floating-point reader of codes, one for each operator."""
    done: list[Node] = []
    made: dict[tuple[int, object], Tensor] = {}
    for node in nodes:
        if node.kind == "com.microsoft:QuickGelu" and node.ins[0].coded:  # each half reads codes decoded for itself
            gate = Tensor(node.out.shape)
            values = node.ins[0]
            done.append(Node("Sigmoid", [dequantised(values, done)], [gate], (), (), node.layer))
            done.append(Node("Mul", [dequantised(values, done), gate], [node.out], (), (None, None), node.layer))
            values.uses.remove(node)
            continue
        if not node.out.coded and node.kind not in INTEGER and node.kind != "DequantizeLinear" and any(t.coded for t in node.ins):
            if node.kind == "MatMul" and all(t.coded for t in node.ins):
                node.kind = "com.microsoft:MatMulIntegerToFloat"
                node.constants = (None, None, STEP[0], STEP[0], STEP[1], STEP[1])
                done.append(node)
                continue
            for index, tensor in enumerate(node.ins):
                if tensor.coded:
                    share = (id(tensor), node.region or node)
                    if share not in made:
                        made[share] = dequantised(tensor, done, node.raw == SHIELDED)
                    node.read(index, made[share])
        done.append(node)
    return done


def fuse_activations(nodes: list[Node], block: int) -> list[Node]:
    """Fuse an activation into the floating-point convolution or Gemm whose tensor it alone reads."""
    gone: set[int] = set()
    for node in nodes:
        if node.kind in ("Conv", "Gemm"):
            gone |= fuse_activation(node, node.out, block)
    return [node for node in nodes if id(node) not in gone]


def fuse_activation(node: Node, tensor: Tensor, block: int) -> set[int]:
    """Let a convolution or Gemm make what an activation makes of a tensor that it alone reads; the nodes that are then gone."""
    gone: set[int] = set()
    if not tensor.uses or tensor.is_output:
        return gone
    last = first = tensor.uses[0]
    known = first.raw in (ACTIVATIONS if node.kind == "Conv" else GEMM_ACTIVATIONS)
    if not known or any(u.region is not first.region for u in tensor.uses):
        return gone
    if first.raw == "HardSwish" and not blockable(node, block):
        return gone
    while id(last) not in gone:
        gone.add(id(last))
        following = [u for u in last.out.uses if u.region is first.region]
        last = following[0] if following else last
    node.make(last.out)
    parameters = (("activation_params", ACTIVATIONS[first.raw]),) if node.kind == "Conv" else ()
    node.attributes = (("activation", first.raw), *parameters, *node.attributes)
    node.kind = "com.microsoft:Fused" + node.kind
    return gone


def fuse_sums(nodes: list[Node]) -> list[Node]:
    """Fuse a sum, and an activation behind it, into the convolution without blocks whose tensor it alone reads.

    ONNX Runtime's `conv_add_act_fusion.cc`; of two convolutions the first.
    """
    gone: set[int] = set()
    moved: dict[int, Node] = {}
    for node in nodes:
        if node.kind != "Conv" or node.out.is_output or len(node.out.uses) != 1:
            continue
        (added,) = node.out.uses
        if added.kind != "Add" or len(added.ins) != 2 or added.ins[0].shape != added.ins[1].shape or id(added) in moved:
            continue
        other = added.ins[added.ins[0] is node.out]
        other.uses[other.uses.index(added)] = node
        node.ins.append(other)
        node.constants = (*node.constants, *([""] if len(node.constants) < 3 else []), None)
        moved[id(added)] = node
        fused = fuse_activation(node, added.out, 0)
        if not fused:
            node.make(added.out)
            node.kind = "com.microsoft:FusedConv"
        gone |= {id(node), *fused}
    return [moved.get(id(node), node) for node in nodes if id(node) not in gone]
