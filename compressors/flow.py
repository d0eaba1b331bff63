"""Which channels are tied: an analysis that sends labels through the graph.

Every output channel of every layer gets a label of its own, every element of a small parameter too. Labels then flow
through the operators: what only moves values (views, transposes, concats, windows) is run on the labels themselves; what
combines values ties labels that meet (additions, norms, attention heads, depthwise convolutions); what cannot be cut
safely freezes them, with a reason. What is tied in the end is a *channel* that is cut as a whole, and channels that occur
equally often everywhere form a *group*: how many of them a policy keeps is its width.

This file has the labels; `ties.py` makes groups of them.
"""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from tightrope.compressors.capture import base, tensor_of

Labels = NDArray[np.int64]  # of a tensor's rank, full size or 1 along each dimension; 0 is "not a channel"
MOST_PARAMETER = 1 << 20  # elements of a parameter outside of layers that gets labels
FIXED = 0

MOVES = frozenset(
    """view reshape _unsafe_view unflatten flatten permute transpose t squeeze unsqueeze expand expand_as contiguous clone
    slice select split split_with_sizes chunk unbind getitem cat stack concat repeat roll flip pad constant_pad_nd movedim swapaxes
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle narrow index repeat_interleave tile squeeze_ view_as
    reshape_as unfold im2col numpy_T mT""".split()
)
SAME = frozenset("to _to_copy type_as float half double bfloat16 softmax _softmax log_softmax _log_softmax cumsum".split())
ALONG = {"softmax": 1, "_softmax": 1, "log_softmax": 1, "_log_softmax": 1, "cumsum": 1}
POOLS = {
    "max_pool2d": 2, "avg_pool2d": 2, "adaptive_avg_pool2d": 2, "adaptive_max_pool2d": 2, "upsample_nearest2d": 2,
    "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "max_pool1d": 1, "avg_pool1d": 1, "adaptive_avg_pool1d": 1,
    "upsample_nearest1d": 1, "upsample_linear1d": 1, "adaptive_max_pool1d": 1, "lp_pool2d": 2,
}  # fmt: skip
REDUCES = frozenset("mean sum amax amin var std logsumexp norm linalg_vector_norm prod argmax argmin any all max min".split())
SIZES = frozenset("sym_size sym_numel numel".split())


