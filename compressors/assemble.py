"""From a policy to arrays: the payload of a compressed model, out of what was prepared."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tightrope.compressors.factorize.low_rank import factors, product
from tightrope.compressors.kernels import clip_scales, encode
from tightrope.compressors.payload import Float, Part, Payload
from tightrope.compressors.prepare import Prepared, Settings
from tightrope.compressors.prune.order import kept
from tightrope.compressors.prune.reconstruct import damped, factor, reconstruct
from tightrope.compressors.quantize.ranges import choose
from tightrope.compressors.quantize.rounding import BY_OUTPUT, Gram, whole_scales
from tightrope.spaces.network import Layer
from tightrope.spaces.points import points
from tightrope.spaces.policy import Choice, Policy
from tightrope.spaces.unit import units_of

Double = NDArray[np.float64]
MOST_BY_OUTPUT = 7  # bits up to which rounding looks at the layer's output; at 8 the nearest codes lose nothing to speak of
Flags = Mapping[str, NDArray[np.bool_]]
Rounded = tuple[Double, NDArray[np.int8] | None, Float | None]  # weights, their codes, scales


def assemble(prepared: Prepared, policy: Policy) -> Payload:
    """Cut, reconstruct, factorise and quantise every layer as the policy says.

    Raises:
        PolicyError: the policy is for another network or cannot be satisfied.
    """
    network = prepared.network
    policy.check(network)
    widths = policy.all_widths(network)
    flags = kept(prepared.orders, widths)
    parts = {}
    sources = {op.layer: op.inputs[0] for op in reversed(network.ops) if op.kind == "layer"}
    for layer in network.layers:
        choice = policy.choice(layer.name)
        near = {*layer.inputs.groups, *layer.outputs.groups}
        key = (layer.name, choice, tuple((g, widths[g]) for g in sorted(near)))
        found = prepared.memo.get(key)
        if found is None:
            found = _parts(prepared, layer, choice, widths, flags)
            if choice.act_bits <= 8:
                found = (replace(found[0], act_range=prepared.range_of(sources[layer.name], choice.act_bits)), *found[1:])
            prepared.memo.put(key, found)
        parts[layer.name] = found
    ranges = {op: prepared.range_of(op, 8) for op in points(network, policy)}
    return Payload(policy, parts, ranges, {name: _cut(prepared, name, flags) for name in prepared.parameters})


def _cut(prepared: Prepared, name: str, flags: Flags) -> Float:
    value = prepared.parameters[name]
    for dim in range(value.ndim):
        axis = prepared.axes.get((name, dim))
        if axis is not None:
            value = np.take(value, axis.keep(flags), axis=dim)
    return value


def _parts(prepared: Prepared, layer: Layer, choice: Choice, widths: dict[str, int], flags: Flags) -> tuple[Part, ...]:
    dense, bias = prepared.weights[layer.name]
    out = prepared.axes[layer.name, 0].keep(flags)
    keep = prepared.axes[layer.name, 1].keep(flags)
    whole = dense[out].astype(np.float64)
    shift, mean = np.zeros(len(out)), prepared.statistics.layers[layer.name].mean
    if layer.groups == 1 and layer.kind != "depthwise":
        whole, shift, mean = _narrow(prepared, layer.name, whole, out, keep, mean)
    else:
        whole = whole[:, keep]
        mean = mean.reshape(-1, dense.shape[1], dense[0, 0].size)[_conv_groups(prepared, layer, out)][:, keep].reshape(len(out), -1)
    pieces = (whole,) if choice.rank is None else factors(whole, choice.form, choice.rank)
    units = units_of(layer, choice, widths)
    by_output = choice.rank is None and choice.weight_bits <= MOST_BY_OUTPUT and prepared.settings.rounding != "nearest"
    gram = _gram(prepared, layer, out, keep) if by_output else None
    made = [_round(piece, choice.weight_bits, prepared.settings, gram) for piece in pieces]
    effective = made[0][0] if choice.rank is None else product(tuple(w for w, _, _ in made), choice.form)
    if prepared.settings.bias_correction and (choice.rank is not None or choice.weight_bits < 32):
        shift = shift + ((whole - effective).reshape(len(out), -1) * mean).sum(1)
    total = None if bias is None else (bias[out] + shift).astype(np.float32)
    parts = []
    spans = _inner_ranges(prepared, layer.name, choice, made, keep) if len(units) > 1 else []
    for number, (unit, (weight, codes, scales)) in enumerate(zip(units, made, strict=True)):
        span = spans[number - 1] if number and choice.act_bits <= 8 else None
        last = number == len(units) - 1
        parts.append(Part(unit, weight.astype(np.float32), total if last else None, codes, scales, span))
    return tuple(parts)


def _narrow(
    prepared: Prepared, name: str, weight: Double, out: NDArray[np.int64], keep: NDArray[np.int64], mean: Double
) -> tuple[Double, Double, Double]:
    """Weights of the outputs `out` over the kept inputs, the shift of the bias, and the mean of the kept features."""
    outputs, inputs = weight.shape[:2]
    flat = weight.reshape(outputs, inputs, -1)
    each = flat.shape[2]
    features = (keep[:, None] * each + np.arange(each)).reshape(-1)
    if len(keep) == inputs:
        return weight, np.zeros(outputs), mean
    statistics, nested = prepared.statistics.layers[name], prepared.nested.get(name)
    wide = not statistics.patches  # the covariance of channels: each position of the kernel is reconstructed by itself
    if nested is not None and wide:
        flat_out = (out[:, None] * each + np.arange(each)).reshape(-1)
        new = nested.at(len(keep), flat_out).reshape(outputs, each, -1).transpose(0, 2, 1).reshape(outputs, -1)
    elif nested is not None:
        new = nested.at(len(features), out)
    elif statistics.covariance is None or not prepared.settings.reconstruct:
        new = flat[:, keep].reshape(outputs, -1)
    elif wide:
        rows = flat.transpose(0, 2, 1).reshape(-1, inputs)
        new = reconstruct(rows, statistics.covariance, keep).reshape(outputs, each, -1).transpose(0, 2, 1).reshape(outputs, -1)
    else:
        new = reconstruct(weight.reshape(outputs, -1), statistics.covariance, features)
    shift = weight.reshape(outputs, -1) @ mean - new @ mean[features]
    return new.reshape(outputs, len(keep), *weight.shape[2:]), shift, mean[features]


def _round(weight: Double, bits: int, settings: Settings, gram: Gram | None) -> Rounded:
    """Weights on the grid of their codes, with one scale for each output channel."""
    if bits == 32:
        return weight, None, None
    flat = np.ascontiguousarray(weight.reshape(len(weight), -1), np.float32)
    scales = clip_scales(flat, [bits])[0] if settings.clip == "mse" else whole_scales(flat, bits)
    if gram is None:
        codes = encode(flat, scales, bits)
    else:
        steps = flat.astype(np.float64) / scales[:, None]
        by_position = steps.reshape(len(flat), -1, steps.shape[1] // gram.features)  # of the kernel, where the Gram is of channels
        rows = by_position.swapaxes(1, 2).reshape(-1, gram.features)
        found = BY_OUTPUT[settings.rounding](rows, bits, gram)
        codes = found.reshape(len(flat), -1, gram.features).swapaxes(1, 2).reshape(flat.shape).astype(np.int8)
    rounded = codes.astype(np.float64) * scales[:, None]
    return rounded.reshape(weight.shape), codes.reshape(weight.shape), scales


def _conv_groups(prepared: Prepared, layer: Layer, out: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which group of a grouped convolution each of its outputs belongs to."""
    dense = prepared.weights[layer.name][0]
    groups = layer.inputs.at(prepared.network.widths) // dense.shape[1]
    found: NDArray[np.int64] = out // (len(dense) // groups)
    return found


