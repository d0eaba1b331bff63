"""One pass of the dense model over calibration data, which keeps all that compressing needs to know.

For every layer: the mean and covariance of its input (im2col patches of a k x k convolution), a few of its input rows, the
mean and deviation of its output channels, and the first-order Taylor saliency of its output channels; for every operator: a
sample of its values.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from tightrope.compressors.capture import arguments
from tightrope.compressors.trace import Traced, input_names
from tightrope.spaces.errors import DataError

log = logging.getLogger(__name__)
Float = NDArray[np.float32]
MOST_PATCH = 2304  # input features of a layer up to which its whole patch covariance is kept; above, that of its channels
MOST_CHANNELS = 4096  # input channels of a layer up to which a covariance is kept at all
ROWS = 128  # input rows kept of each layer
SAMPLES = 1 << 15  # values kept of each operator, at most; all together no more than there are weights, but for the least
LEAST_SAMPLES = 1 << 11
ROWS_PER_BATCH = 4096
VALUES_PER_BATCH = 1 << 23  # in these rows


@dataclass
class LayerStatistics:
    """What calibration saw of one layer. Features are `in/groups * kh * kw` of a convolution, `in` of a linear layer.

    `covariance` is `f x f`, centred: of all features where they are at most `MOST_PATCH` (`patches`), else of the input
    channels alone; `groups x f x f` for grouped and depthwise convolutions. It is None beyond `MOST_CHANNELS` channels. `mean`
    has all features, of one group after the other; `rows` some inputs, none where there are groups.
    """

    covariance: NDArray[np.float64] | None
    mean: NDArray[np.float64]
    patches: bool
    rows: Float
    output_mean: Float
    output_deviation: Float
    saliency: Float


@dataclass
class Statistics:
    """Calibration of a model: by layer, and the extremes and a sample of each operator's values."""

    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    low_high: dict[str, tuple[float, float]] = field(default_factory=dict)
    samples: dict[str, Float] = field(default_factory=dict)
    examples: int = 0


