"""Which nodes policies come to, learnt from policies that were lowered, so that thousands are told at once.

Lowering takes a millisecond or more a policy. But what a layer or operator comes to hangs on little: its own precision and form,
those of its neighbours, and whether a few widths fill whole blocks. So a decision tree is grown for each from lowered policies;
its leaves are lists of nodes whose sizes are still forms over widths and ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tightrope.estimators.encode import Extents
from tightrope.estimators.measured.lowering import INPUT
from tightrope.estimators.measured.nodes import Form, Key, Node, Wide, written
from tightrope.spaces.batch import FORMS, Batch, IntArray
from tightrope.spaces.errors import FormatError
from tightrope.spaces.fields import Fields
from tightrope.spaces.network import Extent, Network

BLOCK = 16  # of what works alike on every machine, as 4-bit weights do
NEAR_ENOUGH = 0.95  # of the most that any split tells: the nearest such one is taken
Pattern = tuple[str, tuple[Form, ...]]  # family of a node and the forms of its sizes
Told = dict[str, tuple[Pattern, ...]]  # by layer or operator
Sight = NDArray[np.uint8]
Tree = Any  # a leaf is the place of a list of patterns; a branch is (feature, value, tree where equal, tree elsewhere)


def told(nodes: Sequence[Node]) -> tuple[list[tuple[Key, str]], Told]:
    """A policy's nodes as keys, each with the layer or operator that it belongs to; and the patterns that they follow."""
    keys: list[tuple[Key, str]] = []
    found: dict[str, list[Pattern]] = {}
    for node in nodes:
        family, sizes = written(node)
        keys.append(((family, tuple(map(int, sizes))), node.layer))
        found.setdefault(node.layer, []).append((family, tuple([s.form for s in sizes if isinstance(s, Wide)])))
    return keys, {owner: tuple(patterns) for owner, patterns in found.items()}


