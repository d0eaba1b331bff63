"""Preparing and compressing: every stage against a slower or closed form of it."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import (
    Attention,
    Dense,
    Flat,
    InPlace,
    OneDimensional,
    Residual,
    Separable,
    Several,
    Tied,
    Upsampling,
    build,
)
from torch import Tensor, fx, nn

from tightrope.compressors.assemble import assemble
from tightrope.compressors.capture import checksum
from tightrope.compressors.compress import compress, origin, payload_of
from tightrope.compressors.factorize.low_rank import factors, product
from tightrope.compressors.payload import affine
from tightrope.compressors.prepare import Prepared, Settings, prepare, prepared_from
from tightrope.compressors.prune.reconstruct import DAMPING, reconstruct
from tightrope.compressors.quantize.fake import Part, Quantizer
from tightrope.compressors.quantize.ranges import choose
from tightrope.compressors.trace import run
from tightrope.spaces import Choice, Policy, Space
from tightrope.spaces.errors import CompressError, DataError, PolicyError
from tightrope.spaces.unit import macs, size_bytes

torch.set_num_threads(1)
Kind = Callable[[], nn.Module]
KINDS: list[Kind] = [
    Residual,
    Attention,
    Separable,
    Dense,
    Flat,
    OneDimensional,
    InPlace,
    Tied,
    Upsampling,
    Several,
]
_PREPARED: dict[Any, Prepared] = {}


def batches(count: int = 3, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(0, 5, (size,), generator=generator)) for _ in range(count)
    ]


def of(kind: Kind, how: Settings | None = None) -> Prepared:
    key = (kind, how)
    if key not in _PREPARED:
        if how is not None and (kind, None) in _PREPARED:
            tracing = _PREPARED[kind, None].traced
            assert tracing is not None
            _PREPARED[key] = prepared_from(tracing, batches(), how)
        else:
            _PREPARED[key] = prepare(build(kind), batches()[0][0], batches(), how)
    return _PREPARED[key]


def space(prepared: Prepared, form: str = "spatial") -> Space:
    pairs = [(2, 8), (3, 4), (4, 32), (5, 5), (8, 8), (8, 32), (32, 32)]
    return Space.build(prepared.network, lambda _: pairs, form=form, least_width=0.25)


def leaves(value: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_policy_changes_nothing(kind: Kind) -> None:
    prepared, model, x = of(kind), build(kind), batches()[0][0]
    small = compress(model, Policy.make(prepared.network), prepared)
    with torch.no_grad():
        for found, wanted in zip(leaves(small(x)), leaves(model(x)), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def reads(prepared: Prepared, layer: str) -> Tensor:
    """What a dense layer reads over all calibration batches."""
    assert prepared.traced is not None
    seen: list[Tensor] = []
    handle = prepared.traced.layer(layer).register_forward_hook(lambda m, given, out: seen.append(given[0].detach()))
    for x, _ in batches():
        run(prepared.traced.skeleton, (x,))
    handle.remove()
    return torch.cat(seen)


def rows_of(module: Any, x: Tensor) -> np.ndarray:
    """Input rows of a layer, by torch's own unfold: positions x features."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1]).double().numpy()
    unfolded = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    return unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1]).double().numpy()


