"""Layers whose weights take 2 to 8 bits on disk, executed by oneDNN's int8 kernels: `QuantConv2d` and `Int8Linear`.

oneDNN has no kernel narrower than 8 bits, but any narrower width is exact in int8. What it reads is an opaque tensor that
can be neither saved nor copied, so it is laid out anew whenever a layer is made, loaded, copied or unpickled.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from tightrope.compressors.kernels import pack_bits, packed_size_bytes, unpack_bits
from tightrope.compressors.kernels.ops import quantize

__all__ = ["Int8Linear", "QuantConv2d"]

_FUSED: dict[str, tuple[str, list[float], str]] = {
    "none": ("none", [], ""), "relu": ("relu", [], ""), "relu6": ("hardtanh", [0.0, 6.0], ""),
}  # fmt: skip
Pair = tuple[int, int]


class _OneDnn(nn.Module):
    """A weight of `shape`, output channels first: `codes` in [0, 2**bits) as one bit stream and a scale for each channel.

    Inputs are unsigned 8-bit codes of one static scale and zero point, or float32, quantised so; outputs too where
    `y_scale` is above 0, else float32. A state dict holds `codes`, `scales`, `bias` and `x_scale`, `x_zero`, `y_scale`, `y_zero`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    prepacked: torch.Tensor
    no_zeros: torch.Tensor

    def __init__(
        self, shape: tuple[int, ...], bits: int, bias: bool, activation: str, x: tuple[float, int], y: tuple[float, int]
    ) -> None:
        super().__init__()
        if activation not in _FUSED:
            raise ValueError(f"activation must be one of {', '.join(_FUSED)}, got {activation!r}")
        for name, (scale, zero) in (("x", x), ("y", y)):
            if not (math.isfinite(scale) and scale >= 0 and (scale or name == "y")):
                raise ValueError(f"{name}_scale must be finite and {'at least' if name == 'y' else 'above'} 0, got {scale}")
            if not 0 <= zero <= 255:
                raise ValueError(f"{name}_zero must lie in [0, 255], got {zero}")
        self.shape, self.bits, self.activation = shape, bits, activation
        (self.x_scale, self.x_zero), (self.y_scale, self.y_zero) = x, y
        self.register_buffer("codes", torch.zeros(packed_size_bytes(math.prod(shape), bits), dtype=torch.uint8))
        self.register_buffer("scales", torch.ones(shape[0]))
        self.register_buffer("bias", torch.zeros(shape[0]) if bias else None)
        self.register_buffer("no_zeros", torch.zeros(shape[0], dtype=torch.int32), persistent=False)

    def _fill(self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Take these values, and lay them out."""
        if codes.shape != self.shape or codes.dtype is not torch.uint8 or int(codes.max()) >> self.bits:
            raise ValueError(
                f"codes must be uint8 in [0, {2**self.bits}) of shape {list(self.shape)}, got {codes.dtype} {list(codes.shape)}"
            )
        if scales.dtype is not torch.float32 or scales.shape != self.shape[:1] or not bool(torch.isfinite(scales).all()):
            raise ValueError(f"scales must be finite float32 [{self.shape[0]}], got {scales.dtype} {list(scales.shape)}")
        self.codes = torch.from_numpy(pack_bits(codes.reshape(-1).contiguous().numpy(), self.bits))
        self.scales = scales.detach().clone()
        if bias is not None:
            self.bias = bias.detach().clone().float()
        self._lay_out()

    def _prepacked(self, signed: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _lay_out(self) -> None:
        self.register_buffer("prepacked", self._prepacked(self.signed()), persistent=False)

    def _result(self) -> tuple[Any, ...]:
        """The last arguments of oneDNN's operators: what is made of the sums."""
        return self.y_scale or 1.0, self.y_zero, torch.uint8 if self.y_scale else torch.float32, *_FUSED[self.activation]

    def signed(self) -> torch.Tensor:
        """The weight's codes as int8, zero in the middle."""
        stream = unpack_bits(self.codes.numpy(), self.bits, math.prod(self.shape)).reshape(self.shape)
        made: torch.Tensor = (torch.from_numpy(stream).to(torch.int16) - 2 ** (self.bits - 1)).to(torch.int8)
        return made

    def dequantized(self) -> torch.Tensor:
        """The weight that the codes stand for, float32."""
        return self.signed().float() * self.scales.reshape(-1, *[1] * (len(self.shape) - 1))

    @property
    def size_bytes(self) -> int:
        """Bytes of the weight and its scales in a state dict; the bias is apart."""
        return self.codes.numel() + 4 * self.scales.numel()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": {name: b for name, b in self._buffers.items() if name != "prepacked"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lay_out()

    def _steps(self) -> dict[str, float]:
        """Names and values of the quantisation of input and output."""
        names = ["x_scale", "x_zero", *(["y_scale", "y_zero"] if self.y_scale else [])]
        return {name: getattr(self, name) for name in names}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: torch.tensor(value) for name, value in self._steps().items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        steps = self._steps()
        for name in steps:
            if prefix + name in state_dict:
                setattr(self, name, state_dict[prefix + name].item())
            else:
                missing_keys.append(prefix + name)
        others = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in steps}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._lay_out()


