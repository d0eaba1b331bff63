"""The hand recipe by others' tools: even pruning by Torch-Pruning, then int8 by ONNX Runtime or NNCF, worst layers left in fp32.

Nothing of ours is in what it produces; the clock that times it and the fine-tuning in between are ours, the same as for our own.
"""

import copy
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("NNCF_CI", "1")  # NNCF reports its use over the network otherwise

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
import torch_pruning as tp
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from tightrope.estimators.measured.clock import measure

Images = npt.NDArray[np.float32]
Ratio = tuple[float, float, float]
TOOLS = ("onnxruntime", "nncf")
ORDERS = {
    "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "taylor": lambda: tp.importance.GroupTaylorImportance(),
    "lamp": lambda: tp.importance.LAMPImportance(p=2),
    "bn": lambda: tp.importance.BNScaleImportance(),
}
"""Torch-Pruning's importances: the first try of a recipe takes the first, and so on."""
ROUND_TO = 8  # widths; 4 gives slower files (20-40-80 channels take longer than 16-40-80 by a sixth)
MOST_REVERTED = 3
VERSION = 2
"""To be counted up whenever the code below makes other files: finished cells of the benchmark depend on it."""
INPUTS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Variant:
    """How a pruned net is quantised: by which tool, and which layers stay in fp32."""

    tool: str
    reverted: tuple[str, ...] = ()


def pruned(model: nn.Module, example: Tensor, share: float, order: str = "magnitude", batches: Sequence[Any] = ()) -> nn.Module:
    """A copy that keeps this share of the channels of every layer, rounded to `ROUND_TO`; `batches` are for the Taylor order."""
    small = copy.deepcopy(model).eval()
    if share < 1:
        heads = [m for m in small.modules() if isinstance(m, nn.Linear)][-1:]
        pruner = tp.pruner.BasePruner(
            small, example, importance=ORDERS[order](), pruning_ratio=1 - share, round_to=ROUND_TO, ignored_layers=heads
        )
        if order == "taylor":
            for inputs, targets in batches:
                nn.functional.cross_entropy(small(inputs), targets).backward()  # type: ignore[no-untyped-call]
        pruner.step()
        small.zero_grad(set_to_none=True)
    return small.eval()


def widths(model: nn.Module) -> tuple[int, ...]:
    """Output channels of all convolutions, in order."""
    return tuple(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))


def exported(model: nn.Module, example: Tensor) -> onnx.ModelProto:
    """The net in ONNX, at the example's batch size, batch norms folded in, as ONNX Runtime's quantiser wants it."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), (example,), buffer, input_names=["input"], output_names=["output"], dynamo=False, opset_version=17
        )
        raw, ready = Path(folder) / "raw.onnx", Path(folder) / "ready.onnx"
        raw.write_bytes(buffer.getvalue())
        quant_pre_process(str(raw), str(ready), skip_symbolic_shape=True)
        return onnx.load(ready)


def layers(model: onnx.ModelProto) -> list[str]:
    """Nodes that can be quantised or left."""
    return [node.name for node in model.graph.node if node.op_type in INPUTS]


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: Images) -> None:
        self._rows = iter(images)

    def get_next(self) -> dict[str, Images] | None:
        row = next(self._rows, None)
        return None if row is None else {"input": row[None]}


def quantised(model: onnx.ModelProto, variant: Variant, images: Images) -> onnx.ModelProto:
    """The int8 net: u8 activations, int8 weights for each channel, calibrated on `images` [n, c, h, w] of the training data."""
    if variant.tool == "nncf":
        return _by_nncf(model, variant.reverted, images)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        quantize_static(
            str(source), str(target), _Reader(images), per_channel=True, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, nodes_to_exclude=list(variant.reverted),
        )  # fmt: skip
        return onnx.load(target)


def _by_nncf(model: onnx.ModelProto, reverted: Sequence[str], images: Images) -> onnx.ModelProto:
    with _quiet():
        import nncf

        made: onnx.ModelProto = nncf.quantize(
            copy.deepcopy(model), nncf.Dataset([{"input": row[None]} for row in images]), subset_size=len(images),
            preset=nncf.QuantizationPreset.MIXED, ignored_scope=nncf.IgnoredScope(names=list(reverted)) if reverted else None,
        )  # fmt: skip
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice from the tools."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with Path(os.devnull).open("w") as sink, redirect_stdout(sink), redirect_stderr(sink), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# --- running a file -------------------------------------------------------------------------------------------------


def logits(model: onnx.ModelProto | bytes, images: Images) -> Images:
    """Outputs [n, classes] for images [n, c, h, w], at the file's own static batch of one, one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    data = model if isinstance(model, bytes) else model.SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: row[None]})[0] for row in images])


