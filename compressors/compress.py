"""A policy applied to a model: a plain, smaller `nn.Module`, and back to its arrays."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from tightrope.compressors.assemble import assemble
from tightrope.compressors.capture import checksum, tensor_of
from tightrope.compressors.cut import assemble as build
from tightrope.compressors.cut import build_layer, resized
from tightrope.compressors.payload import Part as Arrays
from tightrope.compressors.payload import Payload
from tightrope.compressors.prepare import Prepared
from tightrope.compressors.prune.order import kept
from tightrope.compressors.quantize.fake import Part, Quantizer
from tightrope.spaces.errors import CompressError
from tightrope.spaces.points import points
from tightrope.spaces.policy import Policy
from tightrope.spaces.unit import Unit, units_of

META = "tightrope"


@dataclass(frozen=True)
class Origin:
    """Where a compressed module comes from; it stands in `module.meta`."""

    prepared: Prepared
    policy: Policy


def compress(model: nn.Module | None, policy: Policy, prepared: Prepared) -> fx.GraphModule:
    """Return a compressed copy of the model that `prepared` was made of; the model is left as it was.

    Layers that the policy does not name are untouched. Where the policy has bit-widths below 32, the copy computes in
    floating point exactly what integer codes decode to (`spaces/points.py` says which tensors are codes).

    Args:
        model: the model that was prepared, or None. It is checked to be the same, and not otherwise used.

    Raises:
        PolicyError: the policy is for another network or cannot be satisfied.
        CompressError: the model is not the one that was prepared.
    """
    if prepared.traced is None:
        raise CompressError("these prepared arrays carry no graph; prepare the model again to build a module of it")
    if model is not None and checksum(model) != prepared.traced.skeleton.meta["model"]:
        raise CompressError("the model's weights are not those that were prepared; call prepare() again after changing them")
    return build_module(prepared, assemble(prepared, policy))


def build_module(prepared: Prepared, payload: Payload) -> fx.GraphModule:
    """The module of a payload."""
    tracing, policy = prepared.traced, payload.policy
    assert tracing is not None
    widths = policy.all_widths(prepared.network)
    layers = {}
    for name, parts in payload.parts.items():
        like = tracing.layer(name)
        made = [_part(like, arrays) for arrays in parts]
        layers[name] = made[0] if len(made) == 1 else nn.Sequential(*made)
    graph = resized(tracing.skeleton, tracing.ties, widths)
    module = build(tracing.skeleton, graph, tracing.ties, kept(prepared.orders, widths), layers)
    _put_points(module, payload, prepared)
    module.meta[META] = Origin(prepared, policy)
    return module.eval()


def _part(like: nn.Module, arrays: Arrays) -> nn.Module:
    unit = arrays.unit
    weight = torch.from_numpy(np.ascontiguousarray(arrays.weight))
    bias = None if arrays.bias is None else torch.from_numpy(arrays.bias)
    changes: dict[str, Any] = {}
    if isinstance(like, nn.Conv2d):
        changes = {"stride": unit.stride, "padding": unit.padding, "dilation": unit.dilation}
    inner = build_layer(like, weight, bias, **changes)
    codes = unit.act_bits == 8 and unit.weight_bits <= 8 and unit.part == 0  # what it reads is a point already
    reader = None if arrays.act_range is None or codes else Quantizer(arrays.act_range, unit.act_bits)
    if unit.weight_bits == 32 and reader is None:
        return inner
    scales = None if arrays.scales is None else torch.from_numpy(arrays.scales.copy())
    return Part(inner, unit.weight_bits, scales, reader)


def _put_points(module: fx.GraphModule, payload: Payload, prepared: Prepared) -> None:
    """Insert a quantiser behind every operator that is a point."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    module.add_module("points", nn.Module())
    holder: Any = module.points
    for node in list(module.graph.nodes):
        name = node.name if node.op != "placeholder" else ("input" if node is inputs[0] else f"input:{node.name}")
        if name not in payload.ranges:
            continue
        holder.add_module(node.name, Quantizer(payload.ranges[name], source=prepared.source_of(name)))
        behind = inputs[-1] if node.op == "placeholder" else node
        with module.graph.inserting_after(behind):
            point = module.graph.call_module(f"points.{node.name}", (node,))
        node.replace_all_uses_with(point, delete_user_cb=lambda user, point=point: user is not point)
    module.graph.lint()
    module.recompile()


def origin(module: nn.Module) -> Origin:
    """Where a compressed module comes from."""
    found = getattr(module, "meta", {}).get(META)
    if not isinstance(found, Origin):
        raise CompressError("this module was not made by compress(); only those can be fine-tuned or exported as compressed")
    return found


def payload_of(module: fx.GraphModule) -> Payload:
    """The arrays of a compressed module as it is now, fine-tuned or not."""
    from_ = origin(module)
    network, policy = from_.prepared.network, from_.policy
    widths = policy.all_widths(network)
    parts: dict[str, tuple[Arrays, ...]] = {}
    sources = {op.layer: op.inputs[0] for op in reversed(network.ops) if op.kind == "layer"}
    for layer in network.layers:
        units = units_of(layer, policy.choice(layer.name), widths)
        found = module.get_submodule(layer.name)
        pieces = [*found] if isinstance(found, nn.Sequential) else [found]
        arrays = [_arrays(unit, piece) for unit, piece in zip(units, pieces, strict=True)]
        if units[0].act_bits <= 8 and arrays[0].act_range is None:
            arrays[0] = replace(arrays[0], act_range=_point(module, sources[layer.name]).span)
        parts[layer.name] = tuple(arrays)
    ranges = {op: _point(module, op).span for op in points(network, policy)}
    parameters = {p.name: tensor_of(module, p.name).detach().float().numpy() for p in network.parameters}
    return Payload(policy, parts, ranges, parameters)


def _point(module: fx.GraphModule, op: str) -> Quantizer:
    """The quantiser behind an operator."""
    name = op if op != "input" else next(n.name for n in module.graph.nodes if n.op == "placeholder")
    found = module.get_submodule(f"points.{name.removeprefix('input:')}")
    assert isinstance(found, Quantizer)
    return found


def _arrays(unit: Unit, piece: nn.Module) -> Arrays:
    inner: Any = piece.inner if isinstance(piece, Part) else piece
    bias = None if inner.bias is None else inner.bias.detach().numpy().copy()
    if not isinstance(piece, Part) or piece.bits == 32:
        span = piece.reader.span if isinstance(piece, Part) and piece.reader is not None else None
        return Arrays(unit, inner.weight.detach().numpy().copy(), bias, act_range=span)
    with torch.no_grad():
        codes, weight = piece.codes().to(torch.int8).numpy(), piece.weight().numpy()
    return Arrays(unit, weight, bias, codes, piece.scales.numpy().copy(), None if piece.reader is None else piece.reader.span)
