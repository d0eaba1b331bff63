import numpy as np
from numpy.typing import NDArray

def isa() -> str: ...
def has_isa(name: str) -> bool: ...
def pack_bits(codes: NDArray[np.uint8], bits: int, packed: NDArray[np.uint8]) -> None: ...
def unpack_bits(packed: NDArray[np.uint8], bits: int, codes: NDArray[np.uint8]) -> None: ...
def clip_scales(
    weight: NDArray[np.float32], bits: NDArray[np.int64], ratios: int, scales: NDArray[np.float32], isa: str = ""
) -> bool: ...
def encode(weight: NDArray[np.float32], scales: NDArray[np.float32], bits: int, codes: NDArray[np.int8], isa: str = "") -> None: ...
def histogram(values: NDArray[np.float32], low: float, high: float, counts: NDArray[np.int64]) -> int: ...
def histogram_ratio(counts: NDArray[np.int64], low: float, high: float, entropy: bool, bits: int, ratios: int) -> int: ...
def linear_bytes(n: int, k: int, bits: int, group: int, zeros: bool) -> int: ...
def pack_linear(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zeros: NDArray[np.uint8] | None,
    bits: int,
    group: int,
    packed: NDArray[np.uint8],
) -> None: ...
def unpack_linear(
    packed: NDArray[np.uint8],
    bits: int,
    group: int,
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zeros: NDArray[np.uint8],
) -> None: ...
def linear(
    x: int,
    x_is_codes: bool,
    x_scale: float,
    x_zero: int,
    packed: int,
    packed_size: int,
    bias: int,
    activation: int,
    y: int,
    y_is_codes: bool,
    y_scale: float,
    y_zero: int,
    m: int,
    n: int,
    k: int,
    bits: int,
    group: int,
    threads: int,
    isa: str,
    /,
) -> None: ...
def register_torch_op(library: str) -> None: ...
def dot_peak(rounds: int, isa: str = "") -> float: ...
