"""Groups of channels, and every size that follows their widths: what `flow.py` tied, made into plain data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx

from tightrope.compressors.capture import base, tensor_of
from tightrope.compressors.flow import FIXED, Analysis, Labels, squeeze
from tightrope.spaces.network import Extent

Kept = Mapping[str, NDArray[np.bool_]]  # for each group which of its channels remain


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor: for every index the group that it belongs to (-1: none, never cut) and the channel of it."""

    group: NDArray[np.int32]
    channel: NDArray[np.int32]
    names: Sequence[str]

    def keep(self, kept: Kept) -> NDArray[np.int64]:
        """Indices that remain, ascending."""
        remains = self.group < 0
        for number in np.unique(self.group[self.group >= 0]):
            own = self.group == number
            flags = kept.get(self.names[number])
            remains[own] = True if flags is None else flags[self.channel[own]]
        return np.flatnonzero(remains)


@dataclass(frozen=True)
class Rewrite:
    """An argument that spells out a size: the item at `path` of a node's arguments becomes `extent`, times the batch."""

    path: tuple[int, ...]
    extent: Extent
    per_example: bool = False


@dataclass
class Ties:
    """What the analysis found, by names.

    `axes` has the output and input axis of every layer, keyed `(layer, 0)` and `(layer, 1)`, and the axis of every parameter
    that is cut, keyed `(parameter, dimension)`; `inputs` and `outputs` what a layer reads and writes; `shapes` the shape of
    every node's tensor at batch 1; `frozen` why the outputs of a layer are in no group.
    """

    groups: dict[str, int] = field(default_factory=dict)
    axes: dict[tuple[str, int], Axis] = field(default_factory=dict)
    inputs: dict[str, Extent] = field(default_factory=dict)
    outputs: dict[str, Extent] = field(default_factory=dict)
    shapes: dict[str, tuple[Extent, ...]] = field(default_factory=dict)
    parameters: dict[str, tuple[Extent, ...]] = field(default_factory=dict)
    rewrites: dict[str, list[Rewrite]] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)


class Uneven(Exception):
    """A size that is no linear form of widths; these classes must be frozen."""

    def __init__(self, classes: NDArray[np.int64]) -> None:
        self.classes = classes


def resolve(analysis: Analysis, batch: int, without: Mapping[str, str] | None = None) -> Ties:
    """Make groups of an analysis that was run at this batch size; `without` names layers to leave whole, and why."""
    for layer, reason in (without or {}).items():
        analysis.freeze(analysis.outs[layer], reason)
    while True:
        classes = _Classes(analysis)
        if _straighten(analysis, classes):
            continue
        try:
            return _Builder(analysis, classes, batch).build()
        except Uneven as uneven:
            analysis.freeze(np.flatnonzero(np.isin(classes.of, uneven.classes)), "the places where its channels occur differ")


class _Classes:
    """Components of tied labels; a class of 0 is frozen."""

    def __init__(self, analysis: Analysis) -> None:
        a = np.concatenate([t[0].ravel() for t in analysis.ties] or [np.zeros(0, np.int64)])
        b = np.concatenate([t[1].ravel() for t in analysis.ties] or [np.zeros(0, np.int64)])
        graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(analysis.next, analysis.next))
        found = connected_components(graph, directed=False)[1].astype(np.int64) + 1
        self.why: dict[int, str] = {}
        self.raw = found.copy()
        cold = np.zeros(found.max() + 1, bool)
        cold[found[FIXED]] = True
        for labels, reason in analysis.icy:
            for number in np.unique(found[labels]):
                self.why.setdefault(int(number), reason)
            cold[found[labels]] = True
        found[cold[found]] = 0
        self.of = found

    def __call__(self, labels: Labels) -> NDArray[np.int64]:
        """Classes of labels, with size 1 where they do not vary."""
        return squeeze(self.of[labels])


def _label_arrays(analysis: Analysis) -> Iterator[Labels]:
    for found in analysis.labels.values():
        for labels in found if isinstance(found, list) else [found]:
            if labels is not None:
                yield labels
    yield from analysis.parameters.values()


