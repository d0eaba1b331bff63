"""Rounding by the layer's output: against a float64 loop in the paper's own form, and against exhaustive search."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_nets import Residual, Separable, build
from torch import nn

from tightrope.compressors.assemble import assemble
from tightrope.compressors.prepare import Prepared, Settings, prepare
from tightrope.compressors.prune.order import kept
from tightrope.compressors.quantize.rounding import BY_OUTPUT, ROUNDINGS, Gram, Rounding, adaround, gptq, nearest, whole_scales
from tightrope.spaces import Choice, Policy

Matrix = NDArray[np.float64]
torch.set_num_threads(1)


def gram_matrix(size: int, rng: np.random.Generator) -> Matrix:
    rows = rng.normal(size=(3 * size + 2, size)) @ rng.normal(size=(size, size))
    made: Matrix = rows.T @ rows / len(rows) + 1e-3 * np.eye(size)
    return made


def of(matrix: Matrix) -> Gram:
    order = np.argsort(np.diag(matrix), kind="stable")
    return Gram(order, np.linalg.cholesky(matrix[np.ix_(order, order)]))


def loss(weight: Matrix, codes: Matrix, matrix: Matrix) -> Matrix:
    found: Matrix = np.einsum("ri,ij,rj->r", codes - weight, matrix, codes - weight)
    return found


def obq(weight: Matrix, bits: int, matrix: Matrix, order: list[int]) -> Matrix:
    """Optimal Brain Quantisation in a fixed order, one weight at a time, the inverse made anew for each (Frantar et al. 2022)."""
    most = 2 ** (bits - 1) - 1
    codes = np.zeros_like(weight)
    for row in range(len(weight)):
        aim, left = weight[row].copy(), list(order)
        for index in order:
            inverse = np.linalg.inv(matrix[np.ix_(left, left)])
            here = left.index(index)
            codes[row, index] = np.clip(np.rint(aim[index]), -most, most)
            aim[left] -= (aim[index] - codes[row, index]) / inverse[here, here] * inverse[:, here]
            left.remove(index)
    return codes


@pytest.mark.parametrize(("bits", "size"), [(2, 5), (3, 12), (4, 60)])
def test_gptq_is_optimal_brain_quantisation_in_its_order(bits: int, size: int) -> None:
    rng = np.random.default_rng(size)
    matrix, weight = gram_matrix(size, rng), rng.normal(size=(6, size)) * 2 ** (bits - 2)
    gram = of(matrix)
    wanted = obq(weight, bits, matrix, gram.order[::-1].tolist())
    plain = nearest(weight, bits)
    wanted = np.where((loss(weight, wanted, matrix) <= loss(weight, plain, matrix))[:, None], wanted, plain)
    np.testing.assert_array_equal(gptq(weight, bits, gram), wanted)


def test_each_group_has_a_gram_matrix_of_its_own() -> None:
    rng = np.random.default_rng(0)
    matrices, weight = [gram_matrix(9, rng) for _ in range(4)], rng.normal(size=(8, 9)) * 3
    stack = Gram(np.arange(9), np.stack([np.linalg.cholesky(m) for m in matrices]))
    codes = gptq(weight, 3, stack)
    for group, matrix in enumerate(matrices):
        rows = slice(2 * group, 2 * group + 2)
        alone = Gram(np.arange(9), np.linalg.cholesky(matrix))
        np.testing.assert_array_equal(codes[rows], gptq(weight[rows], 3, alone))
        np.testing.assert_allclose(
            stack.errors(codes - weight)[rows], np.sqrt(loss(weight[rows], codes[rows], matrix)) ** 2, rtol=1e-9
        )


def test_learned_rounding_is_near_the_best_of_all() -> None:
    """Every way of rounding up or down, one by one: most of what plain rounding loses beyond the best is won back."""
    rng = np.random.default_rng(0)
    matrix, weight = gram_matrix(8, rng), rng.uniform(-3, 3, size=(40, 8))
    choices = np.array(list(itertools.product((0, 1), repeat=8)))
    best = np.array([loss(row, np.clip(np.floor(row) + choices, -3, 3), matrix).min() for row in weight])
    found, plain = loss(weight, adaround(weight, 3, of(matrix)), matrix), loss(weight, nearest(weight, 3), matrix)
    assert (found >= best - 1e-9).all()
    assert (found - best).sum() <= 0.4 * (plain - best).sum()


@given(
    st.integers(1, 10),
    st.integers(1, 4),
    st.sampled_from((2, 3, 4, 7)),
    st.integers(0, 2**31),
    st.sampled_from(("gptq", "adaround")),
)
@settings(deadline=None, max_examples=12)
def test_never_worse_than_plain_rounding(size: int, rows: int, bits: int, seed: int, how: str) -> None:
    rng = np.random.default_rng(seed)
    matrix, weight = gram_matrix(size, rng), rng.normal(size=(rows, size)) * 2 ** (bits - 2)
    codes, most = BY_OUTPUT[how](weight, bits, of(matrix)), 2 ** (bits - 1) - 1
    assert np.array_equal(codes, np.rint(codes)) and np.abs(codes).max() <= most
    plain = loss(weight, nearest(weight, bits), matrix)
    assert (loss(weight, codes, matrix) <= plain * (1 + 1e-9) + 1e-12).all()


def test_nothing_is_clipped_at_the_whole_scale() -> None:
    weight = np.array([[0.0, 0.0], [-3.0, 1.0]], np.float32)
    assert whole_scales(weight, 3).tolist() == [1.0, 1.0]
    assert whole_scales(weight, 4)[1] == pytest.approx(3 / 7)


# ---- in a model


class Wide(nn.Module):
    """A grouped convolution, and one whose patches are too many for their own covariance in this test."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=4)
        self.wide = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.wide(torch.relu(self.grouped(torch.relu(self.stem(x))))))
        made: torch.Tensor = self.head(x.mean((2, 3)))
        return made


