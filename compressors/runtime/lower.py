"""From a policy to what torch runs, operator by operator. One rule, for the module that is built and for the device that costs it.

- An integer layer reads codes and writes codes, its ReLU or ReLU6 fused; the parts of a low-rank one hand codes to each other.
- A point (`spaces/points.py`) that a floating-point operator makes is quantised behind it, which does the work of a ReLU too,
  and is decoded again, once, where floating-point operators read it: all read what its codes stand for.
- Operators that only move values run on the codes where their input is there as codes.
- Images run with channels last from the input on.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from tightrope.compressors.runtime.graph import Graph, Node, Ref
from tightrope.spaces.errors import ExportError
from tightrope.spaces.points import FUSED, MOVERS, is_integer, points, written
from tightrope.spaces.policy import Policy
from tightrope.spaces.unit import Unit, units_of

ON_CODES = frozenset(
    "reshape flatten unflatten permute transpose t squeeze unsqueeze contiguous clone dropout channel_shuffle pixel_shuffle "
    "pixel_unshuffle alias detach".split()
)
"""Operators that run on codes, and leave no gaps in memory. (Torch cannot pool bytes: it counts positions in them.)"""


@dataclass(frozen=True, slots=True)
class Step:
    """One operator that torch runs; `reads` are values by the names of the nodes that it stands for, `makes` is a value.

    `op` runs a node of the graph, `part` one part of a layer; `quantize`, `dequantize`, `contiguous` and `channels_last` do what
    they say. `x` and `y` name the ranges of the codes read and written, "" for floating point: a point's, or
    `LAYER.PART` for the input of a part. `activation` is fused. `final` tells the last part of a layer.
    """

    kind: Literal["op", "part", "quantize", "dequantize", "contiguous", "channels_last"]
    node: Node
    reads: Mapping[str, str]
    makes: str
    x: str = ""
    y: str = ""
    unit: Unit | None = None
    activation: str = ""
    final: bool = True


@dataclass(frozen=True)
class Lowered:
    """What torch runs for a policy, in order, and the values that the nodes which the model returns stand for."""

    steps: tuple[Step, ...]
    outputs: Mapping[str, str]


@dataclass
class _Value:
    """A node's result: as values, as codes of a range, or as both."""

    values: str = ""
    codes: str = ""
    range: str = ""


@dataclass
class _Run:
    """The steps of one policy as they are found."""

    steps: list[Step] = field(default_factory=list)
    values: dict[str, _Value] = field(default_factory=dict)