@pytest.mark.parametrize(
    ("kind", "layer", "width"), [(Residual, "a2", 2), (Residual, "head", 7), (Flat, "mid", 3), (Attention, "down", 9)]
)
def test_reconstruction_is_the_least_squares_fit(kind: Kind, layer: str, width: int) -> None:
    """Against numpy's lstsq on the rows themselves, the damping as further rows that pull towards the old weights."""
    prepared = of(kind)
    assert prepared.traced is not None
    module: Any = prepared.traced.layer(layer)
    (group,) = prepared.network.layer(layer).inputs.groups
    policy = Policy.make(prepared.network, {group: width})
    rows = rows_of(module, reads(prepared, layer))
    keep = prepared.axes[layer, 1].keep({group: np.isin(np.arange(prepared.network.widths[group]), prepared.orders[group][:width])})
    each = module.weight[0].numel() // module.weight.shape[1]
    features = (keep[:, None] * each + np.arange(each)).reshape(-1)
    weight = module.weight.detach().double().flatten(1).numpy()
    centred = rows - rows.mean(0)
    damping = np.sqrt(len(rows) * (DAMPING * np.square(centred).sum() / len(rows) / rows.shape[1] + 1e-12))
    left = np.vstack([centred[:, features], damping * np.eye(len(features))])
    right = np.vstack([centred @ weight.T, damping * weight[:, features].T])
    wanted = np.linalg.lstsq(left, right, rcond=None)[0].T
    (part,) = assemble(prepared, policy).parts[layer]
    np.testing.assert_allclose(part.weight.reshape(len(weight), -1), wanted, rtol=1e-3, atol=2e-4 * np.abs(wanted).max())
    bias = module.bias.detach().double().numpy() + weight @ rows.mean(0) - wanted @ rows.mean(0)[features]
    np.testing.assert_allclose(part.bias, bias, rtol=1e-3, atol=1e-3 * np.abs(bias).max())
    (plain,) = assemble(of(kind, Settings(reconstruct=False)), policy).parts[layer]
    errors = []
    for candidate in (part, plain):
        made = rows[:, features] @ candidate.weight.reshape(len(weight), -1).T + candidate.bias
        errors.append(np.square(made - rows @ weight.T - module.bias.detach().double().numpy()).mean())
    assert errors[0] < errors[1] or np.allclose(errors[0], errors[1], rtol=1e-3)


@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 2**31), st.data())
@settings(deadline=None, max_examples=30)
def test_nested_reconstruction_equals_one_made_for_the_set(size: int, outputs: int, seed: int, data: st.DataObject) -> None:
    from tightrope.compressors.prune.reconstruct import Nested

    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(5 * size, size)) @ rng.normal(size=(size, size))
    covariance, weight, order = (
        np.cov(rows.T, bias=True).reshape(size, size),
        rng.normal(size=(outputs, size)),
        rng.permutation(size),
    )
    count = data.draw(st.integers(1, size))
    nested = Nested.of(weight, covariance, order).at(count, np.arange(outputs))
    np.testing.assert_allclose(nested, reconstruct(weight, covariance, np.sort(order[:count])), rtol=1e-4, atol=1e-5)


# ---- factors


