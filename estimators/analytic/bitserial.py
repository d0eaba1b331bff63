"""A bit-serial accelerator: time is proportional to the bits of the activations, and nearly so to those of the weights.

BISMO (Umuroglu et al., FPL 2018) multiplies bit plane by bit plane; the behaviour follows the latency table that HAQ
(Wang et al., CVPR 2019) published for it: the whole net at b bits costs .397 of 8 bits at b = 4, .178 at b = 2; doubling the
activation bits of a layer doubles its cost, doubling the weight bits takes 1.76 times as long.
"""

from dataclasses import dataclass

import numpy as np

from tightrope.estimators.analytic.block import Block, Figures
from tightrope.estimators.analytic.energy import mac_pj
from tightrope.estimators.analytic.model import Model, Pair


@dataclass(frozen=True)
class BitSerial(Model):
    """`binary_macs_per_cycle` one-bit products a cycle; each plane of the activations takes a pass for each plane of the weights
    and `plane_overhead_bits` more. Depthwise layers, which leave most of the array idle, take `depthwise_passes` for each plane
    of the activations whatever the weights are. A layer takes the longer of computing and moving its data.
    """

    clock_mhz: float
    binary_macs_per_cycle: float
    plane_overhead_bits: float
    depthwise_passes: float
    interface_bits: float
    multiply_pj: float
    add_pj: float
    dram_pj_per_byte: float

    def pairs(self, kind: str) -> tuple[Pair, ...]:
        """Every pair of 2..8 bits."""
        return tuple((w, a) for w in range(2, 9) for a in range(2, 9))

    def cost(self, block: Block, batch: int) -> Figures:
        """Compute, and as stall what the memory takes longer; outputs leave at the activation bits of the layer."""
        depthwise = block.unit.kind == "depthwise"
        passes = block.act_bits * (self.depthwise_passes if depthwise else block.weight_bits + self.plane_overhead_bits)
        compute = block.macs * batch * passes / self.binary_macs_per_cycle
        moved = block.weight_bytes + batch * (block.input_bytes + block.output_items * block.act_bits / 8)
        memory = block.unit.calls * moved * 8 / self.interface_bits
        energy = block.macs * batch * mac_pj(block, self.multiply_pj, self.add_pj)
        energy += block.unit.calls * moved * self.dram_pj_per_byte
        return Figures.make(
            len(block), compute=compute, stall=np.maximum(0, memory - compute), energy_pj=energy, clock_mhz=self.clock_mhz
        )
