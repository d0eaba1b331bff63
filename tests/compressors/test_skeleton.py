"""The ONNX skeleton at any size, and what is written from it in ONNX Runtime against torch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from processor import exact_int8
from small_nets import Attention, Dense, Residual, build
from torch import Tensor, nn

from tightrope.compressors.assemble import assemble
from tightrope.compressors.compress import compress
from tightrope.compressors.export.onnx import check, write
from tightrope.compressors.export.skeleton import Skeleton, _sizes
from tightrope.compressors.prepare import Prepared, prepare
from tightrope.spaces import Choice, Policy, Space

torch.set_num_threads(1)
KINDS: list[Callable[[], nn.Module]] = [Residual, Attention, Dense]
_MADE: dict[Any, tuple[Prepared, Skeleton]] = {}


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(4))


def of(kind: Callable[[], nn.Module]) -> tuple[Prepared, Skeleton]:
    """Each model is prepared and exported once."""
    if kind not in _MADE:
        prepared = prepare(build(kind), images(16), [images(16)])
        assert prepared.traced is not None
        _MADE[kind] = prepared, Skeleton(prepared.traced)
    return _MADE[kind]


def space(prepared: Prepared) -> Space:
    return Space.build(prepared.network, lambda _: [(32, 32), (8, 8)], least_width=0.25, rank_shares=(0.5,))


def inputs_of(data: bytes, x: Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.shape == list(x.shape)
    return np.asarray(session.run(None, {given.name: x.numpy()})[0])


def exported(kind: Callable[[], nn.Module], policy: Policy, batch: int) -> onnx.ModelProto:
    prepared, skeleton = of(kind)
    return write(skeleton.at(policy.all_widths(prepared.network), batch), prepared.network, assemble(prepared, policy))


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_equal_those_of_a_fresh_export(kind: Callable[[], nn.Module]) -> None:
    prepared, skeleton = of(kind)
    widths = space(prepared).sample(np.random.default_rng(8)).all_widths(prepared.network)
    learnt, fresh = skeleton.at(widths, 5), skeleton._export(widths, 5)
    assert [(n.op_type, *n.input, *n.output) for n in learnt.graph.node] == [
        (n.op_type, *n.input, *n.output) for n in fresh.graph.node
    ]
    assert dict(_sizes(learnt)) == dict(_sizes(fresh))
    for a, b in zip(learnt.graph.initializer, fresh.graph.initializer, strict=True):
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(a), onnx.numpy_helper.to_array(b))


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_and_operator_stands_in_it(kind: Callable[[], nn.Module]) -> None:
    prepared, skeleton = of(kind)
    graph = skeleton.at(prepared.network.widths, 1).graph
    named = {t: {n.attribute[0].s.decode() for n in graph.node if n.op_type == t} for t in ("Layer", "Point")}
    assert named["Layer"] == set(prepared.network.by_name)
    assert named["Point"] == {op.name for op in prepared.network.ops}
    assert {i.name for i in graph.input[1:]} == {p.name for p in prepared.network.parameters}
    onnx.checker.check_model(exported(kind, Policy.make(prepared.network), 1), full_check=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_floating_point_agrees_with_torch(kind: Callable[[], nn.Module], seed: int) -> None:
    prepared, _ = of(kind)
    drawn = space(prepared).sample(np.random.default_rng(seed))
    choices = {n: Choice(rank=c.rank, form=c.form) for n, c in drawn.choices if c.rank is not None}
    policy, batch = Policy.make(prepared.network, dict(drawn.widths), choices), 1 + 2 * seed
    found = inputs_of(exported(kind, policy, batch).SerializeToString(), images(batch))
    with torch.no_grad():
        wanted = compress(None, policy, prepared)(images(batch)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@exact_int8
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_integers_agree_with_torch_within_a_few_steps(kind: Callable[[], nn.Module], seed: int) -> None:
    prepared, _ = of(kind)
    here = space(prepared)
    policy = here.uniform(1.0, (8, 8)) if seed == 0 else here.sample(np.random.default_rng(10 + seed))
    model = exported(kind, policy, 4)
    check(model, prepared.network, policy)
    found = inputs_of(model.SerializeToString(), images(4))
    with torch.no_grad():
        wanted = compress(None, policy, prepared)(images(4)).numpy()
    low, high = prepared.range_of(prepared.network.ops[-1].name, 8)
    assert np.abs(found - wanted).max() <= 3 * (high - low) / 255
    assert np.abs(found - wanted).mean() <= 0.5 * (high - low) / 255