class Sights:
    """What trees look at, as small whole numbers: precision and form of layers, and how sizes fill blocks of 16 and of `block`."""

    def __init__(self, network: Network, block: int) -> None:
        self.network, self.block, self._extents = network, block, Extents(network)
        self._blocks = list(dict.fromkeys((BLOCK, block)))
        sizes = [(e, 1) for op in network.ops for e in op.shape if e.terms]
        for layer in network.layers:
            sizes += [(e, g) for e in (layer.inputs, layer.outputs) if e.terms for g in {1, layer.groups}]
        self._sizes = list(dict.fromkeys(sizes))

    def __call__(self, batch: Batch) -> Sight:
        """`F x b` array: of every layer precision, form, and by block the classes of its two inner widths; then those of sizes."""
        whole, bits = batch.ranks == 0, batch.weight_bits
        low = np.where(bits == 32, 0, np.where(batch.act_bits == 32, 2, np.where(bits == 8, 1, 1 + bits)))
        inner = [inner_widths(self.network, self._extents, batch, part) for part in (0, 1)]
        sizes = [self._extents.at(e, batch.widths) // by for e, by in self._sizes]
        wide = np.reshape(sizes, (len(sizes), len(batch)))
        most = max(int(a.max(initial=0)) for a in (*inner, wide))
        classes = [filling(np.arange(most + 1), block).astype(np.uint8) for block in self._blocks]
        layers = [low, batch.forms, *(np.where(whole, 0, 1 + each[widths]) for each in classes for widths in inner)]
        return np.concatenate([*(a.T.astype(np.uint8) for a in layers), *(each[wide] for each in classes)])

    def distances(self) -> dict[str, IntArray]:
        """For every layer and operator, how far each column of a row is from it in the network's graph."""
        ops, near = self.network.ops, {INPUT: set[str]()}
        for op in ops:
            near.setdefault(op.name, set()).update(op.inputs)
            for name in op.inputs:
                near.setdefault(name, set()).add(op.name)
        at: dict[str, list[str]] = {layer.name: [op.name for op in ops if op.layer == layer.name] for layer in self.network.layers}
        places = [at[layer.name] for layer in self.network.layers] * (2 + 2 * len(self._blocks))
        for extent, _ in self._sizes * len(self._blocks):
            shown = [op.name for op in ops if extent in op.shape]
            places.append(shown + [n for x in self.network.layers if extent in (x.inputs, x.outputs) for n in at[x.name]])
        found = {}
        for owner in {*near, *at}:
            steps = _steps(near, at.get(owner, [owner]))
            found[owner] = np.array([min((steps.get(name, len(ops)) for name in place), default=len(ops)) for place in places])
        return found


def filling(sizes: IntArray, block: int) -> IntArray:
    """How sizes fill blocks of so many: one, in part (of fours or not), whole blocks, or more (of fours or not)."""
    fours = sizes % 4 == 0
    small = np.where(sizes == 1, 0, np.where(fours, 1, 2))
    return np.where(sizes < block, small, np.where(sizes % block == 0, 3, np.where(fours, 4, 5)))


def inner_widths(network: Network, extents: Extents, batch: Batch, part: int) -> IntArray:
    """`b x L` array of the first or second inner width of low-rank layers: the rank, or for `tucker` at most the layer's own."""
    tucker = FORMS.index("tucker")
    ends = [extents.at(x.outputs if part else x.inputs, batch.widths) for x in network.layers]
    return np.where(batch.forms == tucker, np.minimum(batch.ranks, np.reshape(ends, batch.ranks.shape[::-1]).T), batch.ranks)


def _steps(near: Mapping[str, set[str]], start: Sequence[str]) -> dict[str, int]:
    steps, edge = dict.fromkeys(start, 0), list(start)
    while edge:
        beyond = [n for name in edge for n in near.get(name, ()) if n not in steps]
        steps |= dict.fromkeys(beyond, steps[edge[0]] + 1)
        edge = list(dict.fromkeys(beyond))
    return steps


class Patterns:
    """One network's trees, by layer and operator; `leaves` are the lists of patterns that they end in."""

    def __init__(self, sights: Sights, trees: Mapping[str, Tree], leaves: Sequence[tuple[Pattern, ...]], seen: Any) -> None:
        self.network, self.trees, self.leaves, self.seen = sights.network, dict(trees), list(leaves), [frozenset(s) for s in seen]
        self.sights, self._extents = sights, Extents(sights.network)
        self._seen = np.array([sum(1 << value for value in values) for values in self.seen], np.uint32)[:, None]
        known = dict.fromkeys(pattern for leaf in leaves for pattern in leaf)
        made_of = [list(dict.fromkeys(base for _, forms in leaf for form in forms for base in bases(form))) for leaf in leaves]
        self._forms = list(dict.fromkeys(chain((form for _, forms in known for form in forms), *made_of)))
        self.column = column = {form: i for i, form in enumerate(self._forms)}
        place = {pattern: i for i, pattern in enumerate(known)}
        self.patterns = [(family, np.array([column[f] for f in forms], np.int64)) for family, forms in known]
        self._places = [[place[p] for p in leaf] for leaf in leaves]
        self._lists = [[(family, [column[f] for f in forms]) for family, forms in leaf] for leaf in leaves]
        rows = zip_longest(*([column[base] for base in found] for found in made_of), fillvalue=len(column))
        self._bases = [np.array(row, np.int64) for row in rows]  # one by one, by leaf; those that have fewer read zeros
        numbers = np.random.default_rng(0).integers(1 << 63, size=len(column) + len(leaves), dtype=np.uint64) * 2 + 1
        self._odd, self._salt = np.split(numbers, [len(column)])

    def tells(self, sights: Sight) -> NDArray[np.bool_]:
        """Which policies show nothing that did not occur where this was learnt, `b`-dim."""
        found: NDArray[np.bool_] = np.all(self._seen >> sights & 1, axis=0)
        return found

    def ends(self, sights: Sight) -> IntArray:
        """The leaf that every layer and operator comes to, `owners x b`."""
        found = np.empty((len(self.trees), sights.shape[1]), np.int64)
        everyone = np.arange(sights.shape[1])
        for row, tree in zip(found, self.trees.values(), strict=True):
            waiting = [(tree, everyone)]
            while waiting:
                at, who = waiting.pop()
                if isinstance(at, int):
                    row[who] = at
                    continue
                feature, value, equal, other = at
                same = sights[feature].take(who) == value
                waiting += [(branch, part) for branch, part in ((equal, who[same]), (other, who[~same])) if len(part)]
        return found

    def of(self, sights: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Family and columns of each node of one policy, by its sights."""
        found = []
        for at in self.trees.values():
            while not isinstance(at, int):
                at = at[2] if sights[at[0]] == at[1] else at[3]
            found += self._lists[at]
        return found

    def __call__(self, batch: Batch) -> "Flat":
        """The nodes of every policy.

        Args:
            batch: `b` policies.
        """
        return self.flat(self.ends(self.sights(batch)), self.columns(batch))

    def flat(self, ends: IntArray, sizes: IntArray) -> "Flat":
        """The nodes of what comes to leaves, `o x n`, at sizes, `C x n`."""
        order = np.argsort(ends, axis=None, kind="stable")
        leaves, starts = np.unique(ends.ravel()[order], return_index=True)
        who: dict[int, list[IntArray]] = {}
        for leaf, members in zip(leaves.tolist(), np.split(order % max(ends.shape[1], 1), starts[1:]), strict=True):
            for place in self._places[leaf]:
                who.setdefault(place, []).append(members)
        return Flat(self.patterns, {p: np.concatenate(parts) for p, parts in who.items()}, sizes)

    def marks(self, ends: IntArray, sizes: IntArray) -> NDArray[np.uint64]:
        """A number for each leaf of policies, `o x b`, at their sizes, `C x b`: alike only where leaf and nodes are.

        It is the sum of a random number for the leaf and of the widths and ranks that its sizes are made of, each times another
        one: two of `n` that ought to differ are alike with a probability of about `n^2 / 2^65`.
        """
        mixed = np.concatenate([sizes.astype(np.uint64) * self._odd[:, None], np.zeros((1, sizes.shape[1]), np.uint64)])
        found: NDArray[np.uint64] = self._salt[ends]
        for places in self._bases:
            found += mixed.ravel().take(places[ends] * sizes.shape[1] + np.arange(sizes.shape[1]))
        return found

    def columns(self, batch: Batch) -> IntArray:
        """The sizes that patterns have, and the widths and ranks that these are made of, `C x b`."""
        inner = [inner_widths(self.network, self._extents, batch, part) for part in (0, 1)]
        at = {layer.name: i for i, layer in enumerate(self.network.layers)}
        known: dict[Any, Any] = {}

        def size(form: Any) -> Any:
            if form not in known:
                known[form] = made(form)
            return known[form]

        def made(form: Any) -> Any:
            match form:
                case int():
                    return np.full(len(batch), form)
                case ("width", factor, fixed, terms):
                    return factor * self._extents.at(Extent(fixed, terms), batch.widths)
                case ("inner", layer, part):
                    return inner[part][:, at[layer]]
                case ("up", of, step):
                    return -(-size(of) // step) * step
                case ("share", of, by):
                    return size(of) // by
                case ("product", parts):
                    return np.prod([size(p) for p in parts], axis=0)
            raise ValueError(form)

        found = np.empty((len(self._forms), len(batch)), np.int64)
        for row, form in zip(found, self._forms, strict=True):
            row[:] = size(form)
        return found

    def to_json(self) -> dict[str, Any]:
        families = list(dict.fromkeys(family for family, _ in self.patterns))
        place = {family: i for i, family in enumerate(families)}
        return {
            "families": families, "forms": self._forms, "patterns": [[place[f], columns.tolist()] for f, columns in self.patterns],
            "leaves": self._places, "trees": self.trees, "seen": [sorted(s) for s in self.seen], "block": self.sights.block,
        }  # fmt: skip

    @staticmethod
    def from_json(network: Network, f: Fields) -> "Patterns":
        try:
            families, forms = f.take("families", list), [_tuples(form) for form in f.take("forms", list)]
            patterns = [(families[i], tuple(forms[c] for c in columns)) for i, columns in f.take("patterns", list)]
            leaves = [tuple(patterns[i] for i in leaf) for leaf in f.take("leaves", list)]
            trees = {str(owner): _tuples(tree) for owner, tree in f.items("trees")}
            return Patterns(Sights(network, f.take("block", int)), trees, leaves, f.take("seen", list))
        except (IndexError, OverflowError, TypeError, ValueError) as error:
            raise FormatError(f"{f.where} is damaged: {error}") from None


@dataclass(frozen=True, eq=False)
class Flat:
    """The nodes of `b` policies: by the place of their pattern, which policies have one (twice: two of them); and the policies'
    sizes, `C x b`."""

    patterns: Sequence[tuple[str, IntArray]]
    who: dict[int, IntArray]
    sizes: IntArray

    def families(self) -> Iterator[tuple[str, IntArray, IntArray]]:
        """Each family of nodes, the policy that each of its `n` nodes is of, and their sizes, `n x k`."""
        found: dict[str, list[tuple[IntArray, IntArray]]] = {}
        for place, who in self.who.items():
            family, columns = self.patterns[place]
            found.setdefault(family, []).append((who, columns))
        flat, across = self.sizes.ravel(), self.sizes.shape[1]
        for family, parts in found.items():
            sizes = [flat.take(who[:, None] + across * columns) for who, columns in parts]  # quicker than two lists of indices
            yield family, np.concatenate([who for who, _ in parts]), np.concatenate(sizes)


def bases(form: Any) -> tuple[Form, ...]:
    """The widths and ranks that a size is made of."""
    match form:
        case ("width" | "inner", *_):
            return (form,)
        case ("up" | "share", of, _):
            return bases(of)
        case ("product", parts):
            return tuple(base for part in parts for base in bases(part))
    return ()


def _tuples(value: Any) -> Any:
    return tuple([_tuples(v) for v in value]) if isinstance(value, list) else value


def learn(network: Network, batch: Batch, lowered: Sequence[Told], block: int) -> Patterns:
    """Grow the trees from policies and what they were lowered to; kernels work on blocks of so many channels."""
    sights = Sights(network, block)
    rows = sights(batch)
    splits = [(f, int(v)) for f, row in enumerate(rows) for values in [np.unique(row)] if len(values) > 1 for v in values]
    shown = np.stack([rows[f] == v for f, v in splits], axis=1).astype(np.float32) if splits else np.zeros((len(batch), 0))
    far, leaves, trees = sights.distances(), dict[tuple[Pattern, ...], int](), {}
    for owner in dict.fromkeys(owner for found in lowered for owner in found):
        labels = np.array([leaves.setdefault(found.get(owner, ()), len(leaves)) for found in lowered])
        distance = far[owner] if owner in far else np.zeros(len(rows), np.int64)
        order = np.argsort([distance[f] for f, _ in splits], kind="stable")
        trees[owner] = _grow(labels, shown[:, order], [splits[i] for i in order])
    return Patterns(sights, trees, list(leaves), [np.unique(row).tolist() for row in rows])


def _grow(labels: IntArray, shown: NDArray[Any], splits: Sequence[tuple[int, int]]) -> Tree:
    """A tree whose leaves are labels: each branch is the nearest split among those that tell most."""
    kinds, places = np.unique(labels, return_inverse=True)
    if len(kinds) == 1:
        return int(kinds[0])
    whole, order = np.bincount(places), np.argsort(places, kind="stable")
    equal = np.add.reduceat(shown[order], np.cumsum(whole) - whole, axis=0).T  # how many of each kind show each split
    gains = _entropy(whole) - _entropy(equal) - _entropy(whole - equal)
    if not len(gains) or gains.max() <= 1e-3:  # alike in all that is looked at
        return int(kinds[np.argmax(whole)])
    best = int(np.flatnonzero(gains >= NEAR_ENOUGH * gains.max())[0])
    same = shown[:, best] > 0
    feature, value = splits[best]
    return feature, value, _grow(labels[same], shown[same], splits), _grow(labels[~same], shown[~same], splits)


def _entropy(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Bits that labels take in all, from how often each occurs along the last axis."""
    shares = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    found: NDArray[np.float64] = -(counts * np.log2(np.maximum(shares, 1e-12))).sum(-1)
    return found