class QuantConv2d(_OneDnn):
    """`activation(conv(x, W) + b)` with weights of 2 to 8 bits and 8-bit activations, for inference on the CPU.

    Args:
        bits: 2 to 8.
        size: height and width of the images that the weight is laid out for. Others run too, but oneDNN may lay it out anew at each
            call, which took 12 times as long as the convolution where it was tried (7 x 7, 96 channels).
        activation: "none", "relu" or "relu6", fused.
        x_scale, x_zero: of the input's unsigned codes.
        y_scale, y_zero: of the output where it is to be uint8; 0: float32.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        *,
        bits: int,
        x_scale: float,
        x_zero: int,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        groups: int = 1,
        size: Pair | None = None,
        bias: bool = True,
        activation: str = "none",
        y_scale: float = 0.0,
        y_zero: int = 0,
    ) -> None:
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups must divide both channels, got {groups} of {in_channels} and {out_channels}")
        shape = (out_channels, in_channels // groups, *kernel_size)
        super().__init__(shape, bits, bias, activation, (x_scale, x_zero), (y_scale, y_zero))
        self.stride, self.padding, self.dilation, self.groups = [*stride], [*padding], [*dilation], groups
        self.images = None if size is None else [1, in_channels, *size]
        self._lay_out()

    @classmethod
    def from_codes(
        cls, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None, *, bits: int, **options: Any
    ) -> QuantConv2d:
        """From codes in `[0, 2**bits)` (`out x in/groups x kh x kw` uint8), worth `scale * (code - 2**(bits-1))`."""
        if codes.dim() != 4:
            raise ValueError(f"codes must have 4 dimensions, out x in/groups x kh x kw, got {list(codes.shape)}")
        out, each, height, width = codes.shape
        inputs = each * options.get("groups", 1)
        layer = cls(inputs, out, (height, width), bits=bits, bias=bias is not None, **options)
        layer._fill(codes, scales, bias)
        return layer

    def _prepacked(self, signed: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = torch.ops.onednn.qconv_prepack(
            signed, self.scales, self.x_scale, self.x_zero, self.stride, self.padding, self.dilation, self.groups, self.images
        )
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`B x C x H x W` float32 or uint8, best in channels-last order -> float32 or, with `y_scale`, uint8; channels last."""
        x = x.contiguous(memory_format=torch.channels_last)
        if x.dtype is torch.float32:
            x = quantize(x, self.x_scale, self.x_zero)
        made: torch.Tensor = torch.ops.onednn.qconv_pointwise.default(
            x, self.x_scale, self.x_zero, self.prepacked, self.scales, self.no_zeros, self.bias, self.stride, self.padding,
            self.dilation, self.groups, *self._result(),
        )  # fmt: skip
        return made

    def extra_repr(self) -> str:
        out, each, *kernel = self.shape
        return (
            f"{each * self.groups}, {out}, kernel_size={tuple(kernel)}, bits={self.bits}, stride={tuple(self.stride)}, "
            f"padding={tuple(self.padding)}, groups={self.groups}, bias={self.bias is not None}, activation={self.activation}"
        )


class Int8Linear(_OneDnn):
    """`activation(x W' + b)` with 8-bit weights and activations: `QuantLinear`'s twin for many rows, where oneDNN is faster.

    Args:
        activation: "none", "relu" or "relu6", fused.
        x_scale, x_zero: of the input's unsigned codes.
        y_scale, y_zero: of the output where it is to be uint8; 0: float32.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        x_scale: float,
        x_zero: int,
        bias: bool = True,
        activation: str = "none",
        y_scale: float = 0.0,
        y_zero: int = 0,
    ) -> None:
        super().__init__((out_features, in_features), 8, bias, activation, (x_scale, x_zero), (y_scale, y_zero))
        self._lay_out()

    @classmethod
    def from_codes(cls, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None, **options: Any) -> Int8Linear:
        """From codes in `[0, 256)` (`n x k` uint8), worth `scale * (code - 128)`."""
        if codes.dim() != 2:
            raise ValueError(f"codes must have 2 dimensions, n x k, got {list(codes.shape)}")
        layer = cls(codes.shape[1], codes.shape[0], bias=bias is not None, **options)
        layer._fill(codes, scales, bias)
        return layer

    def _prepacked(self, signed: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = torch.ops.onednn.qlinear_prepack(signed, None)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`... x k` float32 or uint8 -> `... x n` float32 or, with `y_scale`, uint8."""
        x = x.contiguous()
        if x.dtype is torch.float32:
            x = quantize(x, self.x_scale, self.x_zero)
        made: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(
            x, self.x_scale, self.x_zero, self.prepacked, self.scales, self.no_zeros, self.bias, *self._result()
        )
        return made

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}, bias={self.bias is not None}, activation={self.activation}"