def _gram(prepared: Prepared, layer: Layer, out: NDArray[np.int64], keep: NDArray[np.int64]) -> Gram | None:
    """The Gram matrix of the kept inputs of a layer; of its channels where it is too wide for that of its patches."""
    statistics, nested = prepared.statistics.layers[layer.name], prepared.nested.get(layer.name)
    each = prepared.weights[layer.name][0][0, 0].size if statistics.patches else 1
    features = (keep[:, None] * each + np.arange(each)).reshape(-1)
    count = len(features)
    if nested is not None:  # its factor is that of any beginning of its order
        return Gram(np.argsort(np.argsort(nested.order[:count])), nested.lower[:count, :count])
    if statistics.covariance is None:
        return None
    if statistics.covariance.ndim == 2:
        kept_ones = damped(statistics.covariance)[np.ix_(features, features)]
        order = np.argsort(np.diag(kept_ones), kind="stable")
        return Gram(order, factor(kept_ones[np.ix_(order, order)]))
    own = np.unique(_conv_groups(prepared, layer, out))
    stack = np.stack([factor(damped(statistics.covariance[g])[np.ix_(features, features)]) for g in own])
    return Gram(np.arange(count), stack)


def _inner_ranges(
    prepared: Prepared, name: str, choice: Choice, made: Sequence[Rounded], keep: NDArray[np.int64]
) -> list[tuple[float, float]]:
    """Ranges of what the factors hand to each other, from the rows kept in calibration."""
    first = made[0][0]
    rows = prepared.statistics.layers[name].rows.astype(np.float64)
    patches = rows.reshape(len(rows), -1, *prepared.weights[name][0].shape[2:])[:, keep]
    if choice.form == "svd":
        values = [patches.reshape(len(rows), -1) @ first.reshape(len(first), -1).T]
    elif choice.form == "spatial":
        middle = patches[..., patches.shape[3] // 2].reshape(len(rows), -1)
        values = [middle @ first.reshape(len(first), -1).T]
    else:
        centre = patches[..., patches.shape[2] // 2, patches.shape[3] // 2]
        joined = np.einsum("ri,srkl->sikl", first[:, :, 0, 0], made[1][0])
        values = [centre @ first[:, :, 0, 0].T, np.einsum("nikl,sikl->ns", patches, joined, optimize=True)]
    bits = min(choice.act_bits, 8)
    found = []
    for value in values:
        flat = value.astype(np.float32).reshape(-1)
        low, high = (float(flat.min()), float(flat.max())) if len(flat) else (-1.0, 1.0)
        found.append(choose(flat, (low, high), bits, prepared.settings.ranges))
    return found
