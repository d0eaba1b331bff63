"""Layouts that ONNX Runtime gives to convolutions, and the nodes that change layouts where they meet.

Floating-point convolutions run in blocks of channels where the processor has kernels for them, integer ones with channels last.
Both stages come to what ONNX Runtime's own do (`nchwc_transformer.cc`, `nhwc_transformer.cc` and the transpose optimiser of
version 1.32).
"""

from tightrope.estimators.measured.nodes import BLOCKED, Node, Tensor, up

BLOCKS = {"avx512": 16, "avx2": 8, "arm64": 0}
"""Channels in a block by instruction set: avx2 stands for any x86-64 without AVX-512, 0 for no blocks."""
_CONVOLUTIONS = frozenset({"Conv", "com.microsoft:FusedConv"})


class _Blocked:
    """A tensor that is also there in blocks; `uses` counts its readers in the plain graph, at first and still."""

    __slots__ = ("channels", "first_uses", "maker", "tensor", "uses")

    def __init__(self, tensor: Tensor, maker: Node, uses: int, channels: int) -> None:
        self.tensor, self.maker, self.first_uses, self.uses, self.channels = tensor, maker, uses, uses, channels


def blockable(node: Node, block: int) -> bool:
    """Whether a floating-point convolution can run in blocks."""
    if node.kind not in _CONVOLUTIONS or not block:
        return False
    out, each = map(int, node.constants[1][1][:2])
    groups = int(dict(node.attributes)["group"])
    if groups == 1:
        return each < block or each % 4 == 0
    if each == 1 and out == groups:
        return out % 4 == 0
    return each % block == 0 and out % groups == 0 and (out // groups) % block == 0


def block_layouts(nodes: list[Node], block: int) -> list[Node]:
    """Run convolutions and what follows them in blocks, with ReorderInput and ReorderOutput at the edges."""
    return _Blocking(block).run(nodes) if block else nodes


class _Blocking:
    def __init__(self, block: int) -> None:
        self.block = block
        self.blocked: dict[int, _Blocked] = {}
        self.reordered: dict[int, Tensor] = {}
        self.done: list[Node] = []
        self.keep: list[Tensor] = []  # plain tensors stay alive, so that their ids stay theirs

    def run(self, nodes: list[Node]) -> list[Node]:
        for node in nodes:
            if blockable(node, self.block):
                self.convolution(node)
                added = True
            elif len(node.outs) == 1 and node.ins and node.out.maker is node:
                added = self.other(node)
            else:
                added = True
            if added:
                self.done.append(node)
        for given in list(self.blocked.values()):
            if given.uses > 0:
                self.leave(given)
        return self.done

    def enter(self, tensor: Tensor) -> Tensor:
        """The tensor in blocks, by a ReorderInput that all its readers share."""
        if id(tensor) not in self.reordered:
            batch, channels, *size = tensor.shape
            made = self.reordered[id(tensor)] = Tensor((batch, self.padded(channels), *size))
            self.done.append(Node(BLOCKED + "ReorderInput", [tensor], [made], (("channels_last", 0),), (None,)))
        return self.reordered[id(tensor)]

    def leave(self, given: _Blocked) -> None:
        """Make the plain tensor again, from blocks."""
        plain = next(t for t in self.keep if self.blocked.get(id(t)) is given)
        attributes = (("channels", given.channels), ("channels_last", 0))
        self.done.append(Node(BLOCKED + "ReorderOutput", [given.tensor], [plain], attributes, (None,)))

    def read(self, node: Node, index: int) -> _Blocked | None:
        """Read an input in blocks where it is there so."""
        found = self.blocked.get(id(node.ins[index]))
        if found is not None:
            node.read(index, found.tensor)
            found.uses -= 1
        return found

    def write(self, node: Node, channels: int, maker: Node | None = None) -> None:
        """Make the output in blocks; what it was stays known by its plain tensor."""
        plain = node.out
        uses = len(plain.uses) + plain.is_output
        self.keep.append(plain)
        if maker is None:
            batch, _, *size = plain.shape
            node.make(Tensor((batch, self.padded(channels), *size)))
            maker = node
        self.blocked[id(plain)] = _Blocked(maker.out, maker, uses, channels)

    def padded(self, channels: int) -> int:
        """Channels rounded up to whole blocks."""
        return up(channels, self.block)

    def convolution(self, node: Node) -> None:
        """Run a convolution in blocks; one of fewer channels than a block reads the plain tensor."""
        (_, (out, each, *kernel), _), *bias = node.constants[1:]
        attributes, wide = dict(node.attributes), self.padded(out)
        blocked = attributes["group"] > 1 or each >= self.block
        if attributes["group"] > 1 and each == 1:
            attributes["group"] = wide
        elif blocked and attributes["group"] == 1:
            each = self.padded(each)
        node.kind = BLOCKED + "Conv"
        node.attributes = tuple(attributes.items())
        node.constants = (None, ("f", (wide, each, *kernel), None), *[("f", (wide,), None) for _ in bias])
        if blocked and self.read(node, 0) is None:
            node.read(0, self.enter(node.ins[0]))
        self.write(node, out)

    def other(self, node: Node) -> bool:
        """Whether the node stays; one that is fused into a convolution does not."""
        kind, shape = node.kind, node.ins[0].shape
        if kind in ("MaxPool", "AveragePool") and not node.ins[0].coded and len(shape) == 4 and shape[1] % self.block == 0:
            node.kind = BLOCKED + kind
            if self.read(node, 0) is None:
                node.read(0, self.enter(node.ins[0]))
            self.write(node, shape[1])
            return True
        if kind == "BatchNormalization" and id(node.ins[0]) in self.blocked:
            wide = self.padded(shape[1])
            node.kind, node.attributes = BLOCKED + "Conv", (("group", wide),)
            node.constants = (None, ("f", (wide, 1, 1, 1), None), ("f", (wide,), None))
            self.read(node, 0)
            self.write(node, shape[1])
            return True
        found = [self.blocked.get(id(t)) for t in node.ins]
        if any(f is None for f in found) or any(c is not None and c != "" for c in node.constants if len(node.ins) > 1):
            return True
        there = [f for f in found if f is not None]
        if kind in ("Add", "Sum", "Mul"):
            return self.binary(node, there)
        if kind == "Concat" and dict(node.attributes).get("axis") == 1:
            if all(f.channels % self.block == 0 for f in there):
                for index in range(len(there)):
                    self.read(node, index)
                self.write(node, node.out.shape[1])
        elif kind in ("Relu", "Sigmoid", "Tanh"):
            return self.activation(node, there[0])
        elif kind == "com.microsoft:QuickGelu":
            self.read(node, 0)
            self.write(node, there[0].channels)
        elif kind in ("GlobalAveragePool", "GlobalMaxPool") and shape[1] % self.block == 0:
            node.kind = BLOCKED + kind
            self.read(node, 0)
            self.write(node, shape[1])
        return True

    def binary(self, node: Node, there: list[_Blocked]) -> bool:
        if len({t.shape for t in node.ins}) > 1:
            return True
        for index in range(len(there)):
            self.read(node, index)
        if node.kind != "Mul" and len(there) == 2:
            for given, other in (there, reversed(there)):
                conv = given.maker
                fits = conv.kind == BLOCKED + "Conv" and given.first_uses == 1 and "activation" not in dict(conv.attributes)
                if fits and len(conv.ins) == 1:
                    conv.constants = (*conv.constants, *([""] if len(conv.constants) < 3 else []), None)
                    conv.ins.append(other.tensor)
                    other.tensor.uses.append(conv)
                    self.done.remove(conv)  # it runs where the sum stood
                    self.done.append(conv)
                    self.write(node, given.channels, conv)
                    return False
        self.write(node, there[0].channels)
        return True

    def activation(self, node: Node, given: _Blocked) -> bool:
        self.read(node, 0)
        conv = given.maker
        if conv.kind == BLOCKED + "Conv" and given.first_uses == 1 and "activation" not in dict(conv.attributes):
            conv.attributes = (("activation", node.kind), ("activation_params", ()), *conv.attributes)
            self.write(node, given.channels, conv)
            return False
        self.write(node, given.channels)
        return True


# --- channels last ------------------------------------------------------------------------------------------------------

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
SIMPLE = frozenset(
    "Relu Sigmoid Tanh LeakyRelu HardSigmoid HardSwish Elu Softsign Erf Sqrt Exp Log Abs Neg Reciprocal Floor Ceil Sign Softplus "
    "Selu Identity Cast Clip QuantizeLinear DequantizeLinear com.microsoft:QLinearSigmoid com.microsoft:QLinearLeakyRelu".split()
)
BROADCAST = frozenset("Add Sub Mul Div Max Min Pow Sum com.microsoft:QLinearAdd com.microsoft:QLinearMul".split())
POOLS = frozenset({"com.microsoft:QLinearGlobalAveragePool", "com.microsoft:QLinearAveragePool"})
OTHERS = frozenset({"Concat", "com.microsoft:QLinearConcat", "Transpose", "MaxPool", "Softmax", "ReduceMean", "ReduceSum"})
HANDLED = SIMPLE | BROADCAST | POOLS | OTHERS


def rank(shape: tuple[int, ...]) -> int:
    """The number of axes longer than one."""
    return sum(size != 1 for size in shape)


def permuted(shape: tuple[int, ...], perm: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([shape[axis] for axis in perm])


def inverse(perm: tuple[int, ...]) -> tuple[int, ...]:
    found = [0] * len(perm)
    for place, axis in enumerate(perm):
        found[axis] = place
    return tuple(found)


def perm_of(node: Node | None) -> tuple[int, ...] | None:
    return dict(node.attributes)["perm"] if node is not None and node.kind == "Transpose" else None


def channels_last(nodes: list[Node]) -> list[Node]:
    """Run integer convolutions with channels last, and move or cancel the transposes around them as ONNX Runtime does."""
    convolutions = [n for n in nodes if n.kind == "com.microsoft:QLinearConv"]
    if not convolutions:
        return nodes
    graph = _Transposes(nodes)
    for node in convolutions:
        node.attributes = (("channels_last", 1), *node.attributes)
        graph.turn(node, 0, TO_LAST)
        graph.turn_output(node, TO_FIRST)
    return graph.optimise()


class _Transposes:
    """A graph in which transposes are added, pushed and cancelled."""

    def __init__(self, nodes: list[Node]) -> None:
        self.before: dict[int, list[Node]] = {}
        self.gone: set[int] = set()
        self.nodes = nodes
        self.behind: dict[int, list[Node]] = {}

    def transpose(self, tensor: Tensor, perm: tuple[int, ...], made: Tensor | None = None) -> Node:
        made = made or Tensor(permuted(tensor.shape, perm), tensor.coded, tensor.letter)
        return Node("Transpose", [tensor], [made], (("perm", perm),), (None,))

    def drop_unread(self, node: Node) -> None:
        if not node.out.uses and not node.out.is_output:
            node.ins[0].uses.remove(node)
            self.gone.add(id(node))

    def turn(self, node: Node, index: int, perm: tuple[int, ...]) -> None:
        """Let a node read an input transposed: cancelled or merged with a transpose before it, shared, or by a new one."""
        tensor = node.ins[index]
        maker = tensor.maker
        second = perm_of(maker)
        if maker is not None and second is not None and id(maker) not in self.gone:
            source = maker.ins[0]
            if inverse(second) == perm:
                node.read(index, source)
            else:
                made = self.transpose(source, tuple(second[axis] for axis in perm))
                self.before.setdefault(id(node), []).append(made)
                node.read(index, made.out)
            self.drop_unread(maker)
            return
        for reader in tensor.uses:
            if perm_of(reader) == perm and id(reader) not in self.gone:
                node.read(index, reader.out)
                return
        made = self.transpose(tensor, perm)
        self.before.setdefault(id(node), []).append(made)
        node.read(index, made.out)

    def turn_output(self, node: Node, perm: tuple[int, ...]) -> None:
        """Let a node make its output in another order, and a transpose behind it the old one."""
        old = node.out
        node.make(Tensor(permuted(old.shape, inverse(perm)), old.coded, old.letter))
        self.behind.setdefault(id(node), []).insert(0, self.transpose(node.out, perm, old))

    def ordered(self) -> list[Node]:
        found: list[Node] = []

        def add(node: Node) -> None:
            for extra in self.before.get(id(node), ()):
                add(extra)
            found.append(node)
            for extra in self.behind.get(id(node), ()):
                add(extra)

        for node in self.nodes:
            add(node)
        return [node for node in found if id(node) not in self.gone]

    def optimise(self) -> list[Node]:
        nodes = self.ordered()
        leading: set[int] = set()
        for node in reversed(nodes):
            if node.kind == "Transpose":
                leading.add(id(node.ins[0]))
            elif id(node.out) in leading and node.kind in HANDLED:
                leading |= {id(t) for t in node.ins}
        for node in nodes:
            if id(node) in self.gone or node.kind not in HANDLED:
                continue
            for tensor in node.ins:
                perm = perm_of(tensor.maker)
                if perm is not None and tensor.maker is not None and self.push(node, tensor.maker, perm, leading):
                    break
        nodes = self.ordered()
        for node in nodes:
            if node.kind == "Transpose":
                self.lift(node)
        return self.ordered()

    def push(self, node: Node, transpose: Node, perm: tuple[int, ...], leading: set[int]) -> bool:
        """Push a transpose through a node where ONNX Runtime deems it worth it."""
        kind, back = node.kind, inverse(perm)
        if kind == "Transpose":
            own = dict(node.attributes)["perm"]
            whole = tuple(perm[axis] for axis in own)
            node.read(0, transpose.ins[0])
            if whole == tuple(range(len(whole))) and not node.out.is_output:
                for reader in list(node.out.uses):
                    reader.read(reader.ins.index(node.out), transpose.ins[0])
                self.drop_unread(node)
            node.attributes = (("perm", whole),)
            self.drop_unread(transpose)
            return True
        if kind in BROADCAST and any(len(t.shape) != len(perm) for t in node.ins):
            return False
        pushed = kind == "MaxPool" and node.ins[0].coded
        if not pushed:
            cost = sum(self.cost(t, back) for t in node.ins)
            if cost < 0 and id(node.out) not in leading:
                cost += rank(node.out.shape)
            if cost >= 0:
                return False
        if kind in POOLS or kind == "MaxPool":
            if perm != TO_FIRST or not node.ins[0].coded:
                return False
            if kind == "MaxPool":
                node.kind = "com.microsoft:NhwcMaxPool"
                node.attributes = tuple((k, v) for k, v in node.attributes if k != "storage_order")  # of indices, which it lacks
            else:
                node.attributes = tuple((k, 1 if k == "channels_last" else v) for k, v in node.attributes)
        elif kind in ("Concat", "com.microsoft:QLinearConcat", "Softmax"):
            node.attributes = tuple((k, perm[v] if k == "axis" else v) for k, v in node.attributes)
        elif kind in ("ReduceMean", "ReduceSum"):
            axes = node.constants[1] if len(node.constants) > 1 else None
            if not axes or not isinstance(axes[2], tuple) or not dict(node.attributes).get("keepdims", 1):
                return False
            turned = tuple(sorted(perm[int(axis)] for axis in axes[2]))
            node.constants = (None, (axes[0], axes[1], turned), *node.constants[2:])
        for index in range(len(node.ins)):
            self.turn(node, index, back)
        self.turn_output(node, perm)
        return True

    def cost(self, tensor: Tensor, perm: tuple[int, ...]) -> int:
        """What transposing an input costs: less than nothing where it cancels one that all readers can do without."""
        second = perm_of(tensor.maker)
        if second is None:
            return rank(tensor.shape)
        removable = not tensor.is_output and all(u.kind in HANDLED for u in tensor.uses)
        return -rank(tensor.shape) if second == inverse(perm) and removable else 0

    def lift(self, node: Node) -> None:
        """Move a transpose above the DequantizeLinear that it alone reads, where it handles fewer bytes."""
        maker = node.ins[0].maker
        if maker is None or maker.kind != "DequantizeLinear" or len(node.ins[0].uses) > 1 or node.ins[0].is_output:
            return
        if any(u.kind == "QuantizeLinear" for u in node.out.uses):
            return
        codes, values, old = Tensor(node.out.shape, True), node.out, Tensor(node.out.shape)
        node.make(old)
        step = (("f", (), None), ("u", (), None))
        code = Node("QuantizeLinear", [old], [codes], (), (None, *step))
        self.behind.setdefault(id(node), []).extend([code, Node("DequantizeLinear", [codes], [values], (), (None, *step))])
