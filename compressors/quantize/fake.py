"""Modules that compute in floating point what integers would give, and let gradients through."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightrope.compressors.payload import Range, affine

Learning = Literal["fixed", "lsq", "pact"]
LEARNING: tuple[Learning, ...] = ("fixed", "lsq", "pact")
LEAST = 1 / 16  # of itself, to which training may shrink a step


class _Decoded(torch.autograd.Function):
    """`clamp(round(x / step), low, high) * step`, with gradients to the values and to their step.

    To the values the gradient goes straight through (Bengio et al. 2013) within the codes and stops beyond them. To the step
    it is that of Esser et al. 2020, "Learned Step Size Quantization", equation 3, times `gain`; with `clipped_only`, the terms
    of values within the codes left out, it is that of the clipping level of Choi et al. 2018, "PACT: Parameterized Clipping
    Activation for Quantized Neural Networks", equation 3, of which the step is a fixed part.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: int, high: int, gain: float, clipped_only: bool) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.settings = low, high, gain, clipped_only
        return torch.round(x / step).clamp_(low, high).mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, step), (low, high, gain, clipped_only) = ctx.saved_tensors, ctx.settings
        values = x / step
        inside = (values >= low) & (values <= high)
        to_x = grads[0] * inside if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_x, None, None, None, None, None
        slope = torch.round(values).clamp_(low, high) - values * inside
        each = grads[0] * (slope * ~inside if clipped_only else slope)
        return to_x, gain * each.sum_to_size(step.shape), None, None, None, None


def decoded(x: Tensor, step: Tensor, low: int, high: int, gain: float = 1.0, clipped_only: bool = False) -> Tensor:
    """What the nearest codes in `[low, high]` decode to; `step` has one element or broadcasts along the channels of `x`."""
    made: Tensor = _Decoded.apply(x, step, low, high, gain, clipped_only)  # type: ignore[no-untyped-call]
    return made


class Quantizer(nn.Module):
    """Holds a tensor as unsigned codes of `bits` bits with one scale and zero point; returns what they decode to.

    `source` names the operator that gave the range: quantisers of one source keep one range. While the range is learned
    (`learn.py`), `stretch` multiplies the scale, and with it both ends of the range.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, span: Range, bits: int = 8, source: str = "") -> None:
        super().__init__()
        self.bits, self.source = bits, source
        self.stretch: nn.Parameter | None = None
        self.clipped_only = False
        self.register_buffer("scale", torch.tensor(0.0))
        self.register_buffer("zero", torch.tensor(0.0))
        self.set(span)

    def set(self, span: Range) -> None:
        """Let the codes span another range."""
        scale, zero = affine(*span, self.bits)
        self.span, self.low, self.high = span, -zero, 2**self.bits - 1 - zero
        self.scale.fill_(scale)
        self.zero.fill_(zero)

    def forward(self, x: Tensor) -> Tensor:
        if self.stretch is None:
            return decoded(x, self.scale, self.low, self.high)
        gain = (x[:1].numel() * max(-self.low, self.high)) ** -0.5
        return decoded(x, self.scale * self.stretch.clamp_min(LEAST), self.low, self.high, gain, self.clipped_only)

    def extra_repr(self) -> str:
        return f"{self.bits} bits over [{self.span[0]:.4g}, {self.span[1]:.4g}]"


class Part(nn.Module):
    """A convolution or linear layer whose weights are held as symmetric codes, and whose input may be.

    `inner.weight` are the latent float weights, which fine-tuning moves; every forward pass rounds them to
    `round(weight / scales)` within the codes of `bits` bits. At 32 bits they are used as they are. While the scales are
    learned (`learn.py`), `stretch` multiplies them.
    """

    scales: Tensor

    def __init__(self, inner: nn.Module, bits: int = 32, scales: Tensor | None = None, reader: Quantizer | None = None) -> None:
        super().__init__()
        self.inner, self.bits, self.reader = inner, bits, reader
        self.stretch: nn.Parameter | None = None
        self.register_buffer("scales", torch.zeros(0) if scales is None else scales)

    @property
    def most(self) -> int:
        """The largest code."""
        return (1 << self.bits - 1) - 1

    def codes(self) -> Tensor:
        """The weights' codes, whole numbers in floating point."""
        weight: Any = self.inner.weight
        steps = self.scales.reshape(-1, *[1] * (weight.dim() - 1))
        return torch.round(weight.detach() / steps).clamp(-self.most, self.most)

    def weight(self) -> Tensor:
        """The weights as they are used."""
        own: Any = self.inner.weight
        if self.bits == 32:
            return own  # type: ignore[no-any-return]
        steps = self.scales if self.stretch is None else self.scales * self.stretch.clamp_min(LEAST)
        gain = (own[0].numel() * self.most) ** -0.5
        return decoded(own, steps.reshape(-1, *[1] * (own.dim() - 1)), -self.most, self.most, gain)

    def forward(self, x: Tensor) -> Tensor:
        if self.reader is not None:
            x = self.reader(x)
        inner: Any = self.inner
        if isinstance(inner, nn.Linear):
            return F.linear(x, self.weight(), inner.bias)
        return F.conv2d(x, self.weight(), inner.bias, inner.stride, inner.padding, inner.dilation, inner.groups)

    def extra_repr(self) -> str:
        return f"weight_bits={self.bits}"
