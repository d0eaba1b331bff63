"""Fine-tuning: gradients by the papers' formulas, batch norms that come and go, ranges that stay tied and are exported."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_nets import Flat, Residual, build
from torch import Tensor, nn

from tightrope.compressors.compress import compress, payload_of
from tightrope.compressors.finetune import Tuning, finetune
from tightrope.compressors.norms import normed
from tightrope.compressors.prepare import Prepared, prepare
from tightrope.compressors.quantize.fake import Part, Quantizer, decoded
from tightrope.compressors.quantize.learn import learned
from tightrope.spaces import Choice, Policy
from tightrope.spaces.errors import CompressError, DataError

torch.set_num_threads(1)


def batches(count: int = 3, size: int = 20) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(count):
        x, tint = torch.randn(size, 3, 8, 8, generator=generator), torch.randn(size, 3, 1, 1, generator=generator)
        found.append((x + 2 * tint, torch.randint(0, 5, (size,), generator=generator)))
    return found


def made(kind: Any, choice: Choice, share: float = 1.0) -> tuple[Any, nn.Module, Prepared]:
    model = build(kind)
    prepared = prepare(model, batches()[0][0], batches())
    widths = {g.name: max(1, round(share * g.width)) for g in prepared.network.groups}
    policy = Policy.make(prepared.network, widths, {x.name: choice for x in prepared.network.layers})
    return compress(None, policy, prepared), model, prepared


# ---- gradients


def by_the_paper(x: float, step: float, low: int, high: int) -> tuple[float, float, float]:
    """Value, gradient to the step (equation 3 of LSQ) and to the value (equation 5), one number at a time."""
    v = x / step
    if v <= low:
        return low * step, float(low), 0.0
    if v >= high:
        return high * step, float(high), 0.0
    return float(np.rint(v)) * step, float(np.rint(v)) - v, 1.0


@pytest.mark.parametrize(("low", "high"), [(-3, 3), (0, 15), (-4, 11)])
def test_gradients_are_those_of_lsq(low: int, high: int) -> None:
    x = (torch.randn(200, generator=torch.Generator().manual_seed(0)) * 4).double().requires_grad_()
    step = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    weight = torch.linspace(-1, 1, 200, dtype=torch.float64)
    out = decoded(x, step, low, high, gain=0.5)
    (out * weight).sum().backward()
    wanted = np.array([by_the_paper(v, 0.37, low, high) for v in x.tolist()])
    np.testing.assert_allclose(out.detach().numpy(), wanted[:, 0], rtol=1e-12)
    assert step.grad is not None and x.grad is not None
    assert float(step.grad) == pytest.approx(0.5 * float((wanted[:, 1] * weight.numpy()).sum()), rel=1e-9)
    np.testing.assert_allclose(x.grad.numpy(), wanted[:, 2] * weight.numpy())


def test_gradient_to_the_step_is_that_of_the_codes_held_still() -> None:
    """By finite differences: within the codes, what is rounded away counts as a constant; beyond them nothing does."""
    x, step, high, width = torch.randn(300, dtype=torch.float64) * 3, 0.4, 7, 1e-6

    def surrogate(s: float) -> Tensor:
        rest = torch.round(x / step) - x / step  # of the point at which the derivative is taken
        return torch.where((x / step).abs() < high, x + rest * s, high * s * x.sign())

    wanted = (surrogate(step + width) - surrogate(step - width)).sum() / (2 * width)
    moving = torch.tensor(step, dtype=torch.float64, requires_grad=True)
    decoded(x, moving, -high, high).sum().backward()
    assert moving.grad is not None and float(moving.grad) == pytest.approx(float(wanted), rel=1e-5)


def test_steps_of_channels_have_their_own_gradients() -> None:
    x, steps = torch.randn(3, 10), torch.tensor([[0.1], [0.2], [0.3]], requires_grad=True)
    decoded(x, steps, -3, 3).square().sum().backward()
    for row in range(3):
        alone = steps.detach()[row].clone().requires_grad_()
        decoded(x[row], alone, -3, 3).square().sum().backward()
        assert steps.grad is not None and alone.grad is not None
        torch.testing.assert_close(steps.grad[row], alone.grad)


def test_pact_learns_from_what_it_clips() -> None:
    """Equation 3 of PACT: the gradient to the clipping level `a` is the sum over `x >= a`."""
    x, upstream = torch.rand(400) * 3, torch.randn(400)
    quantizer = Quantizer((0.0, 2.0), 4)
    with learned(quantizer, "fixed", "pact"):
        (quantizer(x) * upstream).sum().backward()
        stretch = quantizer.stretch
        assert stretch is not None and stretch.grad is not None
        gain = 15**-0.5
        assert float(stretch.grad) == pytest.approx(gain * 2.0 * float(upstream[x >= 2].sum()), rel=1e-4)
    assert quantizer.stretch is None and quantizer.span == pytest.approx((0.0, 2.0))


# ---- batch norms


@pytest.mark.parametrize("choice", [Choice(), Choice(4, 8), Choice(32, 32, 4, "spatial")])
def test_norms_change_nothing_and_fold_back(choice: Choice) -> None:
    model = build(Residual)
    prepared = prepare(model, batches()[0][0], batches())
    small = compress(None, Policy.make(prepared.network, choices={"b1": choice, "a2": choice}), prepared)
    x = batches()[0][0]
    with torch.no_grad():
        before = small(x)
        with normed(small, [x for x, _ in batches()]):
            assert sum(isinstance(m, nn.BatchNorm2d) for m in small.modules()) == 6
            inside = small(x)
        after = small(x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in small.modules())
    for found in (inside, after):  # a value may round to the next code
        assert float((found - before).abs().mean()) < 2e-3 * float(before.abs().mean())


def test_folding_keeps_the_codes() -> None:
    """Whatever training made of the norms, a negative factor included."""
    small, _, _ = made(Residual, Choice(4, 32))
    with torch.no_grad():
        with normed(small, [x for x, _ in batches()]):
            layer: Any = small.get_submodule("b1")
            layer.norm.weight[0] *= -2
            layer.norm.bias += 0.5
            x = torch.randn(4, layer.layer.inner.in_channels, 8, 8)
            inside, codes = layer(x), layer.layer.codes().abs()
        part: Any = small.get_submodule("b1")
        torch.testing.assert_close(part(x), inside, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(part.codes().abs(), codes)


# ---- the whole


@pytest.mark.parametrize(("weight_steps", "ranges"), [("fixed", "fixed"), ("lsq", "lsq"), ("lsq", "pact")])
def test_training_helps_and_the_arrays_say_what_the_module_does(weight_steps: Any, ranges: Any) -> None:
    small, model, _ = made(Residual, Choice(2, 4), 0.5)
    data = [(x, model(x).argmax(1)) for x, _ in batches()]

    def loss() -> float:
        with torch.no_grad():
            return float(sum(F.kl_div(small(x).log_softmax(1), model(x).softmax(1), reduction="batchmean") for x, _ in data))

    before, spans = loss(), payload_of(small).ranges
    finetune(small, model, data, Tuning(epochs=12, distil=1.0, batch=20, weight_steps=weight_steps, ranges=ranges))
    assert loss() < 0.8 * before
    payload = payload_of(small)
    assert (payload.ranges == spans) == (ranges == "fixed")
    for name, parts in payload.parts.items():
        (part,) = parts
        found: Any = small.get_submodule(name)
        assert isinstance(found, Part) and found.stretch is None and part.codes is not None and part.scales is not None
        np.testing.assert_allclose(found.weight().detach().numpy(), part.weight, rtol=1e-6)
        shape = (-1, *[1] * (part.weight.ndim - 1))
        np.testing.assert_allclose(part.weight, part.codes * part.scales.reshape(shape), rtol=1e-6)
        assert found.reader is not None and part.act_range == found.reader.span


def test_learned_ranges_stay_tied_and_are_exported() -> None:
    """Values that only move keep one range, and an integer layer's input range is that of the point that it reads."""
    small, model, prepared = made(Flat, Choice(8, 8))
    finetune(small, model, batches(), Tuning(epochs=4, ranges="lsq"))
    payload = payload_of(small)
    by_source: dict[str, set[Any]] = {}
    for op, span in payload.ranges.items():
        by_source.setdefault(prepared.source_of(op), set()).add(span)
        assert span != prepared.range_of(op, 8)
    assert len(by_source) < len(payload.ranges) and all(len(found) == 1 for found in by_source.values())
    for name, (part,) in payload.parts.items():
        op = next(o for o in prepared.network.ops if o.layer == name)
        assert part.act_range == payload.ranges[op.inputs[0]]