def correct(model: onnx.ModelProto | bytes, images: Images, targets: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which images the file classifies rightly, [n]."""
    found: npt.NDArray[np.bool_] = logits(model, images).argmax(1) == targets
    return found


# --- shapes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """One even share and what its int8 files take, as ratios to dense: as the tools make them, and with layers reverted."""

    share: float
    widths: tuple[int, ...]
    fastest: tuple[str, ...]
    ratios: Mapping[str, Ratio]
    """By `plain(tool)` or `fast(tool)`."""

    def best(self) -> float:
        return min(ratio for ratio, _, _ in self.ratios.values())


def curve(model: nn.Module, example: Tensor, dense: onnx.ModelProto, steps: int, rounds: int = 60) -> list[Shape]:
    """Measured latency of the recipe at every even share from 1 down to 1/8 in `steps` parts; weights do not matter to it.

    For each share the layers are found that make the int8 file faster when left in fp32, at most `MOST_REVERTED` of them.
    """
    noise = np.random.default_rng(0).standard_normal((4, *example.shape[1:])).astype(np.float32)
    found: list[Shape] = []
    for part in range(steps, steps // 8 - 1, -1):
        small = pruned(model, example, part / steps)
        if found and (widths(small) == found[-1].widths or any(map(int.__gt__, widths(small), found[-1].widths))):
            continue  # the same once rounded; or left whole, as the tool does where rounding leaves nothing
        net = exported(small, example)
        fastest = _fastest(net, dense, noise, rounds)
        files = {f"plain {t}": quantised(net, Variant(t), noise) for t in TOOLS}
        if fastest:
            files |= {f"fast {t}": quantised(net, Variant(t, fastest), noise) for t in TOOLS}
        ratios = measure({"dense": dense, **files}, "dense", rounds=rounds)
        del ratios["dense"]
        found.append(Shape(part / steps, widths(small), fastest, ratios))
    return found


def _fastest(net: onnx.ModelProto, dense: onnx.ModelProto, noise: Images, rounds: int) -> tuple[str, ...]:
    """The at most `MOST_REVERTED` layers whose return to fp32 saves most time, of those tried; none if that is below 1 %.

    Tried are the first layers in a row, with and without the last one, and what is found by adding the best layer, one at a time.
    """
    names = layers(net)
    heads = [tuple(names[:n]) for n in range(1, MOST_REVERTED + 1)]
    tried = {(), *heads, *((*head, names[-1]) for head in heads[:-1])}
    chain: tuple[str, ...] = ()
    for _ in range(MOST_REVERTED):
        longer = [(*chain, name) for name in names if name not in chain]
        ratios = _times(net, dense, longer, noise, rounds)
        chain = min(longer, key=ratios.__getitem__)
        tried.add(chain)
    ratios = _times(net, dense, sorted(tried), noise, 2 * rounds)
    best = min(tried, key=ratios.__getitem__)
    return best if ratios[best] < 0.99 * ratios[()] else ()


def _times(
    net: onnx.ModelProto, dense: onnx.ModelProto, sets: Sequence[tuple[str, ...]], noise: Images, rounds: int
) -> dict[tuple[str, ...], float]:
    """The ratio of the int8 file with each set of layers reverted."""
    files = {str(i): quantised(net, Variant(TOOLS[0], names), noise) for i, names in enumerate(sets)}
    ratios = measure({"dense": dense, **files}, "dense", rounds=rounds)
    return {names: ratios[str(i)][0] for i, names in enumerate(sets)}


def worst(net: onnx.ModelProto, images: Images) -> list[str]:
    """Layers by how much the int8 net's logits come nearer to the fp32 net's when one is left in fp32, the most first."""
    wanted = logits(net, images)

    def error(reverted: tuple[str, ...]) -> float:
        return float(np.square(logits(quantised(net, Variant(TOOLS[0], reverted), images), images) - wanted).mean())

    return sorted(layers(net), key=lambda name: error((name,)))
