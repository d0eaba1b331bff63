"""MACs and bytes of units against numbers worked out by hand; `tests/compressors` counts them in torch."""

import itertools

from hypothesis import given
from spaces_nets import chain, policies

from tightrope.spaces import Choice, Policy, lower
from tightrope.spaces.network import forms, full_rank
from tightrope.spaces.unit import macs, size_bytes

NET = chain()


def test_dense_by_hand() -> None:
    assert macs(NET, Policy.make(NET)) == 8 * 3 * 9 * 16 + 8 * 9 * 16 + 16 * 8 * 16 + 10 * 256
    weights = 8 * 3 * 9 + 8 * 9 + 16 * 8 + 10 * 256
    assert size_bytes(NET, Policy.make(NET)) == 4 * (weights + 8 + 16 + 10 + 16)  # biases, and the parameter `scale`


def test_a_mixed_policy_by_hand() -> None:
    policy = Policy.make(NET, {"a": 5, "b": 12}, {"point": Choice(4, 8, 2, "svd"), "head": Choice(8, 8)})
    assert macs(NET, policy) == 5 * 3 * 9 * 16 + 5 * 9 * 16 + (2 * 5 + 12 * 2) * 16 + 10 * 12 * 16
    conv, depth = 4 * (5 * 3 * 9 + 5), 4 * 5 * 9
    first = (2 * 5 * 4 + 7) // 8 + 4 * 2 + 8  # codes, scales, input step; the inner factor has no bias
    second = (12 * 2 * 4 + 7) // 8 + 4 * 12 + 4 * 12 + 8
    head = 10 * 192 + 40 + 40 + 8
    assert size_bytes(NET, policy) == conv + depth + first + second + head + 4 * 12


def test_ends_are_marked_once() -> None:
    policy = Policy.make(NET, choices={"conv": Choice(rank=3, form="tucker"), "head": Choice(rank=3, form="svd")})
    units = lower(NET, policy)
    assert [(u.layer, u.part) for u in units if u.first] == [("conv", 0)]
    assert {u.layer for u in units if u.last} == {"head"}
    assert [(u.layer, u.part) for u in units] == [
        ("conv", 0),
        ("conv", 1),
        ("conv", 2),
        ("depth", 0),
        ("point", 0),
        ("head", 0),
        ("head", 1),
    ]


@given(policies(NET))
def test_factors_chain(policy: Policy) -> None:
    """Each part reads what the one before writes; the last writes what the layer writes, and only it has a bias."""
    widths = policy.all_widths(NET)
    for layer in NET.layers:
        units = [u for u in lower(NET, policy) if u.layer == layer.name]
        assert units[0].in_channels == layer.inputs.at(widths) and units[-1].out_channels == layer.outputs.at(widths)
        assert units[0].in_size == layer.in_size and units[-1].out_size == layer.out_size
        for a, b in itertools.pairwise(units):
            assert a.out_channels == b.in_channels and a.out_size == b.in_size and not a.bias
        for unit in units:
            for axis in (0, 1):
                span = unit.in_size[axis] + 2 * unit.padding[axis] - unit.dilation[axis] * (unit.kernel[axis] - 1) - 1
                assert layer.kind == "linear" or span // unit.stride[axis] + 1 == unit.out_size[axis]


@given(policies(NET))
def test_fewer_bits_never_take_more_weight_bytes(policy: Policy) -> None:
    sizes = []
    for bits in (2, 3, 4, 5, 6, 7, 8):
        choices = {n: Choice(bits, 8, c.rank, c.form) for n, c in ((x.name, policy.choice(x.name)) for x in NET.layers)}
        sizes.append(size_bytes(NET, Policy.make(NET, dict(policy.widths), choices)))
    assert sizes == sorted(set(sizes))


def test_full_ranks() -> None:
    conv, _, point, head = NET.layers
    assert forms(conv) == ("spatial", "tucker") and forms(point) == ("svd",) and forms(NET.layers[1]) == ()
    assert full_rank(conv, "spatial", NET.widths) == min(3 * 3, 8 * 3)
    assert full_rank(conv, "tucker", NET.widths) == 8
    assert full_rank(point, "svd", NET.widths) == 8 and full_rank(head, "svd", NET.widths) == 10