class _Layer:
    """Running sums of one layer."""

    def __init__(self, module: Any, keep: int, rng: torch.Generator) -> None:
        self.module, self.keep, self.rng = module, keep, rng
        weight = module.weight
        self.features = weight[0].numel()
        self.groups = module.groups if isinstance(module, nn.Conv2d) else 1
        self.patches = self.features <= MOST_PATCH
        size = self.features if self.patches else weight.shape[1]
        known = size <= MOST_CHANNELS and (self.groups == 1 or self.patches)
        self.second = torch.zeros(self.groups, size, size, dtype=torch.float64) if known else None
        self.first = torch.zeros(self.groups * self.features, dtype=torch.float64)
        self.centre: Tensor | None = None
        self.count = 0
        self.rows: list[Tensor] = []
        self.out = torch.zeros(3, weight.shape[0], dtype=torch.float64)
        self.saliency = torch.zeros(weight.shape[0], dtype=torch.float64)

    def read(self, x: Tensor) -> None:
        rows = self._patches(x) if isinstance(self.module, nn.Conv2d) else x.reshape(-1, x.shape[-1])
        if self.centre is None:
            self.centre = rows.mean(0)
        if len(self.rows) * self.keep < ROWS or not self.rows:
            self.rows.append(rows[torch.randperm(len(rows), generator=self.rng)[: self.keep]].clone())
        rows = rows - self.centre  # near the mean, so that the covariance keeps its digits
        self.count += len(rows)
        self.first += rows.sum(0, dtype=torch.float64)
        if self.second is None:
            return
        size = self.second.shape[1]
        if self.patches:
            narrow = rows.reshape(len(rows), self.groups, size).transpose(0, 1)
        else:
            narrow = rows.reshape(1, len(rows), size, -1)[..., self.features // size // 2]
        self.second += (narrow.transpose(1, 2) @ narrow).double()

    def _patches(self, x: Tensor) -> Tensor:
        """A sample of im2col rows, `positions x features`."""
        m = self.module
        height, width = (
            (s + 2 * p - d * (k - 1) - 1) // t + 1
            for s, p, d, k, t in zip(x.shape[2:], m.padding, m.dilation, m.kernel_size, m.stride, strict=True)
        )
        most = min(ROWS_PER_BATCH, max(1, VALUES_PER_BATCH // (self.groups * self.features)))
        if m.kernel_size == (1, 1) and m.padding == (0, 0):
            rows = x[:, :, :: m.stride[0], :: m.stride[1]].permute(0, 2, 3, 1).reshape(-1, x.shape[1])
            return rows if len(rows) <= most else rows[torch.randperm(len(rows), generator=self.rng)[:most]]
        padded = F.pad(x, (m.padding[1], m.padding[1], m.padding[0], m.padding[0]))
        total = len(x) * height * width
        chosen = torch.arange(total) if total <= most else torch.randperm(total, generator=self.rng)[:most]
        image, at = chosen // (height * width), chosen % (height * width)
        top, left = at // width * m.stride[0], at % width * m.stride[1]
        down = top[:, None] + torch.arange(m.kernel_size[0]) * m.dilation[0]
        across = left[:, None] + torch.arange(m.kernel_size[1]) * m.dilation[1]
        found = padded.permute(0, 2, 3, 1)[image[:, None, None], down[:, :, None], across[:, None, :]]
        return found.permute(0, 3, 1, 2).reshape(len(chosen), -1)

    def wrote(self, y: Tensor) -> None:
        values = y.transpose(0, 1).flatten(1) if isinstance(self.module, nn.Conv2d) else y.reshape(-1, y.shape[-1]).t()
        self.out[0] += values.shape[1]
        self.out[1] += values.sum(1, dtype=torch.float64)
        self.out[2] += values.square().sum(1, dtype=torch.float64)

    def finish(self) -> LayerStatistics:
        mean = self.first / max(self.count, 1)
        covariance = None
        if self.second is not None:
            size = self.second.shape[1]
            near = mean.reshape(self.groups, size, -1)
            near = near[:, :, near.shape[2] // 2]
            covariance = (self.second / max(self.count, 1) - near[:, :, None] * near[:, None, :]).numpy()
            covariance = covariance[0] if self.groups == 1 else covariance
        out_mean = self.out[1] / self.out[0]
        deviation = (self.out[2] / self.out[0] - out_mean.square()).clamp_min(0).sqrt()
        if self.centre is not None:
            mean = mean + self.centre.double()
        factorised = self.rows and self.groups == 1  # the others have no ranks
        rows = torch.cat(self.rows)[:ROWS] if factorised else torch.zeros(0, self.groups * self.features)
        return LayerStatistics(
            covariance,
            mean.numpy(),
            self.patches,
            rows.numpy(),
            out_mean.float().numpy(),
            deviation.float().numpy(),
            self.saliency.float().numpy(),
        )


class _Pass(fx.Interpreter):
    def __init__(
        self, traced: Traced, layers: Mapping[str, _Layer], statistics: Statistics, take: int, rng: torch.Generator
    ) -> None:
        super().__init__(traced.skeleton)
        self.layers, self.statistics, self.take, self.rng = layers, statistics, take, rng
        self.names = {
            **{op.name: op.name for op in traced.network.ops},
            **{n.name: name for n, name in input_names(traced.skeleton).items()},
        }

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_module":
            with torch.no_grad():
                source = self.env[n.args[0]]  # type: ignore[index]
                self.layers[str(n.target)].read(source.detach())
                self.layers[str(n.target)].wrote(value.detach())
        name = self.names.get(n.name)
        if name is not None and isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            flat = value.detach().reshape(-1)
            low, high = float(flat.min()), float(flat.max())
            if not np.isfinite(low) or not np.isfinite(high):
                raise DataError(f"operator {n.name} is not finite on the calibration data; its values reach [{low}, {high}]")
            before = self.statistics.low_high.get(name, (low, high))
            self.statistics.low_high[name] = (min(low, before[0]), max(high, before[1]))
            chosen = flat if len(flat) <= self.take else flat[torch.randint(len(flat), (self.take,), generator=self.rng)]
            self._samples.setdefault(name, []).append(chosen.float().clone())
        return value

    _samples: dict[str, list[Tensor]]


def batch_of(item: Any) -> tuple[Any, Any]:
    """`(inputs, target)` of one item of a loader; the target is None where there is none."""
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    return item, None


def flat_inputs(inputs: Any, traced: Traced) -> tuple[Any, ...]:
    """Positional arguments of the skeleton."""
    args, kwargs = arguments(inputs)
    given = (*args, *kwargs.values())
    if len(given) != len(traced.example):
        raise DataError(f"a batch must hold {len(traced.example)} inputs like example_inputs, got {len(given)}")
    return given


def first_tensor(value: Any) -> Tensor:
    """The model's first floating-point output: its logits."""
    for leaf in torch.utils._pytree.tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise DataError("the model returns no floating-point tensor")


def calibrate(
    traced: Traced, batches: Iterable[Any], loss: Callable[[Tensor, Any], Tensor] | None = None, seed: int = 0
) -> Statistics:
    """Run the dense skeleton over calibration batches, forward and backward.

    Args:
        batches: items `(inputs, target)` or `inputs` alone.
        loss: scalar loss of the first output and the target, for the saliency; by default cross-entropy with the target, or
            with the model's own prediction where there is none.

    Raises:
        DataError: there is no batch, a batch does not fit the model, or values are not finite.
    """
    rng = torch.Generator().manual_seed(seed)
    items = list(batches)
    if not items:
        raise DataError("the calibration split is empty; it must hold at least one batch of inputs")
    statistics = Statistics()
    keep = max(1, -(-ROWS // len(items)))
    layers = {name: _Layer(traced.layer(name), keep, rng) for name in traced.ties.outputs}
    each = sum(layer.module.weight.numel() for layer in layers.values()) // max(1, len(traced.network.ops))
    samples = min(SAMPLES, max(LEAST_SAMPLES, each))
    forward = _Pass(traced, layers, statistics, max(1, samples // len(items)), rng)
    forward._samples = {}
    parameters = {name: list(traced.layer(name).parameters()) for name in layers}
    flat = [p for own in parameters.values() for p in own]
    for item in items:
        inputs, target = batch_of(item)
        given = flat_inputs(inputs, traced)
        try:
            out = first_tensor(forward.run(*given, enable_io_processing=False))
        except (RuntimeError, ValueError, TypeError) as error:
            raise DataError(f"a calibration batch does not fit the model: {str(error).splitlines()[0]}") from error
        statistics.examples += len(out)
        gradients = torch.autograd.grad(_loss(out, target, loss), flat, allow_unused=True)
        by_parameter = dict(zip(map(id, flat), gradients, strict=True))
        for name, own in parameters.items():
            terms = [
                (p.detach() * g).flatten(1).sum(1) if p.dim() > 1 else p.detach() * g
                for p in own
                if (g := by_parameter[id(p)]) is not None
            ]
            if terms:
                layers[name].saliency += torch.stack(terms).sum(0).double().square()
    statistics.layers = {name: layer.finish() for name, layer in layers.items()}
    statistics.samples = {name: torch.cat(chunks).numpy() for name, chunks in forward._samples.items()}
    return statistics


def _loss(out: Tensor, target: Any, loss: Callable[[Tensor, Any], Tensor] | None) -> Tensor:
    if loss is not None:
        return loss(out, target)
    flat = out.reshape(-1, out.shape[-1]) if out.dim() > 1 else out[None]
    if not isinstance(target, Tensor) or target.numel() != len(flat) or target.is_floating_point():
        target = flat.detach().argmax(1)
    return F.cross_entropy(flat, target.reshape(-1).long())
