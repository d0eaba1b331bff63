"""Batch norms behind the layers of a compressed model, for as long as it is fine-tuned.

A model without its batch norms is harder to train than with them. One behind a layer whose weights have a scale for each
output channel folds back into those scales and the bias: the codes stay as they are.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tightrope.compressors.capture import arguments
from tightrope.compressors.quantize.fake import Part

EPS = 1e-5


class Normed(nn.Module):
    """A convolution without its bias, and a batch norm behind it that has the layer's mean and deviation as it comes."""

    def __init__(self, layer: nn.Module, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.layer = layer
        inner = _inner(layer)
        self.norm = norm = nn.BatchNorm2d(len(mean), EPS)
        assert norm.running_mean is not None and norm.running_var is not None
        with torch.no_grad():
            norm.running_mean.copy_(mean - inner.bias)
            norm.running_var.copy_(variance)
            norm.weight.copy_((variance + EPS).sqrt())
            norm.bias.copy_(mean)
        inner.bias = None

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.norm(self.layer(x))
        return made

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """The layer, which does the same as both do in evaluation."""
        inner, norm = _inner(self.layer), self.norm
        assert norm.running_mean is not None and norm.running_var is not None
        factor = norm.weight / (norm.running_var + EPS).sqrt()
        factor = torch.where(factor.abs() < 1e-8, 1e-8, factor)
        inner.weight *= factor.reshape(-1, 1, 1, 1)
        inner.bias = nn.Parameter(norm.bias - norm.running_mean * factor)
        if isinstance(self.layer, Part) and self.layer.bits < 32:
            self.layer.scales *= factor.abs()
        return self.layer


def _inner(layer: nn.Module) -> Any:
    return layer.inner if isinstance(layer, Part) else layer


def _places(small: Any) -> Iterator[tuple[tuple[str, str], nn.Module]]:
    """Owner and name of each layer that a batch norm was folded into, and the layer; of factors, the last."""
    for path in getattr(small, "meta", {}).get("normed", ()):
        owner, _, name = path.rpartition(".")
        layer = small.get_submodule(path)
        if isinstance(layer, nn.Sequential):
            owner, name, layer = path, str(len(layer) - 1), layer[-1]
        if isinstance(_inner(layer), nn.Conv2d):
            yield (owner, name), layer


@contextmanager
def normed(small: nn.Module, batches: Iterable[Any]) -> Iterator[None]:
    """Batch norms where the model had them, inside; folded back at the end.

    Args:
        small: its `meta["normed"]` names the layers that a batch norm was folded into.
        batches: inputs from which the first means and deviations are taken.
    """
    found = dict(_places(small))
    sums = {key: torch.zeros(3, _inner(layer).out_channels, dtype=torch.float64) for key, layer in found.items()}

    def add(key: tuple[str, str], out: Tensor) -> None:
        flat = out.detach().transpose(0, 1).flatten(1).double()
        sums[key] += torch.stack([torch.full((len(flat),), flat.shape[1]), flat.sum(1), flat.square().sum(1)])

    hooks = [v.register_forward_hook(lambda m, given, out, key=key: add(key, out)) for key, v in found.items()]
    with torch.no_grad():
        for inputs in batches:
            args, kwargs = arguments(inputs)
            small(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    for (owner, name), layer in found.items():
        count, first, second = sums[owner, name]
        mean = first / count
        variance = (second / count - mean.square()).clamp_min(0)
        made = Normed(layer, mean.float(), variance.float()).train(small.training)
        setattr(small.get_submodule(owner), name, made)
    try:
        yield
    finally:
        for owner, name in found:
            holder: Any = small.get_submodule(owner)
            setattr(holder, name, getattr(holder, name).folded())
