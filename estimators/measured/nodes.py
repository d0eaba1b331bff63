"""Nodes of ONNX Runtime's optimised graphs as plain data, and as models of one node that can be timed.

A node is a *family*, text that says everything about it but some sizes, and those sizes. In
`com.microsoft.nchwc:Conv{group=1;...}(f:1,*,28,28;=f:*,*,3,3)->f:1,*,28,28` each `*` stands for a size that follows a policy;
`f`, `u`, `s`, `i`, `l` and `b` are fp32, uint8, int8, int32, int64 and bool; `=` marks a constant, with its values behind a
second `=` where they matter. So a family and sizes are all that is needed to make the model.
"""

import re
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from tightrope.spaces.errors import DeviceError

BLOCKED = "com.microsoft.nchwc:"
"""Domain of operators on channels in blocks."""
SUMMING = frozenset({BLOCKED + "Conv", "com.microsoft:FusedConv"})
IN_PLACE = frozenset("Cast Clip Elu HardSigmoid LeakyRelu LogSoftmax Relu Selu Sigmoid Softmax Softplus Softsign Tanh".split())
"""Operators that write over their input where nothing reads it any more."""
OVER = "over "
"""What the name of an output begins with that takes the memory of the input that the rest names."""
DOMAINS = {"": 20, "com.microsoft": 1, "com.microsoft.nchwc": 1}
_TYPES: dict[str, tuple[int, Any]] = {
    "f": (TensorProto.FLOAT, np.float32), "u": (TensorProto.UINT8, np.uint8), "s": (TensorProto.INT8, np.int8),
    "i": (TensorProto.INT32, np.int32), "l": (TensorProto.INT64, np.int64), "b": (TensorProto.BOOL, np.bool_),
}  # fmt: skip
LETTERS = {np.dtype(kind).name: letter for letter, (_, kind) in _TYPES.items()}
_FAMILY = re.compile(r"(?:(?P<domain>[\w.]+):)?(?P<kind>\w+)\{(?P<attributes>[^}]*)\}\((?P<inputs>[^)]*)\)->(?P<outputs>.*)")


Form = tuple[Any, ...]
"""How a size follows a policy: `("width", factor, fixed, terms)` of an extent, `("inner", layer, part)` of a low-rank layer,
`("up", form, step)`, `("share", form, by)`, or `("product", forms or whole numbers)`."""


class Wide(int):
    """A size that follows the policy, as `form` says."""

    form: Form

    def __new__(cls, value: int, form: Form) -> "Wide":
        made = super().__new__(cls, value)
        made.form = form
        return made


