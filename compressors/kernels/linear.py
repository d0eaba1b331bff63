"""`QuantLinear`: a linear layer whose weight takes 2 to 8 bits, in memory, on disk and in the kernel that runs it."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from tightrope.compressors import _kernels
from tightrope.compressors.kernels import clip_scales, pack_bits, packed_size_bytes, unpack_bits
from tightrope.compressors.kernels.ops import ACTIVATIONS, quant_linear

__all__ = ["QuantLinear", "pack", "unpack"]


def groups_of(k: int, group: int) -> int:
    """Number of groups in a row of `k` inputs; `group` 0 is the whole row."""
    return -(-k // group) if group else 1


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().contiguous().numpy()


def pack(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int, group: int) -> torch.Tensor:
    """Lay a quantised weight out for the kernel.

    Args:
        codes: `n x k` uint8, in `[0, 2**bits)`; the weight is `scale * (code - zero)`.
        scales: `n x groups` float32.
        zeros: `n x groups` uint8; None where each is the middle code, `2**(bits-1)`: then they take no room.
        bits: 2 to 8.
        group: inputs a group: a multiple of 32 up to 256, or 0 for the whole row.
    Returns:
        One-dimensional uint8: the codes at exactly `bits` bits with their scales and zero points, channels padded to 32
        and inputs to 32 (`kernels/linear.h` has the layout). The same for every instruction set.
    """
    n, k = codes.shape
    if codes.dtype is not torch.uint8 or int(codes.max()) >> bits:
        raise ValueError(f"codes must be uint8 in [0, {2**bits}), got {codes.dtype} up to {int(codes.max())}")
    packed = torch.empty(_kernels.linear_bytes(n, k, bits, group, zeros is not None), dtype=torch.uint8)
    zeros_ = None if zeros is None else _array(zeros)
    _kernels.pack_linear(_array(codes), _array(scales), zeros_, bits, group, packed.numpy())
    return packed


def unpack(packed: torch.Tensor, n: int, k: int, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of `pack`: codes `n x k`, scales `n x groups` and zero points `n x groups`."""
    codes = torch.empty(n, k, dtype=torch.uint8)
    scales = torch.empty(n, groups_of(k, group))
    zeros = torch.empty(n, groups_of(k, group), dtype=torch.uint8)
    _kernels.unpack_linear(_array(packed), bits, group, codes.numpy(), scales.numpy(), zeros.numpy())
    return codes, scales, zeros


