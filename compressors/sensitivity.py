"""What each option of a space is expected to lose, from calibration alone: noise over signal at the output of a layer.

The statistics of calibration tell without running the model how far a layer's output moves, squared and relative to its
variance, when its weights are rounded or factorised (`tr(E C E') / tr(W C W')` for an error `E` and inputs of covariance `C`, as
in Frantar and Alistarh 2022, "Optimal brain compression"), when its input is rounded, or when it loses input channels and the
rest take over what they can. One option is looked at at a time, everything else whole. What a loss is worth in points of accuracy
is not known here: an agent learns it.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tightrope.compressors.factorize.low_rank import factors, product
from tightrope.compressors.kernels import clip_scales, encode
from tightrope.compressors.prepare import Prepared
from tightrope.spaces.network import Layer
from tightrope.spaces.space import Space, Variable

Double = NDArray[np.float64]


def losses(prepared: Prepared, space: Space) -> dict[str, tuple[float, ...]]:
    """For every decision of a space by name, the loss of each of its options: 0 where nothing is lost, 1 where a layer is noise."""
    sources = {op.layer: op.inputs[0] for op in reversed(space.network.ops) if op.kind == "layer"}

    def of(variable: Variable) -> Iterator[float]:
        if variable.kind == "channels":
            return _narrowed(prepared, variable)
        layer = space.network.layer(variable.target)
        if variable.kind == "rank":
            return _factorised(prepared, space, layer, variable)
        if variable.kind == "weight_bits":
            return (_rounded(prepared, layer, int(bits)) for bits in variable.options)
        return (_read(prepared, sources[layer.name], int(bits)) for bits in variable.options)

    return {v.name: tuple(max(0.0, x) for x in of(v)) for v in space.variables}


def _narrowed(prepared: Prepared, variable: Variable) -> Iterator[float]:
    """Added over the layers that read a group: what they cannot take over from the channels that go."""
    readers = prepared.network.readers(variable.target)
    known = [prepared.nested[x.name] for x in readers if x.name in prepared.nested]
    tails = []
    for nested in known:
        energy = np.square(nested.projected, dtype=np.float64).sum(1)  # of each input, beyond what those before it explain
        tails.append(1 - np.cumsum(energy) / max(float(energy.sum()), 1e-30))
    for width in variable.options:
        share = width / variable.options[-1]
        lost = [float(tail[max(1, round(share * len(tail))) - 1]) for tail in tails]
        yield sum(lost) if lost else 1 - share


def _factorised(prepared: Prepared, space: Space, layer: Layer, variable: Variable) -> Iterator[float]:
    weight, form, widths = prepared.weights[layer.name][0].astype(np.float64), space.forms[layer.name], space.network.widths
    for share in variable.options:
        rank = space.rank_of(layer, share, widths)
        yield 0.0 if rank is None else _noise(prepared, layer, product(factors(weight, form, rank), form) - weight)


def _rounded(prepared: Prepared, layer: Layer, bits: int) -> float:
    if bits == 32:
        return 0.0
    weight = prepared.weights[layer.name][0]
    flat = np.ascontiguousarray(weight.reshape(len(weight), -1))
    scales = clip_scales(flat, [bits])[0]
    return _noise(prepared, layer, encode(flat, scales, bits).astype(np.float64) * scales[:, None] - flat)


def _read(prepared: Prepared, source: str, bits: int) -> float:
    """The error of a layer's input at so many bits, over its variance."""
    if bits == 32:
        return 0.0
    values = prepared.statistics.samples[prepared.source_of(source)].astype(np.float64)
    low, high = prepared.range_of(source, bits)
    step = max((high - low) / (2**bits - 1), 1e-30)
    rounded = np.clip(np.round((values - low) / step), 0, 2**bits - 1) * step + low
    return float(np.square(rounded - values).mean() / max(float(values.var()), 1e-30))


def _noise(prepared: Prepared, layer: Layer, error: Double) -> float:
    """The variance that an error of a layer's weights causes at its output, over that of the output."""
    weight = prepared.weights[layer.name][0].astype(np.float64)
    moved, whole = (_energy(prepared, layer, w.reshape(len(weight), -1)) for w in (error, weight))
    return moved / max(whole, 1e-30)


def _energy(prepared: Prepared, layer: Layer, weight: Double) -> float:
    """Variance of the output of `out x features` weights, over all outputs; without a covariance, as if inputs were white."""
    nested, covariance = prepared.nested.get(layer.name), prepared.statistics.layers[layer.name].covariance
    if nested is not None:
        return float(np.square(_by_channel(weight, len(nested.order))[:, nested.order] @ nested.lower).sum())
    if covariance is None:
        return float(np.square(weight).sum())
    stack = covariance if covariance.ndim == 3 else covariance[None]
    rows = _by_channel(weight, stack.shape[1]).reshape(len(stack), -1, stack.shape[1])
    return float(((rows @ stack) * rows).sum())


def _by_channel(weight: Double, features: int) -> Double:
    """Rows over the features that a covariance has: of all, or of the channels, where each position of the kernel is a row."""
    outputs = len(weight)
    return weight.reshape(outputs, features, -1).swapaxes(1, 2).reshape(-1, features)
