"""The space: decoding and encoding, the rounding rule, counting against enumeration, sampling."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from spaces_nets import chain, policies

from tightrope.spaces import Choice, Extent, Group, Layer, Network, Policy, Space
from tightrope.spaces.batch import Batch
from tightrope.spaces.errors import PolicyError, SpaceError
from tightrope.spaces.network import full_rank
from tightrope.spaces.unit import units_of

NET = chain()
PAIRS = [(2, 8), (4, 8), (4, 32), (8, 8), (32, 32)]
SPACE = Space.build(NET, lambda layer: PAIRS, rank_shares=(0.25, 0.5))
TUCKER = Space.build(NET, lambda layer: PAIRS, rank_shares=(0.25, 0.5, 0.9), form="tucker")
TINY = Space.build(
    NET, lambda layer: [(8, 8), (8, 32), (32, 32)] if layer.name != "depth" else [(32, 32)], least_width=0.5, rank_shares=(0.5,)
)


def points(space: Space) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float64, space.dimension, elements=st.floats(0, 1))


@given(points(SPACE))
def test_decode_inverts_encode(x: np.ndarray) -> None:
    policy = SPACE.decode(x)
    policy.check(NET)
    assert SPACE.decode(SPACE.encode(policy)) == policy
    assert SPACE.contains(policy)
    assert SPACE.nearest(policy) == policy


@given(policies(NET))
def test_nearest_is_of_the_space_and_keeps_what_is(policy: Policy) -> None:
    near = SPACE.nearest(policy)
    assert SPACE.contains(near)
    assert (near == policy) == SPACE.contains(policy)
    for group, width in policy.all_widths(NET).items():
        distance = [abs(option - width) for option in SPACE.widths[group]]
        assert abs(near.all_widths(NET)[group] - width) == min(distance)
    for layer in NET.layers:
        choice, found = policy.choice(layer.name), near.choice(layer.name)
        assert (found.weight_bits, found.act_bits) in SPACE.pairs[layer.name]
        if (choice.weight_bits, choice.act_bits) in SPACE.pairs[layer.name]:
            assert (found.weight_bits, found.act_bits) == (choice.weight_bits, choice.act_bits)


@given(points(SPACE))
def test_the_rounding_rule(x: np.ndarray) -> None:
    """Each coordinate picks option min(floor(x n), n - 1), read back from the policy by hand."""
    policy = SPACE.decode(x)
    widths = policy.all_widths(NET)
    for variable, value in zip(SPACE.variables, x, strict=True):
        if variable.kind == "channels":
            count = len(variable.options)
            assert widths[variable.target] == variable.options[min(math.floor(value * count), count - 1)]
        elif variable.kind == "weight_bits":
            count = len(variable.options)
            assert policy.choice(variable.target).weight_bits == variable.options[min(math.floor(value * count), count - 1)]
        elif variable.kind == "act_bits":
            choice = policy.choice(variable.target)
            options = sorted(a for w, a in SPACE.pairs[variable.target] if w == choice.weight_bits)
            assert choice.act_bits == options[min(math.floor(value * len(options)), len(options) - 1)]


def test_ranks_are_rounded_to_fours_and_left_whole_where_they_save_nothing() -> None:
    layer = Layer("x", "linear", Extent(64), Extent(48))
    net = Network((Layer("first", "linear", Extent(3), Extent(64)), layer, Layer("last", "linear", Extent(48), Extent(2))))
    space = Space.build(net, lambda _: [(32, 32)], rank_shares=(0.01, 0.26, 0.5, 0.9))
    # full rank 48: 0.48 -> at least 1 block of 4 or rank 1; 12.48 -> 12; 24; 43.2 -> 44, which takes 44 * 112 > 64 * 48 MACs
    ranks = [space.decode([(k + 0.5) / 5]).choice("x").rank for k in range(5)]
    assert ranks == [1, 12, 24, None, None]
    assert space.size == 5


def test_size_counts_what_enumeration_counts() -> None:
    """Every combination of options by hand: widths by steps of 1 and 2 from half, pairs, and a rank share or the layer whole."""
    widths = itertools.product(range(4, 9), range(8, 17, 2))
    pairs, ranks = [(8, 8), (8, 32), (32, 32)], [None, 0.5]
    of_layers = itertools.product(pairs, [None], pairs, ranks, pairs)  # the ends stay whole, depthwise has no form
    assert TINY.size == len(list(itertools.product(widths, of_layers)))


def test_every_policy_of_a_space_without_ranks_is_reached_once() -> None:
    space = Space.build(
        NET, lambda layer: [(8, 8), (32, 32)] if layer.name != "depth" else [(32, 32)], ranks=False, least_width=0.5
    )
    grids = [[(k + 0.5) / len(v.options) for k in range(len(v.options))] for v in space.variables]
    found = Counter(space.decode(point) for point in itertools.product(*grids))
    assert len(found) == space.size and set(found.values()) == {1}
    by_hand = {
        Policy.make(NET, {"a": a, "b": b}, dict(zip(("conv", "point", "head"), (Choice(*p) for p in pairs), strict=True)))
        for a in range(4, 9)
        for b in (8, 10, 12, 14, 16)
        for pairs in itertools.product([(8, 8), (32, 32)], repeat=3)
    }
    assert set(found) == by_hand


def test_all_options_are_equally_likely() -> None:
    rng = np.random.default_rng(0)
    drawn = [SPACE.sample(rng) for _ in range(4000)]
    for variable in SPACE.variables:
        if variable.kind == "rank":
            continue
        if variable.kind == "channels":
            counts = Counter(p.all_widths(NET)[variable.target] for p in drawn)
        elif variable.kind == "weight_bits":
            counts = Counter(p.choice(variable.target).weight_bits for p in drawn)
        else:
            four = [p.choice(variable.target).act_bits for p in drawn if p.choice(variable.target).weight_bits == 4]
            counts = Counter(four)
        expected = sum(counts.values()) / len(variable.options)
        # chi-squared at one in a million for as many degrees of freedom
        statistic = sum((counts[int(o)] - expected) ** 2 / expected for o in variable.options)
        assert statistic < len(variable.options) + 8 * math.sqrt(len(variable.options)) + 24, (variable, counts)


def test_the_same_generator_gives_the_same_policies() -> None:
    a, b = np.random.default_rng(7), np.random.default_rng(7)
    assert [SPACE.sample(a) for _ in range(5)] == [SPACE.sample(b) for _ in range(5)]


def test_first_and_last_layer_keep_eight_bits() -> None:
    assert SPACE.pairs["conv"] == SPACE.pairs["head"] == ((8, 8), (32, 32))
    assert SPACE.pairs["point"] == tuple(PAIRS)
    assert SPACE.ranks["conv"] == SPACE.ranks["head"] == (1.0,)
    only_low = Space.build(NET, lambda layer: [(4, 4)])
    assert only_low.pairs["head"] == ((32, 32),)


def test_widths_go_by_steps_or_by_eighths_and_keep_the_least_share() -> None:
    groups = (Group("big", 100), Group("small", 12), Group("one", 1))
    layers = tuple(Layer(g.name, "linear", Extent(2), Extent(0, ((g.name, 1),))) for g in groups)
    space = Space.build(Network(layers, groups), lambda _: [(32, 32)], least_width=0.3)
    assert space.widths["big"] == (32, 40, 48, 56, 64, 72, 80, 88, 96, 100)
    assert space.widths["small"] == tuple(range(4, 13))
    assert space.widths["one"] == (1,)


def test_decisions_can_be_taken_out() -> None:
    bare = Space.build(NET, lambda _: [(32, 32)], channels=False, ranks=False)
    assert bare.dimension == 0 and bare.size == 1
    assert bare.sample(np.random.default_rng(0)) == Policy.make(NET) == bare.dense


def test_variables_follow_the_walk() -> None:
    names = [v.name for v in SPACE.variables]
    assert names == [
        "channels:a", "weight_bits:conv", "weight_bits:depth", "act_bits:depth", "channels:b", "rank:point", "weight_bits:point",
        "act_bits:point", "weight_bits:head",
    ]  # fmt: skip


def test_dense_and_uniform() -> None:
    assert SPACE.dense == Policy.make(NET)
    half = SPACE.uniform(0.5, (8, 8))
    assert half.all_widths(NET) == {"a": 4, "b": 8}
    assert {half.choice(x.name) for x in NET.layers} == {Choice(8, 8)}
    assert SPACE.contains(half)
    integers = Space.build(NET, lambda _: [(4, 4), (8, 8)])
    assert {integers.dense.choice(x.name) for x in NET.layers} == {Choice(8, 8)}


def test_a_policy_for_another_network_is_not_contained() -> None:
    other = Policy("0" * 16)
    assert not SPACE.contains(other)
    with pytest.raises(PolicyError):
        SPACE.nearest(other)


@pytest.mark.parametrize("x", [[0.5], np.full(9, 1.1), np.full(9, np.nan), np.full(9, -0.1), np.zeros((9, 1))])
def test_points_outside_are_refused(x: object) -> None:
    with pytest.raises(SpaceError, match="9 coordinates"):
        SPACE.decode(x)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [{"least_width": 0.0}, {"least_width": 1.1}, {"width_step": 0}, {"rank_shares": (1.0,)}, {"form": "svd"}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(SpaceError):
        Space.build(NET, lambda _: PAIRS, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("space", [SPACE, TUCKER], ids=["spatial", "tucker"])
@given(data=st.data())
def test_a_rank_is_what_its_share_comes_to_where_it_saves_macs(space: Space, data: st.DataObject) -> None:
    """Against the units that the layer would lower to."""
    x = data.draw(points(space))
    policy = space.decode(x)
    widths = policy.all_widths(NET)
    for variable, value in zip(space.variables, x, strict=True):
        if variable.kind == "rank":
            layer, form, count = NET.layer(variable.target), space.forms[variable.target], len(variable.options)
            share = variable.options[min(math.floor(value * count), count - 1)]
            rank = max(1, round(share * full_rank(layer, form, widths) / 4) * 4)
            whole, parts = (sum(u.macs for u in units_of(layer, c, widths)) for c in (Choice(), Choice(rank=rank, form=form)))
            expected = rank if share < 1 and parts < whole else None
            assert policy.choice(layer.name).rank == expected == space.rank_of(layer, share, widths)
            assert policy.choice(layer.name).form == ("" if expected is None else form)


@given(arrays(np.float64, (7, SPACE.dimension), elements=st.floats(0, 1)))
def test_many_are_decoded_as_one_by_one(x: np.ndarray) -> None:
    batch, alone = SPACE.decode_many(x), [SPACE.decode(row) for row in x]
    assert list(batch) == alone == [Policy.make(NET, p.all_widths(NET), dict(p.choices)) for p in batch]
    assert list(batch[2:5]) == alone[2:5] and batch[-1] == alone[-1]
    keys = batch.keys()
    assert all((keys[i] == keys[j]) == (alone[i] == alone[j]) for i in range(7) for j in range(7))
    again = Batch.of(NET, alone)
    assert again.keys() == keys and Batch.of(NET, batch) is batch
    assert len(SPACE.decode_many(x[:0])) == 0


@pytest.mark.parametrize(
    ("widths", "choices"),
    [((), (("conv", Choice(rank=2, form="cp")),)), ((), (("nowhere", Choice(8, 8)),)), ((("nothing", 2),), ())],
    ids=["form", "layer", "group"],
)
def test_what_no_array_can_hold_is_named(widths: tuple[tuple[str, int], ...], choices: tuple[tuple[str, Choice], ...]) -> None:
    choices = tuple((NET.layers[0].name if name == "conv" else name, choice) for name, choice in choices)
    with pytest.raises(PolicyError):
        Batch.of(NET, [SPACE.dense, Policy(NET.fingerprint, widths, choices)])