def gaussian(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


def tail(matrix: np.ndarray, rank: int) -> float:
    """The error of the best approximation of a matrix at a rank (Eckart-Young)."""
    return float(np.sqrt(np.square(np.linalg.svd(matrix, compute_uv=False)[rank:]).sum()))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_svd_has_the_least_error(rank: int) -> None:
    weight = gaussian(7, 5)
    found = product(factors(weight, "svd", rank), "svd")
    assert np.linalg.norm(weight - found) == pytest.approx(tail(weight, rank), abs=1e-9)
    point = gaussian(7, 5, 1, 1)
    assert [f.shape for f in factors(point, "svd", rank)] == [(rank, 5, 1, 1), (7, rank, 1, 1)]


@pytest.mark.parametrize("rank", [1, 4, 12, 15])
def test_spatial_has_the_least_error_of_its_form(rank: int) -> None:
    weight = gaussian(6, 5, 3, 2)
    found = product(factors(weight, "spatial", min(rank, 12)), "spatial")
    matrix = np.stack([weight[o, :, :, w].reshape(-1) for o in range(6) for w in range(2)])
    assert np.linalg.norm(weight - found) == pytest.approx(tail(matrix, min(rank, 12)), abs=1e-9)


@pytest.mark.parametrize(("inner", "outer"), [(1, 1), (3, 4), (5, 6), (5, 2)])
def test_tucker_lies_within_its_bounds(inner: int, outer: int) -> None:
    from tightrope.compressors.factorize.low_rank import tucker

    weight = gaussian(6, 5, 3, 3)
    error = np.linalg.norm(weight - product(tucker(weight, inner, outer), "tucker"))
    by_in, by_out = tail(np.moveaxis(weight, 1, 0).reshape(5, -1), inner), tail(weight.reshape(6, -1), outer)
    assert max(by_in, by_out) - 1e-9 <= error <= np.hypot(by_in, by_out) + 1e-9


@pytest.mark.parametrize("form", ["spatial", "tucker"])
@pytest.mark.parametrize("geometry", [{}, {"stride": (2, 1), "padding": (1, 2)}, {"dilation": (2, 1), "padding": (2, 1)}])
def test_factors_in_a_row_are_their_product(form: str, geometry: dict[str, Any]) -> None:
    """At the geometry that `spaces` gives the units, the convolutions one after the other are that of the product."""
    from tightrope.spaces import Extent, Layer
    from tightrope.spaces.unit import units_of

    weight, x = gaussian(6, 5, 3, 3), torch.from_numpy(np.random.default_rng(1).normal(size=(2, 5, 9, 8)))
    stride, padding, dilation = (geometry.get(k, v) for k, v in (("stride", (1, 1)), ("padding", (0, 0)), ("dilation", (1, 1))))
    wanted = F.conv2d(
        x, torch.from_numpy(np.ascontiguousarray(product(factors(weight, form, 3), form))), None, stride, padding, dilation
    )
    out = (int(wanted.shape[2]), int(wanted.shape[3]))
    layer = Layer("x", "conv", Extent(5), Extent(6), (3, 3), stride, padding, dilation, 1, (9, 8), out)
    for unit, piece in zip(units_of(layer, Choice(rank=3, form=form), {}), factors(weight, form, 3), strict=True):
        assert piece.shape == (unit.out_channels, unit.in_channels, *unit.kernel)
        x = F.conv2d(x, torch.from_numpy(np.ascontiguousarray(piece)), None, unit.stride, unit.padding, unit.dilation)
        assert tuple(x.shape[2:]) == unit.out_size
    torch.testing.assert_close(x, wanted)


@pytest.mark.parametrize("form", ["spatial", "tucker"])
def test_full_rank_is_exact_in_the_model(form: str) -> None:
    prepared, x = of(Residual), batches()[0][0]
    full = {"spatial": 24, "tucker": 10}[form]
    choices = {"b1": Choice(rank=full, form=form), "head": Choice(rank=5, form="svd"), "short": Choice(rank=8, form="svd")}
    small = compress(None, Policy.make(prepared.network, choices=choices), prepared)
    with torch.no_grad():
        torch.testing.assert_close(small(x), build(Residual)(x), rtol=1e-4, atol=1e-4)


# ---- ranges and codes


def rounding_error(values: np.ndarray, low: float, high: float, bits: int) -> float:
    """By the definition, one value at a time over all codes."""
    scale, zero = affine(low, high, bits)
    grid = (np.arange(2**bits) - zero) * scale
    return float(np.square(np.abs(values[:, None] - grid[None]).min(1)).sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "relu", "outlier"])
def test_mse_ranges_are_near_the_best_of_all(bits: int, kind: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=2000).astype(np.float32)
    values = np.maximum(values, 0) if kind == "relu" else np.append(values, np.float32(12.0)) if kind == "outlier" else values
    low, high = float(values.min()), float(values.max())
    found = rounding_error(values, *choose(values, (low, high), bits, "mse"), bits)
    shares = np.linspace(0.25, 1.0, 151)
    best = min(rounding_error(values, min(low, 0) * s, max(high, 0) * s, bits) for s in shares)
    assert found <= 1.1 * best
    assert found <= rounding_error(values, *choose(values, (low, high), bits, "minmax"), bits) * (1 + 1e-6)


