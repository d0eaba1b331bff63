"""Expected losses of options: against the outputs of layers on inputs that have exactly the covariance of calibration."""

from functools import cache

import numpy as np
import pytest
import torch
from small_nets import Residual, Separable, build, image
from torch import nn

from tightrope.compressors.assemble import assemble
from tightrope.compressors.prepare import Prepared, Settings, prepare
from tightrope.compressors.sensitivity import losses
from tightrope.spaces import Choice, Policy, Space

torch.set_num_threads(1)
PAIRS = [(w, a) for w in (2, 4, 8, 32) for a in (4, 8, 32)]


@cache
def prepared(kind: type[nn.Module] = Residual, rounding: str = "nearest") -> tuple[Prepared, Space]:
    torch.manual_seed(0)
    plain = Settings(bias_correction=False, equalise=False, rounding=rounding)  # type: ignore[arg-type]
    made = prepare(build(kind), image(), [image(8) for _ in range(3)], plain)
    return made, Space.build(made.network, lambda layer: PAIRS, width_step=1)


def spread(found: Prepared, layer: str, weight: np.ndarray) -> float:
    """Variance of a layer's output, over all outputs, from the covariance itself."""
    nested = found.nested[layer]
    back = np.argsort(nested.order)
    covariance = (nested.lower @ nested.lower.T)[np.ix_(back, back)]
    flat = weight.reshape(len(weight), -1).astype(np.float64)
    return float(np.einsum("of,fg,og->", flat, covariance, flat))


@pytest.mark.parametrize("kind", [Residual, Separable])
def test_dearest_options_lose_nothing_and_cheaper_ones_more(kind: type[nn.Module]) -> None:
    made, space = prepared(kind)
    found = losses(made, space)
    assert found.keys() == {v.name for v in space.variables}
    for variable in space.variables:
        values = found[variable.name]
        assert len(values) == len(variable.options) and np.isfinite(values).all() and min(values) >= 0
        assert values[-1] == pytest.approx(0, abs=1e-9) and values[0] == max(values) > 0


@pytest.mark.parametrize(("kind", "choice"), [("weight_bits", Choice(4, 32)), ("rank", None)])
def test_a_weight_s_loss_is_the_change_of_the_layer_s_output(kind: str, choice: Choice | None) -> None:
    """What a trial really does to the layer, multiplied out against its input's covariance."""
    made, space = prepared()
    found = losses(made, space)
    tried = 0
    for variable in space.variables:
        layer = variable.target
        if variable.kind != kind or layer not in made.nested:
            continue
        for option, lost in zip(variable.options, found[variable.name], strict=True):
            if choice is not None and option != choice.weight_bits:
                continue
            whole = space.network.layer(layer)
            rank = space.rank_of(whole, option, space.network.widths)
            done = choice or Choice(rank=rank, form=space.forms[layer] if rank else "")
            parts = assemble(made, Policy.make(space.network, choices={layer: done})).parts[layer]
            weights = [torch.from_numpy(p.weight.astype(np.float64)) for p in parts]
            if len(weights) == 1:
                now = weights[0].numpy()
            elif done.form == "svd":
                now = np.einsum("ri,or->oi", *(w.flatten(1).numpy() for w in weights)).reshape(made.weights[layer][0].shape)
            else:
                now = np.einsum("rih,orw->oihw", weights[0][..., 0].numpy(), weights[1][:, :, 0].numpy())
            dense = made.weights[layer][0].astype(np.float64)
            assert lost == pytest.approx(spread(made, layer, now - dense) / spread(made, layer, dense), rel=1e-3, abs=1e-9)
            tried += 1
    assert tried > 1


def test_channels_lose_what_least_squares_leave() -> None:
    """The residual of a regression of the whole output on the kept inputs, by the normal equations."""
    made, space = prepared()
    found = losses(made, space)
    tried = 0
    for variable in (v for v in space.variables if v.kind == "channels"):
        readers = [x.name for x in space.network.readers(variable.target)]
        if not all(x in made.nested for x in readers):
            continue
        for width, lost in zip(variable.options, found[variable.name], strict=True):
            total = 0.0
            for layer in readers:
                nested = made.nested[layer]
                covariance, weight = nested.lower @ nested.lower.T, made.weights[layer][0].astype(np.float64)
                flat = weight.reshape(len(weight), -1)[:, nested.order]
                count = round(width / variable.options[-1] * len(nested.order))
                cross, kept = covariance[:, :count], covariance[:count, :count]
                left = covariance - cross @ np.linalg.solve(kept, cross.T)
                total += float(np.einsum("of,fg,og->", flat, left, flat) / np.einsum("of,fg,og->", flat, covariance, flat))
            assert lost == pytest.approx(total, rel=1e-3, abs=1e-5)
            tried += 1
    assert tried > 1
