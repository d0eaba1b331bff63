"""Modules that compute in floating point what integers would give, and let gradients through."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightrope.compressors.payload import Range, affine


class _Round(torch.autograd.Function):
    """Rounding with a straight-through gradient (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def rounded(x: Tensor) -> Tensor:
    made: Tensor = _Round.apply(x)  # type: ignore[no-untyped-call]
    return made


class Quantizer(nn.Module):
    """Holds a tensor as unsigned codes of `bits` bits with one static scale and zero point; returns what they decode to."""

    scale: Tensor
    zero: Tensor

    def __init__(self, span: Range, bits: int = 8) -> None:
        super().__init__()
        scale, zero = affine(*span, bits)
        self.span, self.bits = span, bits
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero", torch.tensor(float(zero)))

    def forward(self, x: Tensor) -> Tensor:
        codes = rounded(x / self.scale) + self.zero
        clipped: Tensor = (codes.clamp(0, 2**self.bits - 1) - self.zero) * self.scale
        return clipped

    def extra_repr(self) -> str:
        return f"{self.bits} bits over [{self.span[0]:.4g}, {self.span[1]:.4g}]"


class Part(nn.Module):
    """A convolution or linear layer whose weights are held as symmetric codes, and whose input may be.

    `inner.weight` are the latent float weights, which fine-tuning moves; every forward pass rounds them to
    `round(weight / scales)` within the codes of `bits` bits. At 32 bits they are used as they are.
    """

    scales: Tensor

    def __init__(self, inner: nn.Module, bits: int = 32, scales: Tensor | None = None, reader: Quantizer | None = None) -> None:
        super().__init__()
        self.inner, self.bits, self.reader = inner, bits, reader
        self.register_buffer("scales", torch.zeros(0) if scales is None else scales)

    def codes(self) -> Tensor:
        """The weights' codes, with a straight-through gradient."""
        weight: Any = self.inner.weight
        most = 2 ** (self.bits - 1) - 1
        return rounded(weight / self.scales.reshape(-1, *[1] * (weight.dim() - 1))).clamp(-most, most)

    def weight(self) -> Tensor:
        """The weights as they are used."""
        own: Any = self.inner.weight
        return own if self.bits == 32 else self.codes() * self.scales.reshape(-1, *[1] * (own.dim() - 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.reader is not None:
            x = self.reader(x)
        inner: Any = self.inner
        if isinstance(inner, nn.Linear):
            return F.linear(x, self.weight(), inner.bias)
        return F.conv2d(x, self.weight(), inner.bias, inner.stride, inner.padding, inner.dilation, inner.groups)

    def extra_repr(self) -> str:
        return f"weight_bits={self.bits}"
