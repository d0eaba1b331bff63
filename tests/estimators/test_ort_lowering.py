"""Policies lower to the nodes that ONNX Runtime really runs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from handmade import Handmade, Recorder, mobilenet, resnet8, vit
from payloads import random_payload
from told import Told

from tightrope.compressors.export.onnx import write
from tightrope.estimators.measured import job, runner
from tightrope.estimators.measured.actual import actual, predicted
from tightrope.estimators.measured.clock import Runner, low_quartile, measure, noise_floor, ratios, time_rounds
from tightrope.estimators.measured.layouts import BLOCKS, block_layouts
from tightrope.estimators.measured.lowering import Lowering, fuse_sums
from tightrope.estimators.measured.nodes import Node, Tensor, key, model
from tightrope.estimators.measured.ort import OrtCpu
from tightrope.estimators.measured.plan import Call, make
from tightrope.spaces import Policy, Space
from tightrope.spaces.errors import DeviceError
from tightrope.spaces.network import Extent


def pooled(r: Recorder) -> str:
    """Two convolutions with a max pooling between them, as torch exports it."""
    x = r.conv("stem", r.input(1, 1, 28, 28), r.group("g0", 32), act="relu")
    shape = (*r.shapes[x][:2], Extent(14), Extent(14))
    x = r.op(
        "max", "max_pool2d", (x,), shape, "MaxPool",
        kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 0, 0], dilations=[1, 1], ceil_mode=0, storage_order=0,
    )  # fmt: skip
    return r.linear("head", r.pool("pool", r.conv("next", x, r.group("g1", 48), act="relu")), Extent(10))


NETS = {net.__name__: Handmade(net) for net in (resnet8, mobilenet, vit, pooled)}
FORMS = {"resnet8": "spatial", "mobilenet": "tucker", "vit": "spatial", "pooled": "spatial"}
BLOCK = BLOCKS[OrtCpu().isa]
LOWERINGS = {name: Lowering(net.network, make(net.network, net.at, 1), BLOCK) for name, net in NETS.items()}


def built(name: str, policy: Policy, batch: int = 1) -> onnx.ModelProto:
    net = NETS[name]
    return write(net.at(policy.all_widths(net.network), batch), net.network, random_payload(net.network, policy))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", NETS)
def test_predicted_nodes_equal_the_optimised_graph(name: str, batch: int, record_property: Callable[[str, object], None]) -> None:
    net = NETS[name]
    lowering = LOWERINGS[name] if batch == 1 else Lowering(net.network, make(net.network, net.at, batch), BLOCK)
    space, rng = Space.build(net.network, OrtCpu().pairs, form=FORMS[name]), np.random.default_rng(batch)
    policies = [space.dense, space.uniform(0.5, (8, 8)), *(space.sample(rng) for _ in range(10))]
    same = [predicted(lowering.nodes(p)) == actual(built(name, p, batch)) for p in policies]
    record_property("share", sum(same) / len(same))
    assert sum(same) >= 0.95 * len(same), f"{sum(same)} of {len(same)} policies of {name} are predicted exactly"


@pytest.mark.parametrize("name", NETS)
def test_without_blocks_as_on_arm64_the_nodes_are_predicted_too(name: str) -> None:
    net = NETS[name]
    lowering = Lowering(net.network, make(net.network, net.at, 1), BLOCKS["arm64"])
    space, rng = Space.build(net.network, OrtCpu().pairs, form=FORMS[name]), np.random.default_rng(3)
    policies = [space.dense, *(space.sample(rng) for _ in range(8))]
    same = [predicted(lowering.nodes(p)) == actual(built(name, p), without=("NchwcTransformer",)) for p in policies]
    assert sum(same) >= 0.95 * len(same), f"{sum(same)} of {len(same)} policies of {name} are predicted exactly"


@pytest.mark.parametrize("activation", ["", "Relu", "Tanh", "HardSigmoid"])
@pytest.mark.parametrize("first", [True, False])
def test_a_sum_is_fused_into_a_convolution_that_has_no_blocks(activation: str, first: bool) -> None:
    held, read, made = Tensor((1, 16, 8, 8)), Tensor((1, 17, 8, 8)), Tensor((1, 16, 8, 8))
    weights = (None, ("f", (16, 17, 3, 3), None), ("f", (16,), None))
    conv = Node("Conv", [read], [made], (("group", 1), ("kernel_shape", (3, 3)), ("pads", (1, 1, 1, 1))), weights)
    summed = Tensor((1, 16, 8, 8))
    add = Node("Add", [made, held] if first else [held, made], [summed], (), (None, None), raw="Add", region="sum")
    nodes, last = [conv, add], summed
    if activation:
        last = Tensor((1, 16, 8, 8))
        nodes.append(Node(activation, [summed], [last], (), (None,), raw=activation, region="activation"))
    last.is_output = True
    found = predicted(fuse_sums(block_layouts(nodes, BLOCK)))
    names = ["y"] if not activation else ["sum", "y"]
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Conv", ["x", "w", "b"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            onnx.helper.make_node("Add", ["c", "r"] if first else ["r", "c"], names[:1]),
            *([onnx.helper.make_node(activation, ["sum"], ["y"])] if activation else []),
        ],
        "sum",
        [onnx.helper.make_tensor_value_info(n, 1, (1, c, 8, 8)) for n, c in (("x", 17), ("r", 16))],
        [onnx.helper.make_tensor_value_info("y", 1, (1, 16, 8, 8))],
        [
            onnx.numpy_helper.from_array(np.ones((16, 17, 3, 3), np.float32), "w"),
            onnx.numpy_helper.from_array(np.ones(16, np.float32), "b"),
        ],
    )
    assert found == actual(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10))
    assert [kind for kind, *_ in found] == ["com.microsoft:FusedConv"]


@pytest.mark.parametrize("name", NETS)
def test_every_node_is_a_model_that_runs_and_makes_the_shapes_it_says(name: str) -> None:
    space, rng = Space.build(NETS[name].network, OrtCpu().pairs), np.random.default_rng(0)
    keys = {key(node) for _ in range(4) for node in LOWERINGS[name].nodes(space.sample(rng))}
    for family, sizes in keys:
        one = model(family, sizes)
        session = onnxruntime.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"])
        feeds = {
            i.name: np.ones(i.shape, np.uint8 if "uint8" in i.type else np.float32) for i in session.get_inputs()
        }  # fmt: skip
        made = session.run(None, feeds)
        wanted = [tuple(d.dim_value for d in o.type.tensor_type.shape.dim) for o in one.graph.output]
        if not family.startswith("com.microsoft.nchwc"):  # onnx has no sizes for blocked tensors of fewer channels than a block
            assert [m.shape for m in made] == wanted, family


def test_the_plan_keeps_sizes_as_forms_over_widths() -> None:
    plan = LOWERINGS["vit"].plan
    net = NETS["vit"].network
    sizes = plan.sizes({**net.widths, "heads0": 3, "dim": 24})
    assert [int(sizes[s]) for s in plan.shapes["q0r"]] == [1, 49, 3, 16]
    assert [int(sizes[s]) for s in plan.shapes["embed"]] == [1, 49, 24]
    assert sum(isinstance(s, Call) for s in plan.steps) == len(net.layers)


def on_device(one: onnx.ModelProto) -> runner.Model:
    """The model as the runner of a probe job loads it."""
    return runner.Model({"optimise": False, "model": job.pack(one.SerializeToString())})


def test_what_is_not_a_family_is_refused() -> None:
    with pytest.raises(DeviceError, match="not the family"):
        model("Relu", ())
    with pytest.raises(DeviceError, match="has 1 sizes, got 2"):
        model("Relu{}(f:*)->f:8", (8, 8))


SUM = "com.microsoft.nchwc:Conv{kernel_shape=[1,1]}(f:1,16,8,8;=f:16,16,1,1;=f:16;f:1,16,8,8)->f:1,16,8,8"


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (SUM, "over i3"),
        (SUM.replace("com.microsoft.nchwc:Conv", "com.microsoft:FusedConv"), "over i3"),
        (SUM.replace(";f:1,16,8,8)", ")"), "o0"),  # nothing is added
        ("Relu{}(f:1,8)->f:1,8", "over i0"),
        ("Cast{to=6}(f:1,8)->i:1,8", "o0"),
        ("Add{}(f:1,8;f:1,8)->f:1,8", "o0"),
    ],
)
def test_the_output_takes_the_memory_that_it_takes_in_a_net(family: str, name: str) -> None:
    (made,) = model(family, ()).graph.output
    assert made.name == name
    Runner(model(family, ()), optimise=False).visit()


@pytest.mark.parametrize("load", [lambda m: Runner(m, optimise=False), on_device])
def test_a_convolution_adds_to_the_memory_of_its_sum(load: Callable[[onnx.ModelProto], Any]) -> None:
    loaded = load(model(SUM, ()))  # has run it once: 16 inputs of 1 and a bias of 1 on top of 1
    loaded.visit()
    (found,) = loaded.binding.copy_outputs_to_cpu()
    assert np.unique(found).tolist() == [1 + 3 * 17]


# --- the clock --------------------------------------------------------------------------------------------------------


def test_a_ratio_is_within_its_interval_which_narrows_with_the_rounds() -> None:
    """Of what takes 2.5 times as long as the reference, both give or take a tenth."""
    width = {}
    for rounds in (20, 500):
        names = {"dense": Told(1.0, 0.1, 1), "same": Told(1.0, 0.1, 2), "large": Told(2.5, 0.1, 3)}
        found = ratios(names, "dense", rounds=rounds)
        assert found["dense"] == (1.0, 1.0, 1.0)
        for name, true in (("same", 1.0), ("large", 2.5)):
            ratio, low, high = found[name]
            assert low <= ratio <= high and ratio == pytest.approx(true, rel=0.05)
        width[rounds] = found["large"][2] - found["large"][1]
    assert width[500] < 0.5 * width[20]


def test_whole_models_are_timed_beside_one_of_them() -> None:
    family = "Gemm{transB=1}(f:64,*;=f:256,*)->f:64,256"
    small, large = model(family, (64, 64)), model(family, (512, 512))
    found = measure({"a": small, "b": small, "c": large}, "a", rounds=10)
    assert found.pop("a") == (1.0, 1.0, 1.0) and [*found] == ["b", "c"]
    assert all(0 < low <= ratio <= high for ratio, low, high in found.values())
    with pytest.raises(DeviceError, match="must be one of the models"):
        measure({"a": small}, "b")


def test_the_noise_floor_compares_even_and_odd_rounds() -> None:
    samples = np.array([[1.0, 2.0], [1.1, 2.2]] * 4)
    assert noise_floor(samples) == pytest.approx(1 - 1 / 1.1)
    assert low_quartile(np.array([[4.0], [1.0], [2.0], [3.0], [5.0]])).tolist() == [2.0]


def test_each_round_times_each_model_once() -> None:
    runner = Runner(model("Relu{}(f:1,*)->f:1,*", (8, 8)), optimise=False)
    samples = time_rounds([runner, runner, runner], 5, np.random.default_rng(0))
    assert samples.shape == (5, 3)
    assert (samples > 0).all()
    with pytest.raises(DeviceError, match="cannot load"):
        Runner(b"not a model", optimise=False)
