"""The ONNX writer: what it writes runs as integers in ONNX Runtime and agrees with a slow fake-quantised reference."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from handmade import Handmade, mobilenet, resnet8, vit
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from payloads import random_payload
from processor import exact_int8
from torch.nn import functional as F

from tightrope.compressors.export.onnx import check, optimised, pack_blocks, write
from tightrope.compressors.payload import Payload, affine
from tightrope.spaces import Choice, Network, Policy, Space
from tightrope.spaces.errors import ExportError
from tightrope.spaces.points import MOVERS, is_integer, points

NETS = {net.__name__: Handmade(net) for net in (resnet8, mobilenet, vit)}
FORMS = {"resnet8": "spatial", "mobilenet": "tucker", "vit": "spatial"}


def space(name: str) -> Space:
    return Space.build(
        NETS[name].network, lambda x: [(32, 32), (8, 8), *[(4, 32)] * (x.kind == "linear")], form=FORMS[name], least_width=0.25
    )


def written(name: str, policy: Policy, batch: int = 1) -> tuple[onnx.ModelProto, Payload, onnx.ModelProto]:
    net = NETS[name]
    payload, skeleton = random_payload(net.network, policy), net.at(policy.all_widths(net.network), batch)
    return write(skeleton, net.network, payload), payload, skeleton


def run(model: onnx.ModelProto, x: np.ndarray, level: str = "ORT_ENABLE_ALL") -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)


def fake(x: np.ndarray, low: float, high: float, bits: int = 8) -> np.ndarray:
    scale, zero = affine(low, high, bits)
    codes = np.clip(np.rint(x / np.float32(scale)) + zero, 0, 2**bits - 1)
    return ((codes - zero) * np.float32(scale)).astype(np.float32)


def reference(network: Network, payload: Payload, skeleton: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """The skeleton run operator by operator, in float, rounding at points and between the parts of a layer."""
    held, kinds = points(network, payload.policy), {op.name: op for op in network.ops}

    def source(name: str) -> str:
        """The operator whose codes a mover hands on."""
        while name in kinds and kinds[name].kind in MOVERS and kinds[name].inputs[0] in reach:
            name = kinds[name].inputs[0]
        return name

    reach = set(held)
    for op in network.ops:
        if op.kind in MOVERS and op.inputs[0] in reach:
            reach.add(op.name)

    class Point(OpRun):  # type: ignore[misc]
        op_domain = "tightrope"

        def _run(self, x: np.ndarray, name: str = "") -> tuple[np.ndarray]:
            return (fake(x, *payload.ranges[name]) if name in held and source(name) == name else x,)

    class Layer(OpRun):  # type: ignore[misc]
        op_domain = "tightrope"

        def _run(self, x: np.ndarray, name: str = "") -> tuple[np.ndarray]:
            for part in payload.parts[name]:
                u = part.unit
                if u.act_bits <= 8 and (u.part or u.act_bits < 8):
                    assert part.act_range
                    x = fake(x, *part.act_range, u.act_bits)
                w, b = torch.from_numpy(part.weight), None if part.bias is None else torch.from_numpy(part.bias)
                t = torch.from_numpy(np.array(x))
                y = F.linear(t, w, b) if u.kind == "linear" else F.conv2d(t, w, b, u.stride, u.padding, u.dilation, u.groups)
                x = y.numpy()
            return (x,)

    feeds = {"x": x, **{n: payload.parameters[n] for n in (i.name for i in skeleton.graph.input) if n != "x"}}
    return np.asarray(ReferenceEvaluator(skeleton, new_ops=[Point, Layer]).run(None, feeds)[0])


def images(batch: int = 1) -> np.ndarray:
    return np.random.default_rng(7).normal(0, 1, (batch, 1, 28, 28)).astype(np.float32)


@pytest.mark.parametrize("name", NETS)
def test_floating_point_equals_the_reference(name: str) -> None:
    policy = space(name).uniform(0.5)
    model, payload, skeleton = written(name, policy, batch=2)
    x = images(2)
    np.testing.assert_allclose(run(model, x), reference(NETS[name].network, payload, skeleton, x), rtol=1e-3, atol=1e-4)


@exact_int8
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NETS)
def test_mixed_policies_equal_the_reference(name: str, seed: int) -> None:
    """Codes at a rounding tie may fall either way, so errors are counted in steps of noise, not bit by bit."""
    policy = space(name).sample(np.random.default_rng(seed))
    model, payload, skeleton = written(name, policy)
    check(model, NETS[name].network, policy)
    x = images()
    expected, found = reference(NETS[name].network, payload, skeleton, x), run(model, x)
    assert np.abs(found - expected).max() < 0.06 * max(1.0, float(np.abs(expected).max()))
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.998


@pytest.mark.parametrize("name", NETS)
def test_all_integer_layers_run_as_integers(name: str) -> None:
    policy = space(name).uniform(0.5, (8, 8))
    model, _, _ = written(name, policy)
    check(model, NETS[name].network, policy)
    kinds = {node.op_type for node in optimised(model).graph.node}
    assert not kinds & {"Conv", "FusedConv", "Gemm"}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("bits", [2, 5])
def test_activations_below_8_bits_are_looked_up(name: str, bits: int) -> None:
    """From the 8 bits of a point to a layer's own by a table, once for all that read them, as by decoding, clipping, quantising."""
    choices = {x: replace(c, act_bits=bits) for x, c in space(name).uniform(1, (8, 8)).choices}
    policy = Policy.make(NETS[name].network, choices=choices)
    model, _, _ = written(name, policy)
    check(model, NETS[name].network, policy)
    tables = [node for node in model.graph.node if node.op_type == "QLinearLeakyRelu"]
    assert tables
    assert len({(node.input[0], node.input[3]) for node in tables}) == len(tables)
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    del plain.graph.node[:]
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QLinearLeakyRelu":
            before, after = node.input[:3], node.input[3:]
            scale, zero = (constants[name] for name in after)
            ends = [(code - np.float32(zero)) * scale for code in (0, 2**bits - 1)]
            limits = [f"{node.output[0]}_{i}" for i in (0, 1)]
            plain.graph.initializer.extend(
                onnx.numpy_helper.from_array(np.float32(end), name) for end, name in zip(ends, limits, strict=True)
            )
            plain.graph.node.extend(
                [
                    onnx.helper.make_node("DequantizeLinear", before, [node.output[0] + "_real"]),
                    onnx.helper.make_node("Clip", [node.output[0] + "_real", *limits], [node.output[0] + "_within"]),
                    onnx.helper.make_node("QuantizeLinear", [node.output[0] + "_within", *after], [node.output[0]]),
                ]
            )
        else:
            plain.graph.node.append(node)
    x = images()
    np.testing.assert_array_equal(run(model, x), run(plain, x))


