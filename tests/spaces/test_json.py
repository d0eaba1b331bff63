"""What travels as JSON comes back the same; what a file says is checked, and an error names the field."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spaces_nets import BITS, chain, networks, policies

from tightrope.spaces import Choice, Cost, Extent, Group, Layer, Network, Policy, Score
from tightrope.spaces.errors import FormatError, NetworkError, PolicyError

NET = chain()
FINITE = st.floats(0, 1e12, allow_nan=False)


def through_text(value: Any) -> Any:
    return json.loads(json.dumps(value))


@given(networks())
def test_a_network_comes_back(network: Network) -> None:
    again = Network.from_json(through_text(network.to_json()))
    assert again == network
    assert again.fingerprint == network.fingerprint


@given(policies(NET))
def test_a_policy_comes_back(policy: Policy) -> None:
    again = Policy.from_json(through_text(policy.to_json()))
    assert again == policy and hash(again) == hash(policy)
    assert again.normal(NET) == policy
    for layer in NET.layers:
        assert again.choice(layer.name) == policy.choice(layer.name)


@given(
    st.builds(
        Cost, FINITE, st.integers(0, 2**40), st.integers(0, 2**50), st.none() | FINITE, st.none() | st.integers(0, 2**40),
        st.none() | st.tuples(FINITE, FINITE), st.booleans(), st.booleans(), st.text(),
    )
)  # fmt: skip
def test_a_cost_comes_back(cost: Cost) -> None:
    assert Cost.from_json(through_text(cost.to_json())) == cost


@given(st.builds(Score, FINITE, FINITE, st.integers(0, 10**9)))
def test_a_score_comes_back(score: Score) -> None:
    assert Score.from_json(through_text(score.to_json())) == score


def test_a_policy_file_comes_back_and_old_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text("old")
    policy = Policy.make(NET, {"a": 3}, {"conv": Choice(8, 8), "point": Choice(4, 32, 2, "svd")})
    policy.save(path)
    assert Policy.load(path, NET) == policy
    assert [p.name for p in tmp_path.iterdir()] == ["policy.json"]


def test_policies_that_mean_the_same_are_equal() -> None:
    plain = Policy.make(NET)
    assert Policy.make(NET, {"a": 8, "b": 16}, {x.name: Choice() for x in NET.layers}) == plain
    swapped = Policy(NET.fingerprint, (("b", 5), ("a", 8)), (("head", Choice(8, 8)), ("conv", Choice())))
    assert swapped.normal(NET) == Policy.make(NET, {"b": 5}, {"head": Choice(8, 8)})
    assert plain != Policy.make(NET, {"a": 7})


def changed(change: Callable[[Any], None], value: Any) -> Any:
    value = through_text(value)
    change(value)
    return value


def _put(*path: Any) -> Callable[[Any], None]:
    *way, key, value = path

    def change(top: Any) -> None:
        for step in way:
            top = top[step]
        top[key] = value

    return change


POLICY = Policy.make(NET, {"a": 3}, {"conv": Choice(8, 8), "point": Choice(4, 32, 2, "svd")})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_put("version", 2), "policy.version must lie in [1, 1], got 2; a newer Tightrope wrote it"),
        (_put("version", 0), "policy.version"),
        (_put("version", True), "policy.version must be int"),
        (_put("chanels", {}), "policy.chanels is not known; did you mean 'channels'?"),
        (_put("channels", "a", 2.5), "policy.channels.a must be a whole number, got 2.5"),
        (_put("channels", "a", True), "policy.channels.a must be a whole number, got True"),
        (_put("channels", []), "policy.channels must be dict"),
        (_put("network", 7), "policy.network must be str, got 7"),
        (_put("layers", "conv", "weigth_bits", 8), "policy.layers.conv.weigth_bits is not known; did you mean 'weight_bits'?"),
        (_put("layers", "conv", "weight_bits", 9), "policy.layers.conv: weight_bits must be one of"),
        (_put("layers", "conv", "act_bits", "8"), "policy.layers.conv.act_bits must be int, got '8'"),
        (_put("layers", "point", "form", ""), "policy.layers.point: rank and form go together"),
        (_put("layers", "conv", None), "policy.layers.conv must be a JSON object"),
    ],
)
def test_a_bad_policy_names_its_field(change: Callable[[Any], None], words: str) -> None:
    with pytest.raises((FormatError, PolicyError)) as caught:
        Policy.from_json(changed(change, POLICY.to_json()))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_put("channels", "a", 0), "width of group 'a' must lie in [1, 8], got 0"),
        (_put("channels", "a", 9), "width of group 'a' must lie in [1, 8], got 9"),
        (_put("channels", "aa", 4), "no group 'aa'; did you mean 'a'?"),
        (_put("layers", "pointt", {"weight_bits": 8}), "no layer 'pointt'; did you mean 'point'?"),
        (_put("layers", "point", "rank", 4), "rank of layer 'point' must lie in [1, 3], got 4"),
        (_put("layers", "point", "rank", 0), "rank of layer 'point' must lie in [1, 3], got 0"),
        (_put("layers", "point", "form", "tucker"), "form of layer 'point' must be one of ('svd',), got 'tucker'"),
        (_put("layers", "depth", {"rank": 1, "form": "svd"}), "form of layer 'depth' must be one of (), got 'svd'"),
        (_put("network", "0" * 16), "a policy belongs to the model that it was found for"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(change: Callable[[Any], None], words: str) -> None:
    policy = Policy.from_json(changed(change, POLICY.to_json()))
    with pytest.raises(PolicyError) as caught:
        policy.check(NET)
    assert words in str(caught.value)
    with pytest.raises(PolicyError):
        policy.normal(NET)


def test_make_refuses_unknown_names() -> None:
    with pytest.raises(PolicyError, match="no group 'c'"):
        Policy.make(NET, {"c": 3})
    with pytest.raises(PolicyError, match="no layer 'heat'; did you mean 'head'"):
        Policy.make(NET, choices={"heat": Choice(8, 8)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_put("version", 2), "network.version must lie in [1, 1], got 2"),
        (_put("group", {}), "network.group is not known; did you mean 'groups'?"),
        (_put("groups", "a", 0), "network.groups.a must be a whole number of at least 1, got 0"),
        (_put("groups", "a", True), "network.groups.a must be a whole number"),
        (_put("layers", 0, "kind", "pool"), "network.layers[0].kind must be conv, depthwise or linear, got 'pool'"),
        (_put("layers", 0, "outputs", [0, {"z": 1}]), "layer 'conv' names group 'z', which the network has not got"),
        (_put("layers", 0, "outputs", [0, 1, 2]), "network.layers[0].outputs must be a whole number or"),
        (_put("layers", 0, "outputs", [0, {"a": "1"}]), "network.layers[0].outputs must be a whole number or"),
        (_put("layers", 0, "kernel", [3]), "network.layers[0].kernel must be a list of 2 whole numbers"),
        (_put("layers", 0, "kernel", [0, 3]), "every size of layer 'conv' must be at least 1"),
        (_put("layers", 1, "name", "conv"), "layer names must differ, but ['conv'] stand twice"),
        (_put("layers", []), "a network needs at least one convolution or linear layer"),
        (_put("ops", 1, "shape", [1.5]), "network.ops[1].shape must be a whole number or"),
    ],
)
def test_a_bad_network_names_its_field(change: Callable[[Any], None], words: str) -> None:
    with pytest.raises((FormatError, NetworkError)) as caught:
        Network.from_json(changed(change, NET.to_json()))
    assert words in str(caught.value)


@pytest.mark.parametrize("change", [("version",), ("network",), ("channels",), ("layers",)])
def test_a_missing_field_is_named(change: tuple[str]) -> None:
    value = POLICY.to_json()
    del value[change[0]]
    with pytest.raises(FormatError, match=f"policy.{change[0]} is missing"):
        Policy.from_json(value)


@pytest.mark.parametrize("change", ["interval_ms", "latency_ms", "size_bytes"])
def test_a_bad_cost_names_its_field(change: str) -> None:
    good = Cost(1.0, 2, 3).to_json()
    for value in ("1", [1, 2, 3], [1, "2"]):
        with pytest.raises(FormatError, match=f"cost.{change}"):
            Cost.from_json({**good, change: value})


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"{", "is not JSON"), (b"[1]", "must be a JSON object, got list"), (b"\xff\xfe{}", "is not UTF-8"),
     (b"[" * 100_000, "nested too deeply")],
)  # fmt: skip
def test_a_file_that_is_no_policy_is_refused(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        Policy.load(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


@given(networks(), st.data())
def test_any_change_of_a_network_changes_its_fingerprint(network: Network, data: st.DataObject) -> None:
    value = through_text(network.to_json())
    index = data.draw(st.integers(0, len(network.layers) - 1))
    key = data.draw(st.sampled_from(("kernel", "stride", "padding", "dilation", "in_size", "out_size")))
    value["layers"][index][key][data.draw(st.integers(0, 1))] += 1
    assert Network.from_json(value).fingerprint != network.fingerprint


@given(BITS, BITS)
def test_choices_take_exactly_the_bits_on_offer(weight: int, act: int) -> None:
    assert (Choice(weight, act).weight_bits, Choice(weight, act).act_bits) == (weight, act)
    with pytest.raises(PolicyError, match="weight_bits must be one of"):
        Choice(weight + 31, act)


def test_an_unknown_layer_is_answered_with_the_nearest() -> None:
    with pytest.raises(NetworkError, match="no layer 'Head'; did you mean 'head'"):
        NET.layer("Head")


def test_writers_and_readers_of_a_group() -> None:
    assert [x.name for x in NET.writers("a")] == ["conv", "depth"]
    assert [x.name for x in NET.readers("a")] == ["depth", "point"]
    assert [x.name for x in NET.readers("b")] == ["head"]


def test_two_groups_of_one_name_are_refused() -> None:
    layer = Layer("x", "linear", Extent(1), Extent(0, (("g", 1),)))
    with pytest.raises(NetworkError, match="group names must differ"):
        Network((layer,), (Group("g", 2), Group("g", 3)))