class Lowering:
    """`lower(policy)` gives the operators of a policy in order."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.network = graph, graph.network

    @cached_property
    def _behind(self) -> dict[str, str]:
        return written(self.network)

    @cached_property
    def _kinds(self) -> dict[str, str]:
        return {op.name: op.kind for op in self.network.ops}

    @cached_property
    def _has_convolutions(self) -> bool:
        return any(layer.kind != "linear" for layer in self.network.layers)

    def lower(self, policy: Policy) -> Lowered:
        """What torch runs for a policy.

        Raises:
            PolicyError: the policy is for another network.
            ExportError: it has bits that do not run here.
        """
        policy.check(self.network)
        for layer in self.network.layers:
            choice = policy.choice(layer.name)
            if (choice.weight_bits, choice.act_bits) != (32, 32) and (choice.weight_bits > 8 or choice.act_bits != 8):
                raise ExportError(
                    f"in torch a layer runs in floating point or with weights of 2 to 8 bits and 8-bit activations, but layer "
                    f"{layer.name!r} has {choice.weight_bits} and {choice.act_bits} bits"
                )
        held, widths, run = points(self.network, policy), policy.all_widths(self.network), _Run()
        fused: set[str] = set()
        for node in self.graph.nodes:
            if node.name in fused or node.kind == "output":
                continue
            if node.kind == "layer":
                choice = policy.choice(node.target)
                units = units_of(self.network.layer(node.target), choice, widths)
                if is_integer(choice):
                    fused.add(self._integer(run, node, units))
                    continue
                self._floating(run, node, units)
            elif node.kind == "op" and node.name in held and self._kinds.get(node.name) in FUSED:
                self._rectified(run, node)
            elif node.kind == "op":
                self._operator(run, node)
            else:
                made = node.name
                if node.kind == "input" and node.floating and len(node.shape or ()) == 4 and self._has_convolutions:
                    made += ":channels_last"
                    run.steps.append(Step("channels_last", node, {node.name: node.name}, made))
                run.values[node.name] = _Value(made)
            if node.name in held and not run.values[node.name].codes:
                self._hold(run, node)
        outputs = {ref: self._as_values(run, ref) for ref in _refs(self.graph.nodes[-1].args)}
        return Lowered(tuple(run.steps), outputs)

    def _hold(self, run: _Run, node: Node) -> None:
        """Make codes of a point, which all its readers read from now on."""
        source = run.values[node.name].values
        if node.kind == "op" and node.base in MOVERS:
            source = self._add(run, Step("contiguous", node, {node.name: source}, f"{node.name}:dense"))
        codes = self._add(run, Step("quantize", node, {node.name: source}, f"{node.name}:codes", y=node.name))
        run.values[node.name] = _Value("", codes, node.name)

    def _add(self, run: _Run, step: Step) -> str:
        run.steps.append(step)
        return step.makes

    def _as_values(self, run: _Run, name: str) -> str:
        """A node's result in floating point (or whatever it is that is no tensor of codes)."""
        value = run.values[name]
        if not value.values:
            node = self.graph.by_name[name]
            step = Step("dequantize", node, {name: value.codes}, f"{name}:values", x=value.range)
            value.values = self._add(run, step)
        return value.values

    def _integer(self, run: _Run, node: Node, units: tuple[Unit, ...]) -> str:
        """The parts of an integer layer; returns the operator whose tensor they make."""
        source, last = node.args[0].node, self._behind[node.name]
        key, range_ = run.values[source].codes, run.values[source].range
        activation = self._kinds[last] if last != node.name else ""
        for unit in units:
            final = unit.part == len(units) - 1
            makes = f"{last}:codes" if final else f"{node.name}:{unit.part}"
            y = last if final else f"{node.target}.{unit.part + 1}"
            key = self._add(run, Step("part", node, {source: key}, makes, range_, y, unit, activation if final else "", final))
            range_ = y
        run.values[last] = run.values[node.name] = _Value("", key, last)
        return last

    def _floating(self, run: _Run, node: Node, units: tuple[Unit, ...]) -> None:
        source = node.args[0].node
        key = self._as_values(run, source)
        for unit in units:
            final = unit.part == len(units) - 1
            makes = node.name if final else f"{node.name}:{unit.part}"
            key = self._add(run, Step("part", node, {source: key}, makes, unit=unit, final=final))
        run.values[node.name] = _Value(key)

    def _rectified(self, run: _Run, node: Node) -> None:
        """A ReLU whose result is held as codes, which cannot stand for what it cuts off: the quantiser does its work."""
        source = self._as_values(run, node.args[0].node)
        step = Step(
            "quantize", node, {node.args[0].node: source}, f"{node.name}:codes", y=node.name, activation=self._kinds[node.name]
        )
        run.values[node.name] = _Value("", self._add(run, step), node.name)

    def _operator(self, run: _Run, node: Node) -> None:
        refs = list(_refs((node.args, dict(node.kwargs))))
        if node.base in ON_CODES and len(refs) >= 1 and node.args and isinstance(node.args[0], Ref):
            first = run.values[node.args[0].node]
            others = {r for r in refs if r != node.args[0].node}
            if first.codes and not any(self.graph.by_name[r].floating for r in others):
                reads = {node.args[0].node: first.codes} | {r: self._as_values(run, r) for r in others}
                self._add(run, Step("op", node, reads, f"{node.name}:codes", first.range, first.range))
                run.values[node.name] = _Value("", f"{node.name}:codes", first.range)
                return
        reads = {ref: self._as_values(run, ref) for ref in refs}
        run.values[node.name] = _Value(self._add(run, Step("op", node, reads, node.name)))


def _refs(value: Any) -> Iterable[str]:
    if isinstance(value, Ref):
        yield value.node
    elif isinstance(value, dict):
        for each in value.values():
            yield from _refs(each)
    elif isinstance(value, tuple):
        for each in value:
            yield from _refs(each)
