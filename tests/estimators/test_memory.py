"""Peak memory of activations against cases small enough to follow by hand."""

import numpy as np
import pytest
from contract import NETS

from tightrope.estimators.analytic.memory import Liveness
from tightrope.estimators.analytic.operators import fused, sort_of, uncosted
from tightrope.spaces import Extent, Group, Layer, Network, Op
from tightrope.spaces.errors import DeviceError


def net(*ops: tuple[str, str, tuple[str, ...], int]) -> Network:
    """Operators as (name, kind, inputs, items); those of kind `layer` are linear layers of that name on 10 inputs."""
    layers = [Layer(name, "linear", Extent(10), Extent(items)) for name, kind, _, items in ops if kind == "layer"]
    made = [Op(name, kind, inputs, (Extent(1), Extent(items)), name * (kind == "layer")) for name, kind, inputs, items in ops]
    return Network(tuple(layers), (), tuple(made))


def peak(network: Network, *act_bits: int) -> int:
    return int(Liveness(network).peak(np.zeros((1, 0), np.int64), np.array([act_bits]))[0])


def test_a_chain_needs_the_largest_input_and_output_together() -> None:
    chain = net(("a", "layer", ("input",), 40), ("b", "layer", ("a",), 100), ("c", "layer", ("b",), 10))
    assert peak(chain, 32, 32, 32) == 4 * (40 + 100)
    assert peak(chain, 8, 8, 8) == 140  # the tensor between b and c lies at the bits of c
    assert peak(chain, 8, 8, 4) == max(10 + 40, 40 + 50, 50 + 40)  # the output of the net stays at four bytes


def test_a_residual_keeps_its_shortcut() -> None:
    branch = ("a", "layer", ("input",), 40), ("b", "layer", ("a",), 30), ("c", "layer", ("b",), 40)
    block = net(*branch, ("add", "add", ("c", "a"), 40), ("d", "layer", ("add",), 10))
    assert peak(block, 8, 8, 8, 8) == 40 + 40 + 40


def test_an_activation_writes_in_place_and_a_view_shares() -> None:
    tail = (("d", "layer", ("v",), 10),)
    plain = net(("a", "layer", ("input",), 40), ("v", "layer", ("a",), 40), *tail)
    worked = net(
        ("a", "layer", ("input",), 40), ("r", "relu", ("a",), 40), ("f", "flatten", ("r",), 40), ("v", "layer", ("f",), 40), *tail
    )
    assert peak(plain, 8, 8, 8) == peak(worked, 8, 8, 8) == 80


def test_an_activation_whose_input_is_read_again_needs_its_own_memory() -> None:
    gate = net(
        ("a", "layer", ("input",), 40), ("s", "sigmoid", ("a",), 40), ("m", "mul", ("a", "s"), 40), ("d", "layer", ("m",), 10)
    )
    assert peak(gate, 8, 8) == 120


def test_a_tensor_lies_at_the_widest_bits_that_read_it() -> None:
    fork = net(("a", "layer", ("input",), 64), ("b", "layer", ("a",), 8), ("c", "layer", ("a",), 8), ("m", "add", ("b", "c"), 8))
    assert peak(fork, 4, 8, 4) - peak(fork, 4, 4, 4) == 32


def test_widths_scale_the_peak() -> None:
    network = NETS["resnet8"]
    liveness, dense = Liveness(network), np.array([[g.width for g in network.groups]])
    widths = np.concatenate([dense, dense // 2])
    peaks = liveness.peak(widths, np.full((2, len(network.layers)), 8))
    # the first residual addition: three maps of 32 channels at 28 x 28
    assert peaks.tolist() == [3 * 32 * 784, 3 * 16 * 784]


def test_without_operators_each_layer_counts_alone() -> None:
    layers = (Layer("a", "linear", Extent(0, (("g", 2),)), Extent(40)), Layer("b", "linear", Extent(40), Extent(5)))
    network = Network(layers, (Group("g", 50),))
    assert Liveness(network).peak(np.array([[50], [25]]), np.full((2, 2), 8)).tolist() == [140, 90]


def test_operators_are_sorted_and_unknown_ones_refused() -> None:
    with pytest.raises(DeviceError, match="did you mean 'softmax'"):
        sort_of(Op("x", "sofmax", (), ()))
    chain = net(("a", "layer", ("input",), 4), ("r", "relu", ("a",), 4), ("p", "mean", ("r",), 4), ("s", "relu", ("p",), 4))
    assert fused(chain) == {"r"}
    assert uncosted(chain) == "mean x1, relu x1"
