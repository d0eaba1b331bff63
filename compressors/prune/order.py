"""In which order the channels of a group are kept: the most important first."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tightrope.compressors.calibrate import Statistics
from tightrope.compressors.trace import Traced

Order = Literal["l1", "l2", "taylor"]
ORDERS: tuple[Order, ...] = ("l1", "l2", "taylor")


def channel_orders(traced: Traced, statistics: Statistics, order: Order) -> dict[str, NDArray[np.int64]]:
    """For every group its channels from most to least important.

    `l1` and `l2`: norm of the weights that write a channel (Li et al. 2017, Pruning Filters for Efficient ConvNets, section 3.1).
    `taylor`: first-order change of the loss when the channel is cut, squared (Molchanov et al. 2019, Importance Estimation for
    Neural Network Pruning, equation 8). Each writer's importances are scaled to a mean of 1, then added over the writers.
    """
    total = {group.name: np.zeros(group.width) for group in traced.network.groups}
    for layer in traced.network.layers:
        values = _importance(traced, statistics, layer.name, order)
        values = values / max(float(values.mean()), 1e-30)
        axis = traced.ties.axes[layer.name, 0]
        for number, name in enumerate(axis.names):
            own = axis.group == number
            if own.any():
                total[name] += np.bincount(axis.channel[own], values[own], minlength=len(total[name]))
    return {name: np.argsort(-value, kind="stable") for name, value in total.items()}


def _importance(traced: Traced, statistics: Statistics, layer: str, order: Order) -> NDArray[np.float64]:
    if order == "taylor":
        saliency: NDArray[np.float64] = statistics.layers[layer].saliency.astype(np.float64)
        return saliency
    weight = traced.layer(layer).weight.detach().flatten(1).double().numpy()  # type: ignore[operator]
    norms: NDArray[np.float64] = np.abs(weight).sum(1) if order == "l1" else np.sqrt((weight**2).sum(1))
    return norms


def kept(orders: Mapping[str, NDArray[np.int64]], widths: Mapping[str, int]) -> dict[str, NDArray[np.bool_]]:
    """Flags of the channels that remain at these widths: the first of each order."""
    flags = {}
    for name, order in orders.items():
        flags[name] = np.zeros(len(order), bool)
        flags[name][order[: widths[name]]] = True
    return flags