def test_adds_of_points_are_integer() -> None:
    model, _, _ = written("resnet8", space("resnet8").uniform(1, (8, 8)))
    kinds = [node.op_type for node in optimised(model).graph.node]
    assert kinds.count("QLinearAdd") == 2  # the last block's sum is read by the mean alone, in floating point


def test_a_layer_that_would_not_run_as_integers_is_named() -> None:
    policy = space("resnet8").uniform(1, (8, 8))
    model, _, _ = written("resnet8", policy)
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] == "s1c2.0.weight":
            node.op_type = "Identity"
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((64, 64, 3, 3), np.float32), "float.weight"))
            del node.input[:], node.attribute[:]
            node.input.append("float.weight")
    with pytest.raises(ExportError, match="s1c2"):
        check(model, NETS["resnet8"].network, policy)


@pytest.mark.parametrize(("bits", "act"), [(3, 32), (32, 8), (8, 32)])
def test_what_onnx_runtime_cannot_run_is_refused(bits: int, act: int) -> None:
    net = NETS["resnet8"].network
    policy = Policy.make(net, choices={"s1c1": Choice(bits, act)})
    with pytest.raises(ExportError, match="s1c1"):
        written("resnet8", policy)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_only_linears_equal_the_reference(bits: int) -> None:
    net = NETS["vit"].network
    policy = Policy.make(net, choices={name: Choice(bits, 32) for name in ("q0", "up0", "down0", "head")})
    model, payload, skeleton = written("vit", policy)
    assert sum(node.op_type == "MatMulNBits" for node in model.graph.node) == 4
    np.testing.assert_allclose(run(model, images()), reference(net, payload, skeleton, images()), rtol=1e-3, atol=2e-4)