METHODS = st.sampled_from(("mse", "percentile", "minmax"))


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40), st.sampled_from((2, 4, 8)), METHODS)
def test_zero_is_exact_in_every_range(values: list[float], bits: int, method: Any) -> None:
    data = np.array(values, np.float32)
    low, high = choose(data, (float(data.min()), float(data.max())), bits, method)
    assert min(float(data.min()), 0.0) - 1e-6 <= low <= 0 <= high <= max(float(data.max()), 0.0) + 1e-6
    quantizer = Quantizer((low, high), bits)
    assert float(quantizer(torch.zeros(1))) == 0.0
    codes = quantizer(torch.from_numpy(data)) / quantizer.scale
    assert len(torch.unique(codes.round())) <= 2**bits


def test_minmax_and_percentile_by_definition() -> None:
    data = np.random.default_rng(0).normal(1, 1, 50_000).astype(np.float32)
    assert choose(data, (-7.0, 9.0), 8, "minmax") == (-7.0, 9.0)
    low, high = choose(data, (float(data.min()), float(data.max())), 8, "percentile")
    assert (data < low).sum() == pytest.approx(5, abs=1) and (data > high).sum() == pytest.approx(5, abs=1)


def test_movers_have_the_range_of_what_they_read() -> None:
    prepared = of(Flat)
    kinds = {op.kind: op for op in prepared.network.ops}
    assert prepared.range_of(kinds["max_pool2d"].name, 8) == prepared.range_of(kinds["max_pool2d"].inputs[0], 8)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_weights_lie_within_half_a_step_unless_clipped(bits: int) -> None:
    prepared = of(Residual, Settings(rounding="nearest"))
    names = [x.name for x in prepared.network.layers[1:-1]]
    payload = assemble(prepared, Policy.make(prepared.network, choices={n: Choice(bits, 32) for n in names}))
    most = 2 ** (bits - 1) - 1
    for name in names:
        (part,) = payload.parts[name]
        assert part.codes is not None and part.scales is not None
        assert part.codes.min() >= -most and part.codes.max() <= most
        scales = part.scales.reshape(-1, 1, 1, 1)
        np.testing.assert_allclose(part.weight, part.codes * scales, rtol=1e-6)
        error, dense = np.abs(part.weight - prepared.weights[name][0]), prepared.weights[name][0]
        assert (error <= scales * 0.5001)[np.abs(part.codes) < most].all()
        widest = np.abs(dense).reshape(len(dense), -1).max(1).reshape(-1, 1, 1, 1) / most
        plain = np.clip(np.rint(dense / widest), -most, most) * widest
        assert (np.square(part.weight - dense).sum((1, 2, 3)) <= np.square(plain - dense).sum((1, 2, 3)) * 1.0001 + 1e-12).all()


def test_bias_correction_takes_the_mean_error_away() -> None:
    shifts = {}
    for corrected in (False, True):
        prepared = of(Residual, Settings(bias_correction=corrected))
        assert prepared.traced is not None
        for choice in (Choice(2, 32), Choice(32, 32, 4, "spatial"), Choice(3, 32, 4, "tucker")):
            small = compress(None, Policy.make(prepared.network, choices={"b1": choice}), prepared)
            x = reads(prepared, "b1")
            with torch.no_grad():
                error = small.get_submodule("b1")(x) - prepared.traced.layer("b1")(x)
            shifts[choice, corrected] = float(error.mean((0, 2, 3)).abs().max())
    for choice, corrected in shifts:
        if corrected:
            assert shifts[choice, True] < 2e-4 < 10 * 2e-4 < shifts[choice, False]


# ---- the whole


