"""Everything about a model that policies share, worked out once: what a trial then does is slice, solve and round."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tightrope.compressors.calibrate import Statistics, calibrate
from tightrope.compressors.capture import Inputs, tensor_of
from tightrope.compressors.payload import Float, Part, Range
from tightrope.compressors.prune.order import ORDERS, Order, channel_orders
from tightrope.compressors.prune.reconstruct import Nested
from tightrope.compressors.quantize.equalise import equalised
from tightrope.compressors.quantize.ranges import METHODS, Method, choose
from tightrope.compressors.quantize.rounding import CLIPS, ROUNDINGS, Clip, Rounding
from tightrope.compressors.ties import Axis
from tightrope.compressors.trace import Traced, traced
from tightrope.spaces.errors import CompressError
from tightrope.spaces.network import Network
from tightrope.spaces.points import MOVERS

MEMO_BYTES = 32 << 20  # of what each worker remembers of earlier trials
Weights = Mapping[str, tuple[Float, Float | None]]


@dataclass(frozen=True)
class Settings:
    """How a policy is carried out; the same for all trials of a search.

    `order` of channels (`prune/order.py`); `reconstruct`: what remains takes over what was cut; `ranges` of activations
    (`quantize/ranges.py`); `clip` of weights and their `rounding` (`quantize/rounding.py`); `bias_correction`: the bias takes
    over what rounding and factorising change in the mean; `equalise` (`quantize/equalise.py`) weights between layers first.
    """

    order: Order = "taylor"
    ranges: Method = "mse"
    reconstruct: bool = True
    bias_correction: bool = True
    clip: Clip = "mse"
    rounding: Rounding = "gptq"
    equalise: bool = True

    def __post_init__(self) -> None:
        for field_name, known in (("order", ORDERS), ("ranges", METHODS), ("clip", CLIPS), ("rounding", ROUNDINGS)):
            if getattr(self, field_name) not in known:
                raise CompressError(f"{field_name} must be one of {known}, got {getattr(self, field_name)!r}")


@dataclass
class Prepared:
    """Weights with batch norms folded in, channel orders, statistics and ranges of one model: arrays, read only.

    `traced` is None in a worker that scores ONNX graphs and never builds a module.
    """

    network: Network
    axes: Mapping[tuple[str, int], Axis]
    weights: Weights
    parameters: Mapping[str, Float]
    orders: Mapping[str, NDArray[np.int64]]
    statistics: Statistics
    settings: Settings = field(default_factory=Settings)
    nested: Mapping[str, Nested] = field(default_factory=dict, repr=False)
    traced: Traced | None = None
    skeleton: Any = field(default=None, repr=False)  # `export.skeleton.Skeleton`, made when it is first needed
    memo: "Memo" = field(default_factory=lambda: Memo(MEMO_BYTES), repr=False)
    _ranges: dict[tuple[str, int], Range] = field(default_factory=dict, repr=False)

    def source_of(self, op: str) -> str:
        """The operator whose values an operator's tensor holds: what only moves values is looked through."""
        ops = {o.name: o for o in self.network.ops}
        while ops[op].kind in MOVERS and ops[op].inputs:
            op = ops[op].inputs[0]
        return op

    def range_of(self, op: str, bits: int) -> Range:
        """The range of an operator's tensor at this many bits; what only moves values has the range of what it reads."""
        op = self.source_of(op)
        if (op, bits) not in self._ranges:
            statistics = self.statistics
            self._ranges[op, bits] = choose(statistics.samples[op], statistics.low_high[op], bits, self.settings.ranges)
        return self._ranges[op, bits]

    def checksum(self) -> str:
        """Sixteen hexadecimal digits over all weights; the same before and after a search."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            for array in self.weights[name]:
                if array is not None:
                    digest.update(array.tobytes())
        for name in sorted(self.parameters):
            digest.update(self.parameters[name].tobytes())
        return digest.hexdigest()[:16]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "memo": Memo(self.memo.limit), "traced": None}


class Memo:
    """Parts of layers by what was asked, the least recently used forgotten beyond `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._held: OrderedDict[Any, tuple[Part, ...]] = OrderedDict()

    def get(self, key: Any) -> tuple[Part, ...] | None:
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: Any, parts: tuple[Part, ...]) -> None:
        self._held[key] = parts
        self.bytes += _bytes(parts)
        while self.bytes > self.limit and len(self._held) > 1:
            self.bytes -= _bytes(self._held.popitem(last=False)[1])


def _bytes(parts: tuple[Part, ...]) -> int:
    arrays = [a for p in parts for a in (p.weight, p.bias, p.codes, p.scales) if a is not None]
    return sum(a.nbytes for a in arrays)


def prepare(
    model: nn.Module, example_inputs: Inputs, calibration: Iterable[Any], settings: Settings | None = None, seed: int = 0
) -> Prepared:
    """Trace a model, run it over the calibration split once and work out what all policies share.

    Args:
        calibration: batches `(inputs, target)` or `inputs`; never from the search or test split.
    """
    with torch.inference_mode(False), torch.enable_grad():  # saliencies are gradients, wherever this is called
        return prepared_from(traced(model, example_inputs), calibration, settings, seed)


def prepared_from(tracing: Traced, calibration: Iterable[Any], settings: Settings | None = None, seed: int = 0) -> Prepared:
    """`prepare` for a model that is traced already."""
    settings = settings or Settings()
    own, tracing = tracing, equalised(tracing) if settings.equalise else tracing
    statistics = calibrate(tracing, calibration, seed=seed)
    weights = {}
    for layer in tracing.network.layers:
        module: Any = tracing.layer(layer.name)
        bias = None if module.bias is None else module.bias.detach().numpy()
        weights[layer.name] = (module.weight.detach().numpy(), bias)
    orders = channel_orders(own, statistics, settings.order)
    nested = _nest(tracing, weights, orders, statistics) if settings.reconstruct else {}
    parameters = {p.name: tensor_of(tracing.skeleton, p.name).detach().float().numpy() for p in tracing.network.parameters}
    return Prepared(tracing.network, dict(tracing.ties.axes), weights, parameters, orders, statistics, settings, nested, tracing)


def _nest(tracing: Traced, weights: Weights, orders: Mapping[str, NDArray[np.int64]], statistics: Statistics) -> dict[str, Nested]:
    """Reconstructions of the layers that read one group; their covariances are given up for them."""
    found = {}
    for layer in tracing.network.layers:
        known = statistics.layers[layer.name]
        if known.covariance is None or known.covariance.ndim != 2 or len(layer.inputs.groups) != 1:
            continue
        axis, (dense, _) = tracing.ties.axes[layer.name, 1], weights[layer.name]
        rank = np.argsort(orders[layer.inputs.groups[0]])  # of each channel
        order = np.argsort(np.where(axis.group < 0, -1, rank[axis.channel]), kind="stable")
        flat = dense.astype(np.float64).reshape(*dense.shape[:2], -1)
        each = flat.shape[2]
        if known.patches:
            order = (order[:, None] * each + np.arange(each)).reshape(-1)
            found[layer.name] = Nested.of(flat.reshape(len(flat), -1), known.covariance, order)
        else:
            found[layer.name] = Nested.of(flat.transpose(0, 2, 1).reshape(-1, flat.shape[1]), known.covariance, order)
        known.covariance = None
    return found
