"""What a model of an accelerator answers; `Simulated` makes a device of it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from tightrope.estimators.analytic.block import Block, Figures, FloatArray
from tightrope.estimators.analytic.operators import Sort
from tightrope.spaces.budget import Limits

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Traffic:
    """What an operator between the layers touches, for one batch: `b`-dim arrays of bytes read and written, and of values made."""

    sort: Sort
    read_bytes: FloatArray
    written_bytes: FloatArray
    items: FloatArray


class Model(ABC):
    """One accelerator. `cost` is all that it must know; the rest is left at "nothing" by those that cost layers alone."""

    costs_operators = False  # whether `operator` answers

    @abstractmethod
    def pairs(self, kind: str) -> tuple[Pair, ...]:
        """Pairs of weight and activation bits that it executes for a kind of layer."""

    @abstractmethod
    def cost(self, block: Block, batch: int) -> Figures:
        """What each variant of a block costs, all its calls together, for one batch."""

    def operator(self, traffic: Traffic) -> Figures:
        """What an operator between the layers costs; asked only of a model with `costs_operators`."""
        raise NotImplementedError

    def whole(self, weight_bytes: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Milliseconds and millijoules that depend on the weights of the whole network, such as streaming what does not fit."""
        nothing = np.zeros_like(weight_bytes)
        return nothing, nothing

    @property
    def limits(self) -> Limits:
        """What a policy may cost at most to run on the device at all."""
        return Limits()
