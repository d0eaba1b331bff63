"""Rounding the weights of a layer so that its output moves least, not its weights.

What a layer's output loses to a change `D` (`rows x f`) of its weights is `tr(D G D')` for inputs of Gram matrix `G`: of their
covariance, where the bias takes over the mean. With `G = L L'` that is the square of `D L`, and nothing but `L` is needed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

Rounding = Literal["nearest", "gptq", "adaround"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "gptq", "adaround")
Clip = Literal["mse", "max"]
CLIPS: tuple[Clip, ...] = ("mse", "max")
BLOCK = 48  # features whose errors are handed on one by one before they are to all others at once
STEPS, RATE, WEIGHT = 400, 0.05, 0.2  # of learned rounding; the last is that of its regulariser
STRETCH = (-0.1, 1.1)  # of the rectified sigmoid
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Gram:
    """The Gram matrix of a layer's inputs, factorised: `G[order][:, order] = lower @ lower.T`.

    `order` has the `f` features; `lower` is `f x f`, or `groups x f x f` where each group of rows reads inputs of its own.
    """

    order: NDArray[np.int64]
    lower: Matrix

    @property
    def features(self) -> int:
        return len(self.order)

    @property
    def stack(self) -> Matrix:
        """`groups x f x f`."""
        return self.lower.reshape(-1, self.features, self.features)

    def errors(self, change: Matrix) -> Matrix:
        """What the output of each row loses, squared, to a change of the weights (`rows x f`): `rows`-dim array."""
        lower = self.stack
        moved = change[:, self.order].reshape(len(lower), -1, self.features) @ lower
        squares: Matrix = np.square(moved).sum(-1).reshape(-1)
        return squares


def whole_scales(weight: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """For each row of weights the scale at which nothing is clipped; 1 for a row of zeros."""
    widest = np.abs(weight).max(1)
    scales: NDArray[np.float32] = np.where(widest > 2.0**-100, widest / (2 ** (bits - 1) - 1), 1).astype(np.float32)
    return scales


def nearest(weight: Matrix, bits: int) -> Matrix:
    """Codes nearest to weights that are given in steps: whole numbers from `-(2**(bits-1)-1)` to `2**(bits-1)-1`."""
    most = 2 ** (bits - 1) - 1
    codes: Matrix = np.clip(np.rint(weight), -most, most)
    return codes


def gptq(weight: Matrix, bits: int, gram: Gram) -> Matrix:
    """Codes rounded feature after feature, each making up for the errors of those before.

    Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", algorithm 1, in
    the equal form of Chen et al. 2025, "The Geometry of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm": features are
    rounded from the last to the first, and feature `j` aims at `w_j + sum_{i > j} (w_i - q_i) L_ij / L_jj`. Rows that would
    lose more by this than by plain rounding are rounded plainly.

    Args:
        weight: `rows x f`, in steps of each row.
        gram: of the inputs; errors are handed on from the end of its order to the beginning.
    """
    lower, count, most = gram.stack, gram.features, 2 ** (bits - 1) - 1
    unit = lower / np.diagonal(lower, axis1=1, axis2=2)[:, None, :]
    wanted = np.ascontiguousarray(weight[:, gram.order].reshape(len(lower), -1, count).swapaxes(1, 2))
    aim, codes, lost = wanted.copy(), np.empty_like(wanted), np.empty_like(wanted)
    for stop in range(count, 0, -BLOCK):
        start = max(0, stop - BLOCK)
        for j in range(stop - 1, start - 1, -1):
            here = aim[:, j] + (unit[:, None, j + 1 : stop, j] @ lost[:, j + 1 : stop])[:, 0]
            codes[:, j] = np.clip(np.rint(here), -most, most)
            lost[:, j] = wanted[:, j] - codes[:, j]
        aim[:, :start] += unit[:, start:stop, :start].swapaxes(1, 2) @ lost[:, start:stop]
    found = np.empty_like(weight)
    found[:, gram.order] = codes.swapaxes(1, 2).reshape(weight.shape)
    return _better(weight, bits, gram, found)


def adaround(weight: Matrix, bits: int, gram: Gram) -> Matrix:
    """Codes whose rounding, up or down, is learned.

    Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", equations 21 to 24: gradient descent on
    a rectified sigmoid for each weight, under a regulariser that drives it to 0 or 1, on the Gram matrix in place of data.
    It begins at the weights themselves, where nothing is lost, so that there is no phase without the regulariser.
    Rows that would lose more by this than by plain rounding are rounded plainly.

    Args:
        weight: `rows x f`, in steps of each row.
        gram: of the inputs.
    """
    most, (low, high) = 2 ** (bits - 1) - 1, STRETCH
    lower = torch.from_numpy(gram.stack).float()
    lower = lower / lower.square().sum((1, 2), keepdim=True).sqrt() * gram.features**0.5
    wanted = torch.from_numpy(weight[:, gram.order]).float().reshape(len(lower), -1, gram.features)
    floor = wanted.floor()
    rest = ((wanted - floor - low) / (high - low)).clamp(1e-4, 1 - 1e-4)
    free = torch.log(rest / (1 - rest)).requires_grad_()
    optimiser = torch.optim.Adam([free], lr=RATE)
    for step in range(STEPS):
        up = (torch.sigmoid(free) * (high - low) + low).clamp(0, 1)
        lost = ((floor + up).clamp(-most, most) - wanted) @ lower
        loss = lost.square().sum()
        beta = 2 + 9 * (1 + np.cos(np.pi * step / STEPS))
        loss = loss + WEIGHT * (1 - (2 * up - 1).abs().pow(beta)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    codes = (floor + (free.detach() >= 0)).clamp(-most, most).double().numpy()
    found = np.empty_like(weight)
    found[:, gram.order] = codes.reshape(weight.shape)
    return _better(weight, bits, gram, found)


def _better(weight: Matrix, bits: int, gram: Gram, codes: Matrix) -> Matrix:
    """Of these codes and plainly rounded ones, row by row, those by which the output loses less."""
    plain = nearest(weight, bits)
    chosen: Matrix = np.where((gram.errors(codes - weight) <= gram.errors(plain - weight))[:, None], codes, plain)
    return chosen


BY_OUTPUT: Mapping[str, Callable[[Matrix, int, Gram], Matrix]] = {"gptq": gptq, "adaround": adaround}