def test_the_rate_rises_and_falls() -> None:
    tuning = Tuning(warm=0.25)
    rates = [tuning.rate(share) for share in np.linspace(0, 1, 41)]
    assert max(rates) == tuning.rate(0.25) == 1 and rates[-1] < 1e-9
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_examples_are_dealt_into_batches_of_the_size_asked_for() -> None:
    small, model, _ = made(Residual, Choice())
    seen: list[int] = []
    small.register_forward_pre_hook(lambda m, given: seen.append(len(given[0])) if m.training else None)
    finetune(small, model, batches(3, 25), Tuning(epochs=2, batch=20))
    assert seen == [19, 19, 19, 18] * 2


def test_the_same_seed_gives_the_same_weights() -> None:
    found = []
    for seed in (0, 0, 1):
        small, model, _ = made(Residual, Choice(4, 8), 0.6)
        finetune(small, model, batches(), Tuning(epochs=1, seed=seed))
        found.append(torch.cat([p.detach().flatten() for p in small.parameters()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"batch": 0}, {"warm": 1.0}, {"ranges": "best"}, {"weight_steps": "pact"}])
def test_settings_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(CompressError):
        Tuning(**bad)
    small, model, _ = made(Residual, Choice())
    with pytest.raises(DataError, match="at least one batch"):
        finetune(small, model, [])
