import numpy as np
from numpy.typing import NDArray

def search(chip: tuple[float, ...], layer: tuple[float, ...], variants: NDArray[np.int64], found: NDArray[np.float64]) -> int:
    """Fill `found` (`n x 7`, the fields of `Mapping`) for `variants` (`n x 4`: channels of one group in and out, bits of weights
    and activations). Returns the place of the first variant no tile of which fits the buffers, or -1.

    Args:
        chip: the fields of `BitFusion` but its clock, in order.
        layer: examples; height and width of the output, the kernel, stride and dilation; whether the kernel is unrolled (1 or 0).
    """
