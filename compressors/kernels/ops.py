"""The packed linear as a torch operator, `torch.ops.tightrope.quant_linear`.

Registered with `define` and `impl`, and handed over as raw addresses: a call costs a few microseconds more than the
kernel, against some 20 for `torch.library.custom_op` over arrays.
"""

from __future__ import annotations

import torch

from tightrope.compressors import _kernels

ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}

# All tensors on the CPU, or no kernel is found: the dispatcher sees to it.
_LIBRARY = torch.library.Library("tightrope", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "quant_linear(Tensor x, Tensor packed, Tensor? bias, int n, int bits, int group, str activation='none', "
    "float x_scale=0.0, int x_zero=0, float y_scale=0.0, int y_zero=0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, n: int, activation: str) -> None:
    if x.dtype is not torch.float32 and x.dtype is not torch.uint8:
        raise TypeError(f"x must be float32 or uint8, got {x.dtype}")
    if not x.is_contiguous() or x.dim() < 1:
        raise ValueError(f"x must be contiguous, [..., k], got shape {tuple(x.shape)}, strides {x.stride()}")
    if packed.dtype is not torch.uint8 or not packed.is_contiguous():
        raise TypeError(f"packed must be contiguous uint8, got {packed.dtype}, strides {packed.stride()}")
    if bias is not None and (bias.dtype is not torch.float32 or bias.numel() != n or not bias.is_contiguous()):
        raise ValueError(f"bias must be contiguous float32 [{n}], got {bias.dtype} {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _quant_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    bits: int,
    group: int,
    activation: str = "none",
    x_scale: float = 0.0,
    x_zero: int = 0,
    y_scale: float = 0.0,
    y_zero: int = 0,
) -> torch.Tensor:
    """`activation(x W' + bias)` with a weight of `bits` bits, packed as `linear.pack` does.

    Args:
        x: `... x k`, contiguous. uint8 codes worth `x_scale * (code - x_zero)`; or float32, which is quantised so where
            `x_scale > 0`, and else row by row to int8 by the row's largest magnitude.
        packed: the weight, uint8.
        bias: `n` floats, or None.
        n: output channels.
        bits: 2 to 8.
        group: inputs that share a scale and zero point: a multiple of 32 up to 256, or 0 for the whole row.
        activation: "none", "relu" or "gelu" (by the error function, to 1e-6).
        x_scale, x_zero: see `x`.
        y_scale, y_zero: where `y_scale > 0` the result is uint8, `clamp(round(y / y_scale) + y_zero, 0, 255)`, NaN as 0.
    Returns:
        `... x n`, float32 or uint8. Sums over a group are exact integers; the float sum over groups has the error of
        float32. A row of x with a NaN gives a row of NaN; so does an infinity where x is quantised by row.
    """
    _check(x, packed, bias, n, activation)
    k = x.shape[-1]
    y = x.new_empty((*x.shape[:-1], n), dtype=torch.uint8 if y_scale else torch.float32)
    _kernels.linear(
        x.data_ptr(),
        x.dtype is torch.uint8,
        x_scale,
        x_zero,
        packed.data_ptr(),
        packed.numel(),
        0 if bias is None else bias.data_ptr(),
        ACTIVATIONS[activation],
        y.data_ptr(),
        y.dtype is torch.uint8,
        y_scale,
        y_zero,
        x.numel() // k if k else 0,
        n,
        k,
        bits,
        group,
        torch.get_num_threads(),
        "",
    )
    return y


def _quant_linear_shape(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    bits: int,
    group: int,
    activation: str = "none",
    x_scale: float = 0.0,
    x_zero: int = 0,
    y_scale: float = 0.0,
    y_zero: int = 0,
) -> torch.Tensor:
    _check(x, packed, bias, n, activation)
    return x.new_empty((*x.shape[:-1], n), dtype=torch.uint8 if y_scale else torch.float32)


_LIBRARY.impl("quant_linear", _quant_linear, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("tightrope::quant_linear", _quant_linear_shape, lib=_LIBRARY)

quant_linear = torch.ops.tightrope.quant_linear.default