def _straighten(analysis: Analysis, classes: _Classes) -> bool:
    """Freeze what must stand still, and tie what varies in two dimensions so that it varies in one; True if any was."""
    changed = False
    for labels, dim, reason in analysis.still:
        if classes(labels).shape[dim] > 1:
            analysis.freeze(labels, reason)
            changed = True
    if changed:
        return True
    for labels in _label_arrays(analysis):
        found = classes(labels)
        varying = [d for d, size in enumerate(found.shape) if size > 1]
        if len(varying) > 1:
            most = max(varying, key=lambda d: len(np.unique(np.moveaxis(found, d, 0).reshape(found.shape[d], -1)[:, 0])))
            analysis.column(labels, most)
            changed = True
    return changed


class _Builder:
    def __init__(self, analysis: Analysis, classes: _Classes, batch: int) -> None:
        self.analysis, self.classes, self.batch = analysis, classes, batch
        self.group_of = np.full(int(classes.raw.max()) + 1, -1, np.int32)
        self.channel_of = np.zeros(int(classes.raw.max()) + 1, np.int32)
        self.names: list[str] = []
        self.widths: list[int] = []

    def build(self) -> Ties:
        self._group()
        analysis, ties = self.analysis, Ties(groups=dict(zip(self.names, self.widths, strict=True)))
        for name, labels in analysis.outs.items():
            ties.axes[name, 0], ties.axes[name, 1] = self.axis(labels), self.axis(analysis.ins[name])
            ties.outputs[name], ties.inputs[name] = self.extent(labels), self.extent(analysis.reads[name])
            if not ties.outputs[name].terms:
                raw = self.classes.raw[labels]
                ties.frozen[name] = next((self.classes.why[int(c)] for c in raw if int(c) in self.classes.why), "too few channels")
        for name, labels in analysis.parameters.items():
            found = self.classes(labels)
            shape = list(map(Extent, tensor_of(analysis.graph, name).shape))
            for dim, size in enumerate(found.shape):
                if size > 1:
                    ties.axes[name, dim], shape[dim] = self.axis(found.ravel(), True), self.extent(found.ravel(), True)
            ties.parameters[name] = tuple(shape)
        for node in analysis.graph.graph.nodes:
            if node in analysis.record.shapes:
                ties.shapes[node.name] = self._shape_of(node)
            rewrites = list(self._rewrites(node))
            if rewrites:
                ties.rewrites[node.name] = rewrites
        return ties

    def _group(self) -> None:
        """Classes that occur equally often at the same places are the channels of one group."""
        sites: list[NDArray[np.int64]] = []
        analysis = self.analysis
        for name in analysis.outs:
            sites += [
                self.classes.of[analysis.outs[name]],
                self.classes.of[analysis.ins[name]],
                self.classes.of[analysis.reads[name]],
            ]
        writers = len(sites)
        sites += [found.ravel() for found in map(self.classes, _label_arrays(analysis)) if found.size > 1]
        where: dict[int, list[tuple[int, int]]] = {}
        for number, site in enumerate(sites):
            for found, count in zip(*np.unique(site[site > 0], return_counts=True), strict=True):
                where.setdefault(int(found), []).append((number, int(count)))
        members: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for number in range(0, writers, 3):  # the first writer gives the order of the channels
            for found in dict.fromkeys(sites[number].tolist()):
                if found > 0:
                    same = members.setdefault(tuple(where[found]), [])
                    if found not in same[:1] and self.group_of[found] != -2:
                        self.group_of[found] = -2
                        same.append(found)
        self.group_of[:] = -1
        names = list(analysis.outs)
        for signature, found in members.items():
            if len(found) < 2:
                continue
            first = names[next(n for n, _ in signature if n < writers and n % 3 == 0) // 3]
            name, copy = first, 2
            while name in self.names:
                name, copy = f"{first}#{copy}", copy + 1
            self.group_of[found] = len(self.names)
            self.channel_of[found] = np.arange(len(found))
            self.names.append(name)
            self.widths.append(len(found))

    def _classes_of(self, labels: NDArray[np.int64], resolved: bool) -> NDArray[np.int64]:
        return labels if resolved else self.classes.of[labels]

    def axis(self, labels: NDArray[np.int64], resolved: bool = False) -> Axis:
        found = self._classes_of(labels, resolved)
        return Axis(self.group_of[found], self.channel_of[found], self.names)

    def extent(self, labels: NDArray[np.int64], resolved: bool = False) -> Extent:
        """The size of an axis as a linear form; channels of a group must occur equally often on it."""
        found = self._classes_of(labels, resolved)
        groups = self.group_of[found]
        terms = []
        for number in dict.fromkeys(groups[groups >= 0].tolist()):
            counts = np.bincount(self.channel_of[found[groups == number]], minlength=self.widths[number])
            if (counts != counts[0]).any():
                raise Uneven(np.flatnonzero(self.group_of == number))
            terms.append((self.names[number], int(counts[0])))
        return Extent(int((groups < 0).sum()), tuple(terms))

    def along(self, labels: Labels | None, dim: int, stop: int | None = None) -> Extent | None:
        """The extent of a tensor along a dimension in which its channels vary (of its first `stop` indices), else None."""
        if labels is None or self.classes(labels).shape[dim % labels.ndim] == 1:
            return None
        line = np.moveaxis(self.classes(labels), dim, 0).reshape(-1)
        extent = self.extent(line, True)
        return self.extent(line[:stop], True) if extent.terms else None

    def _shape_of(self, node: fx.Node) -> tuple[Extent, ...]:
        labels, sizes = self.analysis.labels.get(node), list(self.analysis.record.shapes[node])
        value = node.meta.get("val")
        for dim in range(len(sizes)):
            if isinstance(value, torch.Tensor) and dim < value.dim() and isinstance(value.shape[dim], torch.SymInt):
                sizes[dim] = max(1, sizes[dim] // self.batch)
        array = labels if isinstance(labels, np.ndarray) else None
        return tuple(self.along(array, dim) or Extent(size) for dim, size in enumerate(sizes))

    def _rewrites(self, node: fx.Node) -> Iterator[Rewrite]:
        name, labels = base(node), self.analysis.labels.get(node)
        if labels is None or name not in _SPELLED:
            return
        if name in ("view", "reshape", "_unsafe_view", "expand", "unflatten"):
            sizes, at = node.args[-1 if name == "unflatten" else 1], 2 if name == "unflatten" else 1
            offset = int(self.analysis.number(node.args[1])) % labels.ndim if name == "unflatten" else 0
            for index, size in enumerate(sizes):  # type: ignore[arg-type]
                extent = self.along(labels, offset + index)
                if extent is None or size == -1:
                    continue
                if isinstance(size, int):
                    yield Rewrite((at, index), extent)
                else:
                    if any(n % self.batch for n in (extent.fixed, *(r for _, r in extent.terms))):
                        raise Uneven(np.unique(self.classes(labels)))
                    terms = tuple((g, r // self.batch) for g, r in extent.terms)
                    yield Rewrite((at, index), Extent(extent.fixed // self.batch, terms), per_example=True)
        elif name == "split_with_sizes":
            dim = self.analysis.number(node.args[2]) if len(node.args) > 2 else 0
            for index, part in enumerate(labels):
                extent = self.along(part, dim)
                if extent is not None:
                    yield Rewrite((1, index), extent)
        elif name in ("slice", "narrow"):
            source = self.analysis.get(node.args[0])
            dim = int(self.analysis.number(node.args[1])) if len(node.args) > 1 else 0
            assert source is not None
            if self.along(source, dim) is None:
                return
            size = self.analysis.record.shapes[node.args[0]][dim]  # type: ignore[index]
            if len(node.args) > 4 and node.args[4] != 1:
                raise Uneven(np.unique(self.classes(source)))
            for index in (2, 3):
                stop = self.analysis.number(node.args[index]) if len(node.args) > index else None
                if isinstance(stop, int) and -size <= stop < size and stop != 0:
                    extent = self.along(source, dim, stop % size)
                    if extent is not None:
                        yield Rewrite((index,), extent)
        elif name in ("layer_norm", "rms_norm"):
            sizes = node.args[1]
            for index in range(len(sizes)):  # type: ignore[arg-type]
                extent = self.along(labels, labels.ndim - len(sizes) + index)  # type: ignore[arg-type]
                if extent is not None:
                    yield Rewrite((1, index), extent)


_SPELLED = frozenset(
    ["view", "reshape", "_unsafe_view", "expand", "unflatten", "split_with_sizes", "slice", "narrow", "layer_norm", "rms_norm"]
)