def up(size: int, step: int) -> int:
    """A size rounded up to whole steps."""
    found = -(-size // step) * step
    return Wide(found, ("up", size.form, step)) if isinstance(size, Wide) else found


def share(size: int, by: int) -> int:
    """A size divided, rounded down."""
    return Wide(size // by, ("share", size.form, by)) if isinstance(size, Wide) else size // by


def product(shape: Sequence[int]) -> int:
    """The product of sizes."""
    if not any(isinstance(size, Wide) for size in shape):
        return prod(shape)
    return Wide(prod(shape), ("product", tuple([size.form if isinstance(size, Wide) else size for size in shape])))


class Tensor:
    """A tensor of a graph that is being lowered: who makes it and who reads it."""

    __slots__ = ("coded", "is_output", "letter", "maker", "shape", "uses")

    def __init__(self, shape: tuple[int, ...], coded: bool = False, letter: str = "f") -> None:
        self.shape, self.coded, self.letter = shape, coded, letter
        self.maker: Node | None = None
        self.uses: list[Node] = []
        self.is_output = False

    @property
    def type(self) -> str:
        """Letter of its type, `u` for codes."""
        return "u" if self.coded else self.letter


Attributes = tuple[tuple[str, Any], ...]


class Node:
    """A node of a graph that is being lowered.

    `kind` has the domain in front. `constants` are the constant inputs, `(letter, shape, values or None)`, with None in the
    places of tensors and `""` for inputs left out. Nodes of one `region` are one operator of the skeleton, of type `raw`.
    """

    __slots__ = ("attributes", "constants", "ins", "kind", "layer", "outs", "raw", "region")

    def __init__(
        self, kind: str, ins: Sequence[Tensor], outs: Sequence[Tensor], attributes: Attributes = (),
        constants: tuple[Any, ...] = (), layer: str = "", region: object = None, raw: str = "",
    ) -> None:  # fmt: skip
        self.kind, self.attributes, self.constants, self.layer = kind, attributes, constants, layer
        self.ins, self.outs, self.region, self.raw = list(ins), list(outs), region, raw
        for tensor in self.ins:
            tensor.uses.append(self)
        for tensor in self.outs:
            tensor.maker = self

    @property
    def out(self) -> Tensor:
        return self.outs[0]

    def read(self, index: int, tensor: Tensor) -> None:
        """Read another tensor at an input."""
        self.ins[index].uses.remove(self)
        self.ins[index] = tensor
        tensor.uses.append(self)

    def make(self, tensor: Tensor) -> None:
        """Make another tensor."""
        self.outs[0] = tensor
        tensor.maker = self


def written_over(kind: str, tensors: int) -> int | None:
    """Which of the tensors that a node reads it writes over where nothing reads it any more: a convolution what it adds to."""
    if kind in SUMMING:
        return 1 if tensors > 1 else None
    return 0 if kind in IN_PLACE else None


Key = tuple[str, tuple[int, ...]]
ITEM_BYTES = {"f": 4, "i": 4, "l": 8}
"""Bytes of an item by the letter of its type; other types have one."""
_TENSOR = re.compile(r"(=?)([a-z]):([\d,*]*)")
CONSTANT, READ, MADE = range(3)


@cache
def _tensors(family: str) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """For each tensor of a node: whether it is constant, read or made, its bytes but for sizes that follow the policy, and their
    places."""
    attributes, _, tensors = family.partition("}(")
    found, place = [], attributes.count("*")
    inputs, _, outputs = tensors.partition(")->")
    for made, parts in enumerate((inputs, outputs)):
        for part in parts.split(";"):
            if match := _TENSOR.match(part):
                shape = [size for size in match[3].split(",") if size]
                fixed = ITEM_BYTES.get(match[2], 1) * prod(int(size) for size in shape if size != "*")
                role = MADE if made else CONSTANT if match[1] else READ
                found.append((role, fixed, tuple(range(place, place + shape.count("*")))))
            place += part.count("*")
    return tuple(found)


def bytes_of(family: str, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes of constants, of tensors that are read, and of those that are made, `3 x n`, of nodes of a family at `n x k` sizes."""
    found = np.zeros((3, len(sizes)), np.int64)
    for role, fixed, places in _tensors(family):
        each = np.full(len(sizes), fixed)
        for place in places:
            each *= sizes[:, place]
        found[role] += each
    return found


def text(shape: Sequence[int], sizes: list[int]) -> str:
    """The text of a shape; the sizes that follow the policy are added to `sizes`."""
    parts = []
    for size in shape:
        if type(size) is Wide:
            sizes.append(size)
            parts.append("*")
        else:
            parts.append(str(size))
    return ",".join(parts)


def key(node: Node) -> Key:
    """Family and sizes of a node."""
    family, sizes = written(node)
    return family, tuple([int(size) for size in sizes])


def written(node: Node) -> tuple[str, list[int]]:
    """Family and sizes of a node, these as the `Wide` ones that they are."""
    sizes: list[int] = []
    attributes = ";".join([f"{name}={_written(value, sizes)}" for name, value in node.attributes])
    pending = iter(node.ins)
    inputs = []
    for constant in node.constants:
        if constant is None:  # the place of a tensor
            tensor = next(pending)
            inputs.append(tensor.type + ":" + text(tensor.shape, sizes))
        elif constant == "":
            inputs.append("")
        else:
            letter, shape, values = constant
            given = f"={letter}:{text(shape, sizes)}"
            inputs.append(given if values is None else f"{given}={values if isinstance(values, str) else text(values, sizes)}")
    inputs += [t.type + ":" + text(t.shape, sizes) for t in pending]
    outputs = ";".join(t.type + ":" + text(t.shape, sizes) for t in node.outs)
    return f"{node.kind}{{{attributes}}}({';'.join(inputs)})->{outputs}", sizes


def _written(value: Any, sizes: list[int]) -> str:
    """The text of an attribute."""
    if isinstance(value, tuple):
        return "[" + ",".join(map(repr, value)) + "]"
    return text((value,), sizes) if isinstance(value, int) else repr(value) if isinstance(value, float) else str(value)


def model(family: str, sizes: Sequence[int]) -> onnx.ModelProto:
    """The model of one node; constants are zeros of their shape unless the family has their values.

    A node that writes over an input in a network has to be given its memory for the output, whose name says so (`OVER`): with
    memory of its own, a convolution first copies what it adds to, which can take as long as the rest.

    Raises:
        DeviceError: the text is not a family, or has another number of sizes.
    """
    match = _FAMILY.fullmatch(family)
    if match is None:
        raise DeviceError(f"{family!r} is not the family of a node")
    if family.count("*") != len(sizes):
        raise DeviceError(f"{family!r} has {family.count('*')} sizes, got {len(sizes)}")
    left = iter(sizes)

    def filled(part: str) -> list[int]:
        return [next(left) if size == "*" else int(size) for size in part.split(",")] if part else []

    attributes = dict(a.split("=", 1) for a in match["attributes"].split(";") if a)
    made = {name: _value(value, left) for name, value in attributes.items() if value != "[]"}
    inputs, constants, names = [], [], []
    for index, given in enumerate(match["inputs"].split(";") if match["inputs"] else []):
        name = f"i{index}" if given else ""
        names.append(name)
        if given.startswith("="):
            letter, shape, *values = given[1:].replace(":", "=", 1).split("=", 2)
            kind, dtype = _TYPES[letter]
            dims = filled(shape)
            array = np.zeros(dims, dtype)
            if values:
                array = np.array([next(left) if v == "*" else float(v) for v in values[0].split(",")]).astype(dtype).reshape(dims)
            elif letter == "f":
                array += 1
            constants.append(helper.make_tensor(name, kind, dims, array.tobytes(), raw=True))
        elif given:
            letter, shape = given.split(":")
            inputs.append(helper.make_tensor_value_info(name, _TYPES[letter][0], filled(shape)))
    over = written_over(match["kind"] if not match["domain"] else f"{match['domain']}:{match['kind']}", len(inputs))
    outputs = []
    for index, given in enumerate(match["outputs"].split(";")):
        letter, shape = given.split(":")
        name, kind, dims = f"o{index}", _TYPES[letter][0], filled(shape)
        if over is not None and index == 0 and inputs[over] == helper.make_tensor_value_info(inputs[over].name, kind, dims):
            name = OVER + inputs[over].name
        outputs.append(helper.make_tensor_value_info(name, kind, dims))
    node = helper.make_node(match["kind"], names, [o.name for o in outputs], domain=match["domain"] or "", **made)
    graph = helper.make_graph([node], "node", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(d, v) for d, v in DOMAINS.items()], ir_version=10)


def _value(given: str, left: Any) -> Any:
    """An attribute from its text: whole numbers, lists of them, floats (with a point) and words."""
    if given == "*":
        return next(left)
    if given.startswith("["):
        items = [x for x in given[1:-1].split(",") if x]
        return [float(x) if "." in x else int(x) for x in items]
    if re.fullmatch(r"-?\d+", given):
        return int(given)
    if re.fullmatch(r"-?\d+\.\d*(e[+-]?\d+)?|-?\d+e[+-]?\d+", given):
        return float(given)
    return given
