"""Thousands of policies at once: the nodes that they are told to come to, their bytes and multiply-accumulates."""

import json
from collections import Counter

import numpy as np
import onnx
import pytest
from handmade import Handmade, mobilenet, resnet8, vit
from payloads import random_payload

from tightrope.compressors.export.onnx import write
from tightrope.estimators.encode import Encoder
from tightrope.estimators.measured.fitted import beyond
from tightrope.estimators.measured.layouts import BLOCKS
from tightrope.estimators.measured.lowering import Lowering
from tightrope.estimators.measured.nodes import Key, key
from tightrope.estimators.measured.ort import OrtCpu
from tightrope.estimators.measured.patterns import Patterns, filling, learn, told
from tightrope.estimators.measured.plan import make
from tightrope.estimators.measured.sampling import mixed, probes
from tightrope.estimators.measured.weights import Weights
from tightrope.spaces import Space
from tightrope.spaces.fields import Fields
from tightrope.spaces.unit import macs, size_bytes

NETS = {net.__name__: Handmade(net) for net in (resnet8, mobilenet, vit)}
FORMS = {"resnet8": "spatial", "mobilenet": "tucker", "vit": "spatial"}


def setting(name: str) -> tuple[Handmade, Space, Encoder]:
    net = NETS[name]
    space = Space.build(net.network, OrtCpu().pairs, form=FORMS[name])
    return net, space, OrtCpu().encoder(net.network)


def nodes_of(patterns: Patterns, encode: Encoder, policies: list) -> "list[Counter[Key]]":  # type: ignore[type-arg]
    flat = patterns(encode(policies))
    found: list[Counter[Key]] = [Counter() for _ in policies]
    for place, who in flat.who.items():
        family, columns = patterns.patterns[place]
        for policy in who.tolist():
            found[policy][family, tuple(flat.sizes[columns, policy].tolist())] += 1
    return found


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("isa", BLOCKS)
def test_patterns_tell_what_lowering_says(name: str, isa: str) -> None:
    net, space, encode = setting(name)
    lowering, rng = Lowering(net.network, make(net.network, net.at, 1), BLOCKS[isa]), np.random.default_rng(0)
    seen = probes(space, rng, 400) + mixed(space, rng, 300)
    patterns = learn(net.network, encode(seen), [told(lowering.nodes(p))[1] for p in seen], BLOCKS[isa] or 16)
    others = mixed(space, rng, 60)
    found = nodes_of(patterns, encode, others)
    same = [f == Counter(key(node) for node in lowering.nodes(p)) for f, p in zip(found, others, strict=True)]
    assert np.mean(same) >= 0.85  # of a fraction of a user's policies; the benchmark has the figure
    again = Patterns.from_json(net.network, Fields(json.loads(json.dumps(patterns.to_json())), "patterns"))
    assert nodes_of(again, encode, others) == found
    batch = encode(others)
    sights, sizes = patterns.sights(batch), patterns.columns(batch)
    for i, one in enumerate(found):  # one by one they are the same
        each = ((family, tuple(sizes[columns, i].tolist())) for family, columns in patterns.of(sights[:, i].tolist()))
        assert Counter(each) == one
    assert patterns.tells(sights).all()
    sights[0, 3] = 9
    assert np.flatnonzero(~patterns.tells(sights)).tolist() == [3]


def test_policies_with_larger_nodes_than_all_that_were_met_are_found() -> None:
    net, space, encode = setting("resnet8")
    lowering, rng = Lowering(net.network, make(net.network, net.at, 1), BLOCKS["avx2"]), np.random.default_rng(0)
    seen = probes(space, rng, 300) + mixed(space, rng, 200)
    lowered = [told(lowering.nodes(p)) for p in seen]
    patterns = learn(net.network, encode(seen), [t for _, t in lowered], BLOCKS["avx2"])
    met: dict[str, set[tuple[int, ...]]] = {}
    for nodes, _ in lowered[:100]:
        for (family, sizes), _ in nodes:
            met.setdefault(family, set()).add(sizes)
    drawn = [space.sample(rng) for _ in range(1000)]
    found = beyond(patterns(encode(drawn)), met)
    assert 0 < len(found) < 200
    for i in found:
        nodes, _ = told(lowering.nodes(drawn[i]))
        for (family, sizes), _ in nodes:
            met.setdefault(family, set()).add(sizes)
    assert len(beyond(patterns(encode(drawn)), met)) <= 0.1 * len(found)  # those that are told wrongly
    assert beyond(patterns(encode(drawn)), {f: s for f, s in met.items() if "Gemm" not in f})  # a family of none that was met


@pytest.mark.parametrize("name", NETS)
def test_leaves_have_one_mark_where_they_have_the_same_nodes(name: str) -> None:
    net, space, encode = setting(name)
    lowering, rng = Lowering(net.network, make(net.network, net.at, 1), 16), np.random.default_rng(1)
    seen = mixed(space, rng, 300)
    patterns = learn(net.network, encode(seen), [told(lowering.nodes(p))[1] for p in seen], 16)
    batch = encode([*seen, *(space.sample(rng) for _ in range(300))])
    ends, sizes = patterns.ends(patterns.sights(batch)), patterns.columns(batch)
    marks, known = patterns.marks(ends, sizes), dict[int, tuple[int, list[Key]]]()
    for owner, who in np.ndindex(ends.shape):
        leaf, size = int(ends[owner, who]), sizes[:, who]
        nodes = [(family, tuple(size[[patterns.column[f] for f in forms]].tolist())) for family, forms in patterns.leaves[leaf]]
        assert known.setdefault(int(marks[owner, who]), (leaf, nodes)) == (leaf, nodes)
    assert len(known) < 0.5 * ends.size


def test_sizes_fill_blocks_in_six_ways() -> None:
    assert filling(np.array([1, 8, 7, 16, 64, 20, 33]), 16).tolist() == [0, 1, 2, 3, 3, 4, 5]
    assert filling(np.array([1, 4, 7, 8, 24, 20, 33]), 8).tolist() == [0, 1, 2, 3, 3, 4, 5]


@pytest.mark.parametrize("name", NETS)
def test_bytes_are_those_of_the_file(name: str) -> None:
    """All constants of the written file but shapes, within 0.3 %, and the packed file's by the rule of its units."""
    net, space, encode = setting(name)
    rng = np.random.default_rng(2)
    policies = [space.dense, space.uniform(0.5, (8, 8)), *(space.sample(rng) for _ in range(6))]
    held, packed = Weights(net.network, 1, onnx=True)(encode(policies)), Weights(net.network, 1, onnx=False)(encode(policies))
    for i, policy in enumerate(policies):
        model = write(net.at(policy.all_widths(net.network), 1), net.network, random_payload(net.network, policy))
        whole = sum(len(t.raw_data) for t in model.graph.initializer if t.data_type != onnx.TensorProto.INT64)
        assert held.size_bytes[i] == pytest.approx(whole, rel=0.003)
        assert held.macs[i] == packed.macs[i] == macs(net.network, policy)
        assert packed.size_bytes[i] == size_bytes(net.network, policy)
    assert (np.diff(held.energy_pj[:2]) < 0).all()
