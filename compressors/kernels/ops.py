"""The packed linear, and codes of activations, as torch operators: `torch.ops.tightrope.quant_linear`, `quantize`, `dequantize`.

Defined here, implemented in C++ (`torch_op.cpp`) through torch's stable C interface: a call costs a microsecond or two
more than the kernel. Any tensor that is not on the CPU finds no implementation.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tightrope.compressors import _kernels

ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}

_LIBRARY = torch.library.Library("tightrope", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "quant_linear(Tensor x, Tensor packed, Tensor? bias, int n, int bits, int group, int activation=0, "
    "float x_scale=0.0, int x_zero=0, float y_scale=0.0, int y_zero=0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _name in ("quantize", "dequantize"):
    _LIBRARY.define(f"{_name}(Tensor x, float scale, int zero) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
_kernels.register_torch_op(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))


@torch.library.register_fake("tightrope::quant_linear", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _result(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    bits: int,
    group: int,
    activation: int = 0,
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
        activation: of `ACTIVATIONS`; gelu is that of the error function, to 1e-6.
        x_scale, x_zero: see `x`.
        y_scale, y_zero: where `y_scale > 0` the result is uint8, `clamp(round(y / y_scale) + y_zero, 0, 255)`, NaN as 0.
    Returns:
        `... x n`, float32 or uint8. Sums over a group are exact integers; the float sum over groups has the error of
        float32. A row of x with a NaN gives a row of NaN; so does an infinity where x is quantised by row.
    Raises:
        ValueError: names the argument that does not fit.
        NotImplementedError: all are elsewhere than on the CPU.
    """
    for name, other in (("packed", packed), ("bias", bias)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} must be where x is, on {x.device}, got {other.device}")
    return x.new_empty((*x.shape[:-1], n), dtype=torch.uint8 if y_scale else torch.float32)


@torch.library.register_fake("tightrope::quantize", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _codes(x: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    """Unsigned codes `clamp(round(x / scale) + zero, 0, 255)`, half to even, 0 for NaN; uint8 of the strides of x.

    Args:
        x: float32, dense in memory in any order of dimensions.
        zero: in [0, 255].
    """
    return torch.empty_like(x, dtype=torch.uint8)


@torch.library.register_fake("tightrope::dequantize", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _values(x: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    """What uint8 codes stand for, `(x - zero) * scale`: float32 of the strides of x, which is dense in memory."""
    return torch.empty_like(x, dtype=torch.float32)


quantize = torch.ops.tightrope.quantize.default
dequantize = torch.ops.tightrope.dequantize.default
quant_linear = torch.ops.tightrope.quant_linear.default