def test_low_activation_bits_are_read_coarser() -> None:
    net = NETS["resnet8"].network
    policy = Policy.make(net, choices={x.name: Choice(4, 4) for x in net.layers[1:-1]})
    model, payload, skeleton = written("resnet8", policy)
    expected, found = reference(net, payload, skeleton, images()), run(model, images())
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99
    assert all(is_integer(policy.choice(x.name)) for x in net.layers[1:-1])


def test_packing_puts_the_low_bits_first() -> None:
    codes = np.array([[-8, 7, 0, 1]], np.int8)
    packed = pack_blocks(codes, 4, 1)
    assert packed.shape == (1, 1, 16)
    assert packed[0, 0, :3].tolist() == [0xF0, 0x98, 0x88]


def test_outputs_keep_their_names_and_steps_are_shared_by_movers() -> None:
    model, _, skeleton = written("vit", space("vit").uniform(1, (8, 8)))
    assert [o.name for o in model.graph.output] == [o.name for o in skeleton.graph.output]
    made: dict[str, Any] = {name: node for node in model.graph.node for name in node.output}
    moved = [n for n in model.graph.node if n.op_type in ("Reshape", "Transpose")]
    assert moved
    assert not [n for n in moved if n.input[0] in made and made[n.input[0]].op_type == "DequantizeLinear"]


@exact_int8
def test_a_floating_point_layer_between_integer_ones_keeps_its_weights() -> None:
    """ONNX Runtime would quantise them by itself, with one scale for the whole tensor, which one large weight ruins."""
    net = NETS["resnet8"]
    policy = Policy.make(net.network, choices={x.name: Choice(8, 8) for x in net.network.layers if x.name != "s1c1"})
    payload, skeleton = random_payload(net.network, policy), net.at(net.network.widths)
    (part,) = payload.parts["s1c1"]
    part.weight[0, 0, 0, 0] = 100.0
    model = write(skeleton, net.network, payload)
    assert {"Conv", "FusedConv"} & {node.op_type for node in optimised(model).graph.node}
    for node in model.graph.node:  # what stands behind channels 1 and on is not touched by the large weight
        if node.op_type == "Conv" and node.input[1] == "s1c1.0.weight":
            del model.graph.output[:]
            model.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
    found, plain = run(model, images()), run(model, images(), "ORT_DISABLE_ALL")
    assert np.abs(found - plain)[:, 1:].mean() < 0.01 * plain[:, 1:].std()


def test_weight_only_layers_have_whole_panels_of_output_features() -> None:
    """What is beyond them stays as it was in memory, and denormal numbers there would slow the kernel down."""
    net = NETS["vit"].network
    choices = {x.name: Choice(4, 32, 4, "svd") if x.name == "q0" else Choice(4, 32) for x in net.layers if x.kind == "linear"}
    policy = Policy.make(net, {"dim": 24, "mlp0": 40}, choices)
    model, payload, skeleton = written("vit", policy)
    sizes = {n.input[1]: {a.name: a.i for a in n.attribute} for n in model.graph.node if n.op_type == "MatMulNBits"}
    assert {name: s["N"] % 16 for name, s in sizes.items() if name != "head.0.weight"} == dict.fromkeys(
        sizes.keys() - {"head.0.weight"}, 0
    )
    assert sizes["head.0.weight"]["N"] == 10  # one row takes another way
    assert sizes["q0.1.weight"]["K"] == 16
    np.testing.assert_allclose(run(model, images()), reference(net, payload, skeleton, images()), rtol=1e-3, atol=2e-4)