def inputs() -> torch.Tensor:
    """Images whose pixels look like their neighbours."""
    noise = torch.randn(24, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    return 3 * torch.nn.functional.avg_pool2d(noise, 3, 1)


def change(prepared: Prepared, layer: str, policy: Policy, like: Policy | None = None) -> torch.Tensor:
    """What a layer's output differs by from the dense layer's, or from that under another policy, on what it reads."""
    assert prepared.traced is not None
    module: Any = prepared.traced.layer(layer)
    reads: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda m, given, out: reads.append(given[0]))
    with torch.no_grad():
        prepared.traced.skeleton(inputs())
    handle.remove()
    keep = prepared.axes[layer, 1].keep(kept(prepared.orders, policy.all_widths(prepared.network)))
    source = reads[0][:, torch.from_numpy(keep)] if module.groups == 1 else reads[0]
    made = []
    for each in (policy, like or policy):
        (part,) = assemble(prepared, each).parts[layer]
        assert part.bias is not None
        weight, bias = torch.from_numpy(part.weight), torch.from_numpy(part.bias)
        made.append(torch.nn.functional.conv2d(source, weight, bias, module.stride, module.padding, groups=module.groups))
    with torch.no_grad():
        return made[0] - (module(source) if like is None else made[1])


@pytest.mark.parametrize("how", ["gptq", "adaround"])
def test_the_output_of_every_kind_of_layer_loses_less(how: Rounding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tightrope.compressors.calibrate.MOST_PATCH", 30)
    torch.manual_seed(0)
    model, x = Wide().eval(), inputs()
    found = {rounding: prepare(model, x[:2], [x], Settings(rounding=rounding, equalise=False)) for rounding in ("nearest", how)}
    for layer in ("stem", "grouped", "wide"):
        policy = Policy.make(found[how].network, choices={layer: Choice(3, 32)})
        errors = {rounding: float(change(prepared, layer, policy).square().mean()) for rounding, prepared in found.items()}
        assert errors[how] < 0.9 * errors["nearest"], layer


def test_biases_of_depthwise_layers_are_corrected() -> None:
    x, model, worst = inputs(), build(Separable), {}
    for corrected in (False, True):
        how = Settings(rounding="nearest", equalise=False, bias_correction=corrected)
        prepared = prepare(model, x[:2], [x], how)
        layer = next(layer.name for layer in prepared.network.layers if layer.kind == "depthwise")
        moved = change(prepared, layer, Policy.make(prepared.network, choices={layer: Choice(2, 32)}))
        worst[corrected] = float(moved.mean((0, 2, 3)).abs().max())
    assert worst[True] < 1e-4 < 10 * 1e-4 < worst[False]


def test_cut_layers_are_rounded_by_the_inputs_that_remain() -> None:
    x, model, errors = inputs(), build(Residual), {}
    for rounding in ROUNDINGS[:2]:
        prepared = prepare(model, x[:2], [x], Settings(rounding=rounding, equalise=False))
        (group,) = prepared.network.layer("a2").inputs.groups
        widths = {group: prepared.network.widths[group] // 2}
        whole, rounded = (Policy.make(prepared.network, widths, {"a2": choice}) for choice in (Choice(), Choice(3, 32)))
        errors[rounding] = float(change(prepared, "a2", rounded, whole).square().mean())
    assert errors["gptq"] < 0.97 * errors["nearest"]
