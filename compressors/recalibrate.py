"""Putting the statistics of a compressed model back to what the dense model had."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from tightrope.compressors.calibrate import batch_of, flat_inputs
from tightrope.compressors.capture import base, tensor_of
from tightrope.compressors.compress import origin
from tightrope.compressors.quantize.fake import Part
from tightrope.spaces.errors import DataError

LEAST, MOST = 0.5, 2.0  # a channel is stretched by no more


def recalibrate(small: fx.GraphModule, calibration: Iterable[Any]) -> fx.GraphModule:
    """Match each layer's output channels to the dense model's mean and deviation, layer after layer in one pass.

    A batch norm that was folded into its layer is recalibrated by that; one that stands alone gets the mean and variance of
    its new input. Works in place, on float weights and the scales of quantised ones, and returns `small`.

    Args:
        calibration: batches of the calibration split; all are run as one.
    """
    prepared = origin(small).prepared
    assert prepared.traced is not None
    items = [flat_inputs(batch_of(item)[0], prepared.traced) for item in calibration]
    if not items:
        raise DataError("the calibration split is empty; it must hold at least one batch of inputs")
    columns = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in zip(*items, strict=True)]
    with torch.no_grad():
        _Matching(small).run(*columns, enable_io_processing=False)
    return small


class _Matching(fx.Interpreter):
    def __init__(self, small: fx.GraphModule) -> None:
        super().__init__(small)
        self.origin = origin(small)
        self.seen: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        if base(n) == "batch_norm":
            self._renew(n)
        value = super().run_node(n)
        name = str(n.target)
        statistics = self.origin.prepared.statistics.layers
        if n.op != "call_module" or name not in statistics or name in self.seen:
            return value
        self.seen.add(name)
        return self._match(name, value)

    def _match(self, name: str, value: Tensor) -> Tensor:
        from tightrope.compressors.prune.order import kept

        prepared, policy = self.origin.prepared, self.origin.policy
        keep = prepared.axes[name, 0].keep(kept(prepared.orders, policy.all_widths(prepared.network)))
        dense = prepared.statistics.layers[name]
        module: Any = self.module.get_submodule(name)
        last: Any = module[-1] if isinstance(module, nn.Sequential) else module
        inner: Any = last.inner if isinstance(last, Part) else last
        if inner.bias is None:
            return value
        channels = value.transpose(0, 1).flatten(1) if isinstance(inner, nn.Conv2d) else value.reshape(-1, value.shape[-1]).t()
        mean, deviation = channels.mean(1), channels.std(1)
        wanted, spread = torch.from_numpy(dense.output_mean[keep]), torch.from_numpy(dense.output_deviation[keep])
        stretch = torch.where(deviation > 1e-8, spread / deviation.clamp_min(1e-8), 1.0).clamp(LEAST, MOST)
        if isinstance(last, Part) and last.bits < 32:
            last.scales *= stretch
        inner.weight *= stretch.reshape(-1, *[1] * (inner.weight.dim() - 1))
        inner.bias.copy_((inner.bias - mean) * stretch + wanted)
        shape = [1, -1, *[1] * (value.dim() - 2)] if isinstance(inner, nn.Conv2d) else [-1]
        return (value - mean.reshape(shape)) * stretch.reshape(shape) + wanted.reshape(shape)

    def _renew(self, n: fx.Node) -> None:
        value = self.env[n.args[0]]  # type: ignore[index]
        over = [d for d in range(value.dim()) if d != 1]
        tensor_of(self.module, str(n.args[3].target)).copy_(value.mean(over))  # type: ignore[union-attr, arg-type]
        tensor_of(self.module, str(n.args[4].target)).copy_(value.var(over, unbiased=False))  # type: ignore[union-attr, arg-type]
