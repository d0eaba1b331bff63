"""The bytes that ONNX Runtime's arena holds while it runs a graph, from the graph's nodes alone.

From the second call on, all tensors between nodes lie in one block, whose layout ONNX Runtime worked out in the first; a kernel's
workspace is taken from the arena while it runs, and the arena keeps what it took until the call ends. The rules are those of
version 1.32 on x86-64 (`allocation_planner.cc`, `mem_pattern_planner.h`, `bfc_arena.cc`, `qlinearconv.cc`, `convolve.cpp`).
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tightrope.estimators.measured.grid import step_of
from tightrope.estimators.measured.lowering import INTEGER
from tightrope.estimators.measured.nodes import BLOCKED, ITEM_BYTES, Node, Tensor, written_over

STEP = 256  # bytes that sizes are rounded up to
VIEWS = frozenset("Flatten Identity Reshape Squeeze Unsqueeze".split())
SEGMENT = 1 << 16  # bytes in which a floating-point convolution unfolds its image, part by part
Like = tuple[tuple[int, ...], int]
"""Shape and bytes of an item: what a tensor must have in common with another to take its memory."""


def arena_bytes(nodes: Sequence[Node], block: int) -> int:
    """The most bytes that the arena holds in a call, from the second on: tensors between nodes, and workspaces of kernels.

    Weights are not in it, nor are the model's inputs and outputs, which are the caller's. The arena is one that takes what it is
    asked for and no more (`kSameAsRequested`), and is shrunk between calls.

    Args:
        nodes: the optimised graph, in any order.
        block: channels in a block (`layouts.BLOCKS`).
    """
    order = executed(nodes)
    return block_bytes(order) + workspace_bytes(order, block)


# --- the order of execution ---------------------------------------------------------------------------------------------

LAST = 6  # stage of the optimiser


def executed(nodes: Sequence[Node]) -> list[Node]:
    """The nodes in the order in which they run.

    ONNX Runtime goes back from the outputs, first to that input whose maker is the youngest; and each stage of its optimiser makes
    its nodes in the order that held before it. So the order is found stage by stage.
    """
    maker = {id(tensor): i for i, node in enumerate(nodes) for tensor in node.outs}
    before = [[maker[id(t)] for t in node.ins if id(t) in maker] for node in nodes]
    read = {i for makers in before for i in makers}
    ends = [i for i in range(len(nodes)) if i not in read]
    stages, ages = _stages(nodes), [(0, i) for i in range(len(nodes))]
    for stage in range(LAST + 1):
        for place, i in enumerate(_backwards(ends, before, ages)):
            if stage and stage in stages[i]:
                ages[i] = stage, place
            elif stage < stages[i][0] and before[i]:  # not there yet: its reader reads what it will read
                ages[i] = ages[before[i][0]]
    return [nodes[i] for i in _backwards(ends, before, ages)]


def _backwards(ends: Sequence[int], before: Sequence[Sequence[int]], ages: Sequence[tuple[int, int]]) -> list[int]:
    order: list[int] = []
    seen: set[int] = set()
    waiting = [(i, False) for i in sorted(ends, key=ages.__getitem__)]
    while waiting:
        i, done = waiting.pop()
        if done:
            order.append(i)
        elif i not in seen:
            seen.add(i)
            waiting.append((i, True))
            waiting += [(j, False) for j in sorted(before[i], key=ages.__getitem__)]
    return order


def _stages(nodes: Sequence[Node]) -> list[tuple[int, ...]]:
    """The stages of the optimiser in which each node is made, or made anew.

    0 is the file as it is written; 1 gives every reader of codes a DequantizeLinear of its own; 2 fuses; 3 makes blocks, and 4 what
    leads out of them; 5 puts channels last; 6 moves transposes through DequantizeLinear.
    """
    decoded: set[int] = set()
    moved: set[int] = set()

    def of(node: Node) -> tuple[int, ...]:
        kind, source = node.kind, node.ins[0] if node.ins else None
        made = source.maker.kind if source is not None and source.maker is not None else ""
        first = id(_plain(source)) not in decoded
        if kind == "DequantizeLinear" or kind in INTEGER:
            decoded.update(id(_plain(t)) for t in node.ins if t.coded)
        if kind.startswith(BLOCKED):
            return (4,) if kind.endswith("ReorderOutput") else (3,) if kind.endswith("ReorderInput") else (0, 3)
        if kind == "com.microsoft:QLinearConv":
            return 0, 2, 5
        if (made == "DequantizeLinear" and kind == "Transpose") or id(source) in moved:
            if kind != "DequantizeLinear":
                moved.add(id(node.out))
            return (6,)
        if kind == "Transpose" and node.out.coded and not node.raw:
            return (5,)
        if kind == "DequantizeLinear":
            return (0,) if first else (1,)
        return (0, 2) if kind.startswith("com.microsoft:") else (0,)

    return [of(node) for node in nodes]


def _plain(tensor: Tensor | None) -> Tensor | None:
    """The codes that a Transpose has laid out otherwise, or the tensor itself."""
    maker = None if tensor is None else tensor.maker
    if maker is not None and maker.kind == "Transpose" and maker.out.coded and not maker.raw:
        return maker.ins[0]
    return tensor


# --- tensors between nodes ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Buffer:
    """Memory that tensors of one shape take one after another: from the step that makes the first to that of the last reader.

    It is kept in between. `readers` are yet to come.
    """

    like: Like
    first: int
    last: int = 0
    readers: int = 0

    @property
    def size(self) -> int:
        return _stepped(prod(self.like[0]) * self.like[1])


def block_bytes(order: Sequence[Node]) -> int:
    """Bytes of the block in which all tensors between nodes lie: each is put into the gap that it fills best, or behind all.

    What is behind all, up to where the block ends so far, is a gap too.
    """
    begun: dict[int, list[_Buffer]] = {}
    for buffer in _buffers(order):
        begun.setdefault(buffer.first, []).append(buffer)
    there: list[tuple[int, int, int]] = []  # where each buffer begins and ends, and its last step
    most = 0
    for step in range(len(order)):
        for buffer in begun.get(step, ()):
            size, before, least = buffer.size, 0, None
            start, place = (there[-1][1] if there else 0), len(there)
            for i, (begin, end, _) in enumerate(there):
                left = begin - before - size
                if left >= 0 and (least is None or left < least):
                    start, place, least = before, i, left
                before = end
            left = most - before - size
            if least is not None and 0 <= left < least:
                start, place = before, len(there)
            there.insert(place, (start, start + size, buffer.last))
            most = max(most, start + size)
        there = [x for x in there if x[2] > step]
    return most


def _buffers(order: Sequence[Node]) -> list[_Buffer]:
    """The buffers of tensors that nodes make and that are not the model's outputs, by the step in which they are first needed."""
    reads = Counter(id(tensor) for node in order for tensor in node.ins)
    held: dict[int, _Buffer] = {}
    found: list[_Buffer] = []
    free: list[_Buffer] = []  # latest first
    for step, node in enumerate(order):
        for tensor in node.outs:
            if tensor.is_output:
                continue
            if node.kind in VIEWS:
                buffer = held.get(id(node.ins[0]))
            else:
                buffer = _taken(node, tensor, held, free)
                if buffer is None:
                    buffer = _Buffer(_like(tensor), step)
                    found.append(buffer)
            if buffer is not None:  # else a view of the model's input
                held[id(tensor)] = buffer
                buffer.readers += reads[id(tensor)]
                buffer.last = step
        for tensor in node.ins:
            buffer = held.get(id(tensor))
            if buffer is not None:
                buffer.readers, buffer.last = buffer.readers - 1, step
                if not buffer.readers:
                    free.insert(0, buffer)
    return found