def weight_bytes(small: fx.GraphModule) -> int:
    """Bytes of a compressed module: codes at their bits, scales, steps of inputs, biases, and what stands outside of layers."""
    total, inside = 0, set()
    for module in small.modules():
        bits = 32
        if isinstance(module, Part):
            layer: Any = module.inner
            bits = module.bits
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            layer = module
        else:
            continue
        if id(layer) in inside:
            continue
        inside.add(id(layer))
        total += -(-layer.weight.numel() * bits // 8)
        total += 0 if layer.bias is None else 4 * layer.bias.numel()
        total += 4 * len(layer.weight) if bits < 32 else 0
    own = {id(p) for m in small.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) for p in m.parameters(recurse=False)}
    outside = [t for n, t in [*small.named_parameters(), *small.named_buffers()] if id(t) not in own and "points" not in n]
    return total + sum(4 * t.numel() for t in outside if t.dim()) - scales_of(small)


def scales_of(small: fx.GraphModule) -> int:
    return sum(4 * m.scales.numel() for m in small.modules() if isinstance(m, Part))


def count_macs(small: fx.GraphModule, x: Tensor) -> int:
    total = 0

    def hook(module: Any, given: tuple[Tensor], out: Tensor) -> None:
        nonlocal total
        layer = module.inner if isinstance(module, Part) else module
        total += out.numel() * layer.weight[0].numel()

    parts = [m for m in small.modules() if isinstance(m, Part)]
    plain = {id(p.inner) for p in parts}
    layers = [*parts, *(m for m in small.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and id(m) not in plain)]
    handles = [m.register_forward_hook(hook) for m in layers]
    with torch.no_grad():
        run(small, (x,))
    for handle in handles:
        handle.remove()
    return total // len(x)


