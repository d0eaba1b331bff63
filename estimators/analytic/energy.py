"""Energy of a multiply-accumulate at any pair of bits."""

import numpy as np

from tightrope.estimators.analytic.block import Block, FloatArray


def mac_pj(block: Block, multiply_pj: float, add_pj: float) -> FloatArray:
    """Picojoules of one multiply-accumulate of each variant.

    The energy of a multiplier grows with the product of its operands' bits, that of the accumulating adder does not:
    `multiply_pj * (w * a / 64) + add_pj`, with `multiply_pj` for 8 x 8 bits (figures of Horowitz, ISSCC 2014).
    """
    energy: FloatArray = multiply_pj * (block.weight_bits * block.act_bits / 64) + add_pj * np.ones(len(block))
    return energy
