"""Where 8-bit tensors are held, on a network small enough to say it by hand."""

import pytest
from spaces_nets import chain

from tightrope.spaces import Choice, Policy
from tightrope.spaces.points import consumers, is_integer, points, written

NET = chain()  # input -> conv -> relu -> depth -> point -> gelu -> flat -> head


@pytest.mark.parametrize(
    ("choices", "held"),
    [
        ({}, set()),
        ({"conv": (8, 8)}, {"input", "relu"}),  # its relu is fused: the tensor behind that is what it writes
        ({"depth": (8, 8)}, {"relu", "depth"}),
        ({"conv": (8, 8), "depth": (8, 8)}, {"input", "relu", "depth"}),
        ({"point": (4, 4)}, {"depth", "point"}),  # below 8 bits the points still are 8-bit
        ({"point": (8, 32)}, set()),  # weight-only
        ({"point": (32, 8)}, set()),
        ({"head": (8, 8)}, {"flat", "head"}),  # gelu computes in floating point; what the layer reads is the flattened tensor
    ],
)
def test_the_rule(choices: dict[str, tuple[int, int]], held: set[str]) -> None:
    policy = Policy.make(NET, choices={name: Choice(*pair) for name, pair in choices.items()})
    assert points(NET, policy) == held


def test_only_a_lone_relu_is_fused() -> None:
    assert written(NET) == {"conv": "relu", "depth": "depth", "point": "point", "head": "head"}
    assert [op.name for op in consumers(NET)["conv"]] == ["relu"]


def test_integer_layers_need_both() -> None:
    assert is_integer(Choice(2, 8)) and is_integer(Choice(8, 2))
    assert not is_integer(Choice(8, 32)) and not is_integer(Choice(32, 8))