class QuantLinear(nn.Module):
    """`activation(x W' + b)` with weights of 2 to 8 bits and 8-bit activations, for inference on the CPU.

    In memory the weight lies as the kernel reads it (`packed`). A state dict holds what it means, to the byte: `codes`
    (`n x k` codes as one bit stream, `pack_bits`), `scales` (`n x groups`), `zeros` (`n x groups`, only where
    `symmetric` is false: else every zero point is `2**(bits-1)`), `bias`, and `x_scale`, `x_zero`, `y_scale`, `y_zero`
    where they are static.

    Args:
        in_features, out_features: `k`, `n`.
        bits: 2 to 8.
        group: inputs that share a scale and zero point: a multiple of 32 up to 256, or 0 for the whole row.
        bias: whether there is one.
        symmetric: whether every zero point is the middle code.
        activation: "none", "relu" or "gelu", fused.
        x_scale, x_zero: of the input where it is quantised per tensor to uint8; 0: each row by its largest magnitude.
        y_scale, y_zero: of the output where it is to be uint8; 0: float32.
    """

    packed: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group: int = 0,
        bias: bool = True,
        symmetric: bool = True,
        activation: str = "none",
        x_scale: float = 0.0,
        x_zero: int = 0,
        y_scale: float = 0.0,
        y_zero: int = 0,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group, self.symmetric, self.activation = bits, group, symmetric, activation
        self.x_scale, self.x_zero, self.y_scale, self.y_zero = x_scale, x_zero, y_scale, y_zero
        size = _kernels.linear_bytes(out_features, in_features, bits, group, not symmetric)
        self.register_buffer("packed", torch.zeros(size, dtype=torch.uint8), persistent=False)
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        *,
        bits: int,
        group: int = 0,
        **options: Any,
    ) -> QuantLinear:
        """From codes in `[0, 2**bits)` (`n x k` uint8), scales and zero points (`n x groups`; None: the middle code)."""
        n, k = codes.shape
        layer = cls(k, n, bits=bits, group=group, bias=bias is not None, symmetric=zeros is None, **options)
        layer._set(codes, scales.reshape(n, -1), zeros)
        if bias is not None:
            layer.bias = bias.detach().clone().float()
        return layer

    @classmethod
    def from_float(cls, linear: nn.Linear, *, bits: int, group: int = 0, ratios: int = 100, **options: Any) -> QuantLinear:
        """From a float layer: symmetric, each group clipped where the squared error of its weights is least."""
        weight = linear.weight.detach().float().cpu()
        n, k = weight.shape
        groups = groups_of(k, group)
        width = group or k
        padded = nn.functional.pad(weight, (0, groups * width - k)).reshape(n * groups, width)
        scales = torch.from_numpy(clip_scales(padded.numpy(), [bits], ratios)[0])
        levels = 2 ** (bits - 1) - 1
        codes = (padded / scales[:, None]).round().clamp(-levels, levels) + 2 ** (bits - 1)
        codes = codes.to(torch.uint8).reshape(n, groups * width)[:, :k]
        return cls.from_codes(codes, scales, None, linear.bias, bits=bits, group=group, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`... x k` float32 (or uint8 where `x_scale` is set) -> `... x n` float32 (uint8 where `y_scale` is set)."""
        return quant_linear(  # type: ignore[no-any-return]
            x.contiguous(),
            self.packed,
            self.bias,
            self.out_features,
            self.bits,
            self.group,
            ACTIVATIONS[self.activation],
            self.x_scale,
            self.x_zero,
            self.y_scale,
            self.y_zero,
        )

    def dequantized(self) -> torch.Tensor:
        """The weight that the codes stand for, `n x k` float32."""
        codes, scales, zeros = unpack(self.packed, self.out_features, self.in_features, self.bits, self.group)
        group = torch.arange(self.in_features) // (self.group or self.in_features)
        return scales[:, group] * (codes.float() - zeros.float()[:, group])

    @property
    def size_bytes(self) -> int:
        """Bytes of the weight and its quantisation parameters in a state dict; the bias is apart."""
        groups = groups_of(self.in_features, self.group)
        parameters = self.out_features * groups * (4 if self.symmetric else 5)
        return packed_size_bytes(self.out_features * self.in_features, self.bits) + parameters

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group or 'row'}, "
            f"bias={self.bias is not None}, activation={self.activation}"
        )

    def _set(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> None:
        shape = (self.out_features, groups_of(self.in_features, self.group))
        if scales.dtype is not torch.float32 or scales.shape != shape or not bool(torch.isfinite(scales).all()):
            raise ValueError(f"scales must be finite float32 {list(shape)}, got {scales.dtype} {list(scales.shape)}")
        if zeros is not None and (zeros.dtype is not torch.uint8 or zeros.shape != shape):
            raise ValueError(f"zeros must be uint8 {list(shape)}, got {zeros.dtype} {list(zeros.shape)}")
        self.packed = pack(codes, scales, zeros, self.bits, self.group)

    def _static(self) -> dict[str, float]:
        """Names and values of the static quantisation parameters of input and output."""
        names = [f"{end}_{what}" for end in "xy" for what in ("scale", "zero") if getattr(self, f"{end}_scale")]
        return {name: getattr(self, name) for name in names}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        codes, scales, zeros = unpack(self.packed, self.out_features, self.in_features, self.bits, self.group)
        destination[prefix + "codes"] = torch.from_numpy(pack_bits(codes.reshape(-1).numpy(), self.bits))
        destination[prefix + "scales"] = scales
        if not self.symmetric:
            destination[prefix + "zeros"] = zeros
        for name, value in self._static().items():
            destination[prefix + name] = torch.tensor(value)

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
        static = self._static()
        names = ["codes", "scales", *([] if self.symmetric else ["zeros"]), *static]
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        missing_keys.extend(prefix + name for name in names if name not in found)
        if all(name in found for name in names):
            try:
                stream = found["codes"].cpu().numpy()
                codes = torch.from_numpy(unpack_bits(stream, self.bits, self.out_features * self.in_features))
                self._set(codes.reshape(self.out_features, -1), found["scales"].cpu(), found.get("zeros"))
            except ValueError as error:
                error_msgs.append(f"{prefix}: {error}")
        for name in static:
            if name in found:
                setattr(self, name, found[name].item())
        others = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in names}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