@pytest.mark.parametrize("form", ["spatial", "tucker"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compressed_copy_is_what_its_policy_says(kind: Kind, form: str) -> None:
    """Bytes and MACs to one per cent, its arrays those of `assemble`, its outputs the same whenever it is made."""
    prepared, x = of(kind), batches()[0][0]
    here, rng = space(prepared, form), np.random.default_rng(3)
    for policy in (here.sample(rng) for _ in range(2)):
        small = compress(None, policy, prepared)
        assert count_macs(small, x[:2]) == pytest.approx(macs(prepared.network, policy), rel=0.01)
        steps = 8 * sum(c.act_bits < 32 for n, c in policy.choices for _ in assemble(prepared, policy).parts[n])
        assert weight_bytes(small) + steps == pytest.approx(size_bytes(prepared.network, policy), rel=0.01)
        same(payload_of(small), assemble(prepared, policy))
        fresh = replace(prepared, memo=type(prepared.memo)(1), _ranges={})
        same(assemble(fresh, policy), assemble(prepared, policy))
        with torch.no_grad():
            for a, b in zip(leaves(small(x)), leaves(compress(None, policy, fresh)(x)), strict=True):
                assert torch.equal(a, b) and bool(torch.isfinite(a).all())
        assert origin(small).policy == policy


def same(a: Any, b: Any) -> None:
    assert a.policy == b.policy and a.ranges == b.ranges
    assert a.parameters.keys() == b.parameters.keys() and a.parts.keys() == b.parts.keys()
    for name in a.parameters:
        np.testing.assert_array_equal(a.parameters[name], b.parameters[name])
    for name in a.parts:
        for p, q in zip(a.parts[name], b.parts[name], strict=True):
            assert p.unit == q.unit and p.act_range == q.act_range
            for field in ("weight", "bias", "codes", "scales"):
                left, right = getattr(p, field), getattr(q, field)
                assert (left is None) == (right is None), (name, field)
                if left is not None:
                    np.testing.assert_array_equal(left, right)


def test_eight_bits_stay_near_the_dense_model() -> None:
    for kind in (Residual, Separable, Attention):
        prepared, x = of(kind), batches()[0][0]
        small = compress(None, space(prepared).uniform(1.0, (8, 8)), prepared)
        with torch.no_grad():
            dense = build(kind)(x)
            assert float((small(x) - dense).std() / dense.std()) < 0.05


def test_integer_tensors_take_at_most_256_values() -> None:
    prepared, x = of(Residual), batches()[0][0]
    small = compress(None, space(prepared).uniform(1.0, (8, 8)), prepared)
    seen: dict[str, int] = {}
    for name, module in small.named_modules():
        if isinstance(module, Quantizer):
            module.register_forward_hook(lambda m, g, out, name=name: seen.update({name: len(torch.unique(out))}))
    with torch.no_grad():
        small(x)
    assert len(seen) > 8 and max(seen.values()) <= 256 and min(seen.values()) > 20


def test_models_and_prepared_arrays_are_left_as_they_were() -> None:
    model = build(Residual)
    before = checksum(model)
    prepared = prepare(model, batches()[0][0], batches())
    digest = prepared.checksum()
    for seed in range(3):
        small = compress(model, space(prepared).sample(np.random.default_rng(seed)), prepared)
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.add_(1.0)
    assert checksum(model) == before and prepared.checksum() == digest


def test_another_model_or_policy_is_refused() -> None:
    prepared, model = of(Residual), build(Residual)
    policy = Policy.make(prepared.network)
    with torch.no_grad():
        model.get_parameter("b1.weight")[0, 0, 0, 0] += 1e-3
    with pytest.raises(CompressError, match="prepare"):
        compress(model, policy, prepared)
    with pytest.raises(PolicyError, match="a policy belongs to the model"):
        compress(None, Policy.make(of(Flat).network), prepared)
    with pytest.raises(PolicyError, match="width of group"):
        compress(None, replace(policy, widths=(("a1", 99),)), prepared)
    with pytest.raises(CompressError, match="not made by compress"):
        origin(model)


def test_what_workers_get_assembles_the_same() -> None:
    prepared = of(Residual)
    sent: Prepared = pickle.loads(pickle.dumps(prepared))
    policy = space(prepared).sample(np.random.default_rng(5))
    same(assemble(sent, policy), assemble(prepared, policy))
    with pytest.raises(CompressError, match="carry no graph"):
        compress(None, policy, sent)


@pytest.mark.parametrize(
    "bad", [[], [torch.full((2, 3, 8, 8), float("nan"))], [torch.zeros(2, 4, 8, 8)], [(torch.zeros(2, 3, 8, 8),) * 3]]
)
def test_bad_calibration_is_refused(bad: list[Any]) -> None:
    tracing = of(Residual).traced
    assert tracing is not None
    with pytest.raises(DataError):
        prepared_from(tracing, bad)


def test_settings_are_checked() -> None:
    with pytest.raises(CompressError, match="order must be one of"):
        Settings(order="l3")  # type: ignore[arg-type]


# ---- importance


def test_orders_by_norm() -> None:
    """Norms of all that writes a channel, each writer's scaled to a mean of 1."""
    for order, p in (("l1", 1), ("l2", 2)):
        prepared = of(Separable, Settings(order=order))  # type: ignore[arg-type]
        for group in prepared.network.groups:
            total = np.zeros(group.width)
            for layer in prepared.network.writers(group.name):
                norms = np.linalg.norm(prepared.weights[layer.name][0].reshape(group.width, -1).astype(np.float64), p, axis=1)
                total += norms / norms.mean()
            assert prepared.orders[group.name].tolist() == np.argsort(-total, kind="stable").tolist()


def test_taylor_orders_by_the_squared_first_order_change() -> None:
    model = build(Flat)
    saliency = torch.zeros(9)
    for x, target in batches():
        loss = F.cross_entropy(model(x), target)
        module: Any = model.get_submodule("mid")
        w, b = torch.autograd.grad(loss, [module.weight, module.bias])
        saliency += ((module.weight * w).sum(1) + module.bias * b).detach() ** 2
    assert of(Flat).orders["mid"].tolist() == torch.argsort(-saliency, stable=True).tolist()


def test_orders_have_every_channel_once() -> None:
    prepared = of(Residual)
    for group in prepared.network.groups:
        assert sorted(prepared.orders[group.name].tolist()) == list(range(group.width))