class Recorder(fx.Interpreter):
    """Runs the graph once, keeping every tensor's shape, every number, and the values of what no input reaches."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.values: dict[fx.Node, Any] = {}
        self.items: dict[fx.Node, int] = {}
        self._constant: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
            self.items[n] = value.element_size()
        if n.op != "placeholder" and all(a in self._constant for a in n.all_input_nodes):
            self._constant.add(n)
        if not isinstance(value, Tensor) or (n in self._constant and value.numel() <= MOST_PARAMETER):
            self.values[n] = value
        if isinstance(value, Tensor) and value.is_floating_point():
            self.items[n] = value.element_size()
        elif isinstance(value, Tensor):
            self.items[n] = -value.element_size()  # negative: not floating point
        return value


class Analysis:
    """The labels of one graph, for one set of inputs."""

    def __init__(self, graph: fx.GraphModule, args: Iterable[Any]) -> None:
        self.graph = graph
        self.record = Recorder(graph)
        with torch.no_grad():
            self.record.run(*args, enable_io_processing=False)
        self.next = 1
        self.labels: dict[fx.Node, Any] = {}
        self.ties: list[tuple[Labels, Labels]] = []
        self.icy: list[tuple[Labels, str]] = []
        self.still: list[tuple[Labels, int, str]] = []
        self.outs: dict[str, Labels] = {}
        self.ins: dict[str, Labels] = {}
        self.reads: dict[str, Labels] = {}
        self.parameters: dict[str, Labels] = {}
        for node in graph.graph.nodes:
            self.labels[node] = self._visit(node)

    # ---- helpers

    def fresh(self, count: int) -> Labels:
        self.next += count
        return np.arange(self.next - count, self.next, dtype=np.int64)

    def tie(self, a: Labels, b: Labels) -> None:
        """Tie labels that stand at the same place; a label opposite none of its own is frozen."""
        a, b = np.broadcast_arrays(a, b)
        both = (a != FIXED) & (b != FIXED)
        self.ties.append((a[both], b[both]))
        alone = (a != FIXED) ^ (b != FIXED)
        if alone.any():
            self.freeze(np.maximum(a, b)[alone], "it meets values that are not channels")

    def freeze(self, labels: Labels, reason: str) -> None:
        self.icy.append((labels[labels != FIXED].ravel(), reason))

    def full(self, node: fx.Node) -> Labels:
        labels = self.labels.get(node)
        shape = self.record.shapes[node]
        return np.broadcast_to(np.zeros((1,) * len(shape), np.int64) if labels is None else labels, shape)

    def get(self, value: Any) -> Labels | None:
        found = self.labels.get(value) if isinstance(value, fx.Node) else None
        return found if isinstance(found, np.ndarray) else None

    def number(self, value: Any) -> Any:
        """A concrete value for an argument that may be a node."""
        if isinstance(value, fx.Node):
            return self.record.values[value]
        return [self.number(v) for v in value] if isinstance(value, (list, tuple)) else value

    def column(self, labels: Labels, dim: int) -> Labels:
        """The labels along one dimension, after tying everything else together at each index of it."""
        moved = np.moveaxis(labels, dim, -1).reshape(-1, labels.shape[dim])
        if len(moved) > 1:
            self.tie(moved[1:], moved[:1])
        line: Labels = moved[0]
        return line

    # ---- one operator

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return None
        if node.op == "get_attr":
            return self._tensor(node)
        if node.op == "call_module":
            return self._layer(node)
        given = [a for a in node.all_input_nodes if self.labels.get(a) is not None]
        if node.op == "output" or not given:
            for source in given:
                for labels in self.labels[source] if isinstance(self.labels[source], list) else [self.labels[source]]:
                    if labels is not None:
                        self.freeze(labels, "the model returns it")
            return None
        name = base(node)
        if name in SIZES:
            return None
        rule = getattr(self, f"_on_{name}", None)
        try:
            if rule is not None:
                return rule(node)
            if node.target is operator.getitem:
                return self._on_getitem(node)
            if name in POOLS:
                return self._pool(node, POOLS[name])
            if name in REDUCES:
                return self._reduce(node)
            if name in SAME:
                return self._same(node, name)
            if name in MOVES:
                return self._move(node)
            if torch.Tag.pointwise in getattr(node.target, "tags", ()):
                return self._pointwise(node)
        except (ValueError, IndexError, TypeError, KeyError, RuntimeError) as error:
            return self._unknown(node, given, f"{name} at {node.name} could not be followed ({error})")
        return self._unknown(node, given, f"operator {name} is not understood")

    def _unknown(self, node: fx.Node, given: list[fx.Node], reason: str) -> None:
        for source in given:
            found = self.labels[source]
            for labels in found if isinstance(found, list) else [found]:
                if labels is not None:
                    self.freeze(labels, reason)

    def _tensor(self, node: fx.Node) -> Labels | None:
        if str(node.target) in self.parameters:
            return self.parameters[str(node.target)]
        value = tensor_of(self.graph, str(node.target))
        if not value.is_floating_point() or not 1 < value.numel() <= MOST_PARAMETER:
            return None
        self.parameters[str(node.target)] = self.fresh(value.numel()).reshape(tuple(value.shape))
        return self.parameters[str(node.target)]

    def _layer(self, node: fx.Node) -> Labels | None:
        module: Any = self.graph.get_submodule(str(node.target))
        name, source = str(node.target), node.args[0]
        assert isinstance(source, fx.Node)
        dim = 1 if isinstance(module, nn.Conv2d) else len(self.record.shapes[source]) - 1
        labels = self.labels.get(source)
        size = self.record.shapes[source][dim]
        reads = np.zeros(size, np.int64)
        if labels is not None:
            reads = np.broadcast_to(self.column(labels, dim), size)
        if name in self.outs:
            self.tie(reads, self.reads[name])
        else:
            outputs = module.weight.shape[0]
            groups = module.groups if isinstance(module, nn.Conv2d) else 1
            self.reads[name] = reads
            inner = reads.reshape(groups, -1)
            if groups > 1 and inner.shape[1] == 1 and outputs == groups:
                self.ins[name], self.outs[name] = np.zeros(1, np.int64), self.fresh(outputs)
                self.tie(self.outs[name], reads)
            else:
                if groups > 1:
                    self.tie(inner[1:], inner[:1])
                self.ins[name] = inner[0]
                each = outputs // groups
                self.outs[name] = np.tile(self.fresh(each) if each > 1 else np.zeros(1, np.int64), groups)
        rank = len(self.record.shapes[node])
        return self.outs[name].reshape([-1 if d == (1 if isinstance(module, nn.Conv2d) else rank - 1) else 1 for d in range(rank)])

    def _pointwise(self, node: fx.Node) -> Labels | None:
        """Operands tie where their labels meet; one that is broadcast where the labels vary does not take part."""
        rank = len(self.record.shapes[node])
        found = np.zeros((1,) * rank, np.int64)
        sizes = (1,) * rank
        for source in node.all_input_nodes:
            if source not in self.record.shapes:
                continue
            own = (1,) * (rank - len(self.record.shapes[source])) + self.record.shapes[source]
            labels = self.labels.get(source)
            labels = (
                np.zeros((1,) * rank, np.int64) if labels is None else labels.reshape((1,) * (rank - labels.ndim) + labels.shape)
            )
            if found.any() and labels.any():
                self.tie(found, labels)
                both = np.broadcast_arrays(found, labels)
                found = np.where(both[0] != FIXED, both[0], both[1])
            else:
                varies, other = (labels, sizes) if labels.any() else (found, own)
                if any(v > 1 and o > 1 for v, o in zip(varies.shape, other, strict=True)):
                    self.freeze(varies, "it meets values that are not channels")
                    varies = np.zeros((1,) * rank, np.int64)
                found = varies
            sizes = tuple(map(max, sizes, own))
        return found if found.any() else None

    def _same(self, node: fx.Node, name: str) -> Labels | None:
        source = node.args[0]
        labels = self.get(source)
        if labels is not None and name in ALONG:
            self.still.append(
                (labels, self.number(node.args[1] if len(node.args) > 1 else node.kwargs["dim"]), f"{name} runs over it")
            )
        return labels

    def _pool(self, node: fx.Node, dims: int) -> Any:
        labels = self.get(node.args[0])
        assert labels is not None
        for dim in range(1, dims + 1):
            self.still.append((labels, labels.ndim - dim, f"{base(node)} runs over it"))
        return labels[tuple(slice(0, 1) if d >= labels.ndim - dims else slice(None) for d in range(labels.ndim))]

    def _reduce(self, node: fx.Node) -> Any:
        labels = self.get(node.args[0])
        assert labels is not None
        dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        keep = bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
        over = [*range(labels.ndim)] if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
        if base(node) in ("norm", "linalg_vector_norm", "var", "std") and (dims is None or not isinstance(dims, (list, int))):
            return self._unknown(node, [node.all_input_nodes[0]], f"{base(node)} is not understood")
        over = [d % labels.ndim for d in over]
        for dim in over:
            self.still.append((labels, dim, f"{base(node)} runs over it"))
        left = labels[tuple(slice(0, 1) if d in over else slice(None) for d in range(labels.ndim))]
        return left if keep else left.reshape([s for d, s in enumerate(left.shape) if d not in over])

    def _move(self, node: fx.Node) -> Any:
        """Run the operator on the labels."""

        def given(value: Any) -> Any:
            if isinstance(value, fx.Node):
                if value in self.record.shapes and self.record.items[value] > 0:
                    return torch.from_numpy(np.array(self.full(value), order="C"))
                return self.record.values[value]
            return [given(v) for v in value] if isinstance(value, (list, tuple)) else value

        if base(node) in ("pad", "constant_pad_nd"):
            kwargs: dict[str, Any] = {}
            args = [given(node.args[0]), given(node.args[1])]
            if len(node.args) > 2 and node.args[2] not in ("constant", 0, 0.0, None):
                labels = self.get(node.args[0])
                assert labels is not None
                self.still.append((labels, labels.ndim - 1, "padding runs over it"))
        else:
            args, kwargs = [given(a) for a in node.args], {k: given(v) for k, v in node.kwargs.items() if k != "memory_format"}
        moved = node.target(*args, **kwargs)  # type: ignore[operator]
        if isinstance(moved, Tensor):
            return squeeze(moved.numpy())
        return [squeeze(m.numpy()) for m in moved]

    def _on_getitem(self, node: fx.Node) -> Any:
        found = self.labels[node.args[0]]  # type: ignore[index]
        index = node.args[1]
        assert isinstance(index, int)
        return found[index] if isinstance(found, list) else None

    def _on_select(self, node: fx.Node) -> Any:
        labels = self.get(node.args[0])
        assert labels is not None
        self.still.append((labels, self.number(node.args[1]), "one of its channels is selected"))
        return self._move(node)

    def _on_glu(self, node: fx.Node) -> Any:
        labels = self.get(node.args[0])
        assert labels is not None
        dim = int(self.number(node.args[1])) if len(node.args) > 1 else -1
        if labels.shape[dim] == 1:
            return labels
        values, gates = np.split(labels, 2, dim)
        self.tie(values, gates)
        return values

    def _on_batch_norm(self, node: fx.Node) -> Any:
        return self._norm(node, [a for a in node.args[1:5] if isinstance(a, fx.Node)], 1)

    def _on_layer_norm(self, node: fx.Node) -> Any:
        labels = self.get(node.args[0])
        assert labels is not None
        for parameter in node.args[2:4]:
            own = self.get(parameter)
            if own is not None:
                self.tie(labels, own.reshape((1,) * (labels.ndim - own.ndim) + own.shape))
        return labels

    _on_rms_norm = _on_layer_norm

    def _on_group_norm(self, node: fx.Node) -> Any:
        labels = self.get(node.args[0])
        assert labels is not None and isinstance(node.args[1], int)
        channels = np.broadcast_to(self.column(labels, 1), self.record.shapes[node][1])
        inner = channels.reshape(node.args[1], -1)
        self.tie(inner[1:], inner[:1])
        return self._norm(node, [a for a in node.args[2:4] if isinstance(a, fx.Node)], 1)

    def _on_instance_norm(self, node: fx.Node) -> Any:
        return self._norm(node, [a for a in node.args[1:5] if isinstance(a, fx.Node)], 1)

    def _on_prelu(self, node: fx.Node) -> Any:
        own = self.get(node.args[1])
        labels = self.get(node.args[0])
        return labels if own is None or own.size == 1 or labels is None else self._norm(node, [node.args[1]], 1)

    _on__prelu_kernel = _on_prelu

    def _norm(self, node: fx.Node, parameters: Sequence[Any], dim: int) -> Labels | None:
        labels = self.get(node.args[0])
        if labels is None:
            labels = np.zeros((1,) * len(self.record.shapes[node]), np.int64)
        for parameter in parameters:
            own = self.get(parameter)
            if own is not None:
                self.tie(labels, own.reshape([-1 if d == dim else 1 for d in range(labels.ndim)]))
        return labels

    def _on_embedding(self, node: fx.Node) -> Any:
        row = self._columns_of(node.args[0])
        return row.reshape((1,) * (len(self.record.shapes[node]) - 1) + row.shape)

    def _columns_of(self, weight: Any) -> Labels:
        """One label for each column of a matrix outside of the layers, whose rows are never cut."""
        value = tensor_of(self.graph, str(weight.target))
        if str(weight.target) not in self.parameters:
            self.parameters[str(weight.target)] = self.labels[weight] = self.fresh(value.shape[1]).reshape(1, -1)
        labels = self.parameters[str(weight.target)]
        return np.broadcast_to(self.column(labels, 1), value.shape[1:])

    def _on_linear(self, node: fx.Node) -> Any:
        """A linear layer that is none of ours, since its weight is another operator's too: it reads channels and writes none."""
        source, weight = node.args[0], node.args[1]
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            raise ValueError("its weight is computed")
        labels = self.get(source)
        if labels is not None:
            row = self._columns_of(weight)
            self.tie(np.broadcast_to(self.column(labels, labels.ndim - 1), row.shape), row)
        return None

    def _on_matmul(self, node: fx.Node) -> Any:
        a, b = node.args[0], node.args[1]
        assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
        if len(self.record.shapes[a]) < 2 or len(self.record.shapes[b]) < 2:
            raise ValueError("an operand is a vector")
        return self._product(squeeze(self.full(a)), squeeze(self.full(b)), len(self.record.shapes[node]))

    _on_bmm = _on_matmul

    def _product(self, a: Labels, b: Labels, rank: int) -> Labels:
        """Labels of `a @ b`: batch dimensions (heads) tie, contracted channels tie, rows of `a` or columns of `b` remain."""
        a = a.reshape((1,) * (rank - a.ndim) + a.shape)
        b = b.reshape((1,) * (rank - b.ndim) + b.shape)
        inner = max(a.shape[-1], b.shape[-2])
        if inner > 1:  # channels are contracted: both operands lose the same ones
            left = np.broadcast_to(a, (*a.shape[:-1], inner))
            right = np.broadcast_to(b, (*b.shape[:-2], inner, b.shape[-1]))
            self.tie(left, left[..., :1, :])
            self.tie(right, right[..., :, :1])
            self.tie(left[..., 0, :], right[..., :, 0])
            heads = np.broadcast_arrays(left[..., 0, :], right[..., :, 0])[0]
            if any(s > 1 for s in heads.shape[:-1]):  # within a head all channels go together
                self.tie(heads, heads[..., :1])
                return heads[..., :1, None]
            if a.shape[-2] == 1 and b.shape[-1] == 1:
                return np.zeros((1,) * rank, np.int64)
            self.freeze(heads, "a product runs over it")
            return np.zeros((1,) * rank, np.int64)
        if a.shape[-2] > 1 and b.shape[-1] > 1:
            self.freeze(a, "both sides of a product are channels")
            self.freeze(b, "both sides of a product are channels")
            return np.zeros((1,) * rank, np.int64)
        if a.any() and b.any():
            self.tie(a, b)
        found = np.broadcast_arrays(a, b)
        return np.where(found[0] != FIXED, found[0], found[1])

    def _on_scaled_dot_product_attention(self, node: fx.Node) -> Any:
        q, k, v = node.args[:3]
        assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
        if self.record.shapes[q][1] != self.record.shapes[k][1]:
            raise ValueError("query and key heads differ in number")
        rank = len(self.record.shapes[node])
        scores = self._product(squeeze(self.full(q)), squeeze(np.swapaxes(self.full(k), -1, -2)), rank)
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        own = self.get(mask)
        if own is not None and own.any():
            self.tie(scores, own.reshape((1,) * (rank - own.ndim) + own.shape))
        return self._product(scores, squeeze(self.full(v)), rank)


def squeeze(labels: Labels) -> Labels:
    """The same labels with size 1 along each dimension in which they do not vary."""
    for dim in range(labels.ndim):
        if labels.shape[dim] > 1 and (labels == labels[(slice(None),) * dim + (slice(0, 1),)]).all():
            labels = labels[(slice(None),) * dim + (slice(0, 1),)]
    return labels