def _taken(node: Node, tensor: Tensor, held: dict[int, _Buffer], free: list[_Buffer]) -> _Buffer | None:
    """Memory that a tensor takes over: that of the node's own input where it works in place, else one of the same shape."""
    like = _like(tensor)
    over = written_over(node.kind, len(node.ins))
    if over is not None:
        source = node.ins[over]
        own = held.get(id(source))
        if own is not None and own.readers == 1 and _like(source) == like:
            return own
    return next((free.pop(i) for i, buffer in enumerate(free) if buffer.like == like and like[0]), None)


def _like(tensor: Tensor) -> Like:
    return tuple([int(size) for size in tensor.shape]), ITEM_BYTES.get(tensor.type, 1)


def _stepped(size: int) -> int:
    return -(-size // STEP) * STEP


# --- workspaces of kernels ----------------------------------------------------------------------------------------------


def workspace_bytes(order: Sequence[Node], block: int) -> int:
    """Bytes that the arena takes for workspaces: a kernel gets the least piece that is there and large enough, or a new one."""
    pieces: list[int] = []  # by size; they are never joined
    for node in order:
        free = list(pieces)
        for size in map(_stepped, workspaces(node, block)):
            at = bisect_left(free, size)
            if at == len(free):
                insort(pieces, size)
            else:
                piece = free.pop(at)
                if piece >= 2 * size:
                    insort(free, piece - size)
    return sum(pieces)


def workspaces(node: Node, block: int) -> list[int]:
    """Bytes that a node's kernel asks the arena for, one after another, and holds until it ends."""
    attributes = dict(node.attributes)
    match node.kind:
        case "com.microsoft:QGemm":
            return [4 * prod(_like(node.out)[0])] if node.out.coded else []
        case "com.microsoft:QLinearConv":
            return _integer(node.out, node.constants[3][1], attributes, step_of(block))
        case "Conv" | "com.microsoft:FusedConv":
            outputs, each, *kernel = map(int, node.constants[1][1])
            pixels = prod(_like(node.out)[0][2:])
            unfolded = 4 * each * prod(kernel) * pixels if outputs // int(attributes["group"]) > pixels else SEGMENT
            return [unfolded] if _unfolds(kernel, attributes) else []
    return []


def _integer(out: Tensor, weight: Sequence[int], attributes: dict[str, Any], step: int) -> list[int]:
    """Of an integer convolution: 32-bit sums, and its image unfolded or pointers into it for every tap, for one image at a time.

    The kernel for outputs in whole steps (`grid.step_of`) needs no sums, and its pointers for all images at once.
    """
    (batch, *size, made), (outputs, each, *kernel) = _like(out)[0], map(int, weight)
    groups, taps, pixels = int(attributes["group"]), prod(kernel), prod(size)
    depthwise = groups > 1 and each == 1 and outputs == groups
    if depthwise:
        return [8 * taps * pixels * batch] if groups % 16 == 0 else [4 * made * pixels, 8 * taps * pixels]
    unfolds = _unfolds(kernel, attributes)
    if groups == 1 and each % 4 == 0 and outputs % step == 0 and outputs >= 16:
        return [8 * taps * pixels * batch] if unfolds else []
    return [4 * made * pixels, *([each * taps * pixels] if unfolds else [])]


def _unfolds(kernel: Sequence[int], attributes: dict[str, Any]) -> bool:
    """Whether a convolution is more than a product of matrices."""
    return prod(kernel) > 1 or any(s != 1 for s in attributes["strides"]) or any(attributes["pads"])
