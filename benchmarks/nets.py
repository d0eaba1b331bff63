"""Nets nobody here wrote, from end to end: trace, a random policy, compress, export, and ONNX Runtime against torch.

    python -m benchmarks.nets [--json FILE] [--quick] [--more] [--only NAME ...]

Weights are random; batch norms get the statistics of a random batch. Each net is compressed by random policies (widths, a
quarter of the layers low-rank, fp32 or int8 drawn per layer) and, to tell rounding from error, by the same in fp32.
Needs `pip install pytorchcv transformers`.
"""

import argparse
import gc
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from tightrope.compressors.assemble import assemble
from tightrope.compressors.compress import compress
from tightrope.compressors.export.onnx import check, write
from tightrope.compressors.export.skeleton import Skeleton
from tightrope.compressors.prepare import prepared_from
from tightrope.compressors.trace import traced
from tightrope.spaces import Choice, Policy, Space
from tightrope.spaces.errors import TightropeError

Build = Callable[[], tuple[nn.Module, Any]]


def image(size: int, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size)


def tokens(length: int = 16, batch: int = 2, vocabulary: int = 100) -> dict[str, Tensor]:
    ids = torch.randint(0, vocabulary, (batch, length))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def cv(name: str, size: int = 224) -> Build:
    """A net of pytorchcv."""

    def build() -> tuple[nn.Module, Any]:
        from pytorchcv.model_provider import get_model

        return get_model(name), image(size)

    return build


def hf(model: str, config: str, inputs: Callable[[], Any], **settings: Any) -> Build:
    """A net of transformers in a tiny configuration."""

    def build() -> tuple[nn.Module, Any]:
        import transformers

        made = getattr(transformers, config)(**settings)
        return getattr(transformers, model)(made), inputs()

    return build


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
PATCHED = {**SMALL, "image_size": 32, "patch_size": 8}

NETS: dict[str, Build] = {
    "resnet18": cv("resnet18"),
    "mobilenetv2_w1": cv("mobilenetv2_w1"),
    "densenet40_k12_cifar10": cv("densenet40_k12_cifar10", 32),
    "efficientnet_b0": cv("efficientnet_b0"),
    "squeezenet_v1_0": cv("squeezenet_v1_0"),
    "vgg11": cv("vgg11"),
    "vit_tiny": hf("ViTForImageClassification", "ViTConfig", lambda: image(32), **PATCHED),
    "bert_tiny": hf("BertForSequenceClassification", "BertConfig", tokens, **SMALL, vocab_size=100),
    "convnext_tiny": hf(
        "ConvNextForImageClassification", "ConvNextConfig", lambda: image(64), hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1]
    ),
    "swin_tiny": hf(
        "SwinForImageClassification", "SwinConfig", lambda: image(64),
        image_size=64, patch_size=4, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4,
    ),
}  # fmt: skip
"""The ten nets of the table."""

MORE: dict[str, Build] = {
    "shufflenetv2_w1": cv("shufflenetv2_w1"),
    "shufflenet_g3_w1": cv("shufflenet_g3_w1"),
    "resnext26_32x4d": cv("resnext26_32x4d"),
    "mobilenetv3_small_w1": cv("mobilenetv3_small_w1"),
    "seresnet10": cv("seresnet10"),
    "ghostnet": cv("ghostnet"),
    "hrnet_w18_small_v1": cv("hrnet_w18_small_v1"),
    "inceptionv3": cv("inceptionv3", 299),
    "regnet_tiny": hf(
        "RegNetForImageClassification", "RegNetConfig", lambda: image(64),
        embedding_size=16, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 2, 1], groups_width=8,
    ),
    "gpt2_tiny": hf(
        "GPT2LMHeadModel", "GPT2Config", lambda: {"input_ids": tokens()["input_ids"], "use_cache": False},
        vocab_size=100, n_positions=32, n_embd=64, n_layer=2, n_head=4,
    ),
    "distilbert_tiny": hf(
        "DistilBertForSequenceClassification", "DistilBertConfig", tokens,
        vocab_size=100, dim=64, n_layers=2, n_heads=4, hidden_dim=128,
    ),
    "segformer_tiny": hf(
        "SegformerForSemanticSegmentation", "SegformerConfig", lambda: image(64),
        hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1],
        decoder_hidden_size=32, num_attention_heads=[1, 2, 4, 4],
    ),
    "deit_tiny": hf("DeiTForImageClassification", "DeiTConfig", lambda: image(32), **PATCHED),
    "resnet_hf": hf(
        "ResNetForImageClassification", "ResNetConfig", lambda: image(64),
        hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], embedding_size=16,
    ),
    "mobilevit_tiny": hf(
        "MobileViTForImageClassification", "MobileViTConfig", lambda: image(64), image_size=64, hidden_sizes=[24, 32, 40],
        neck_hidden_sizes=[8, 16, 16, 24, 24, 32, 64],
    ),
    "llama_tiny": hf(
        "LlamaForSequenceClassification", "LlamaConfig", lambda: {**tokens(), "use_cache": False},
        **SMALL, vocab_size=100, pad_token_id=0,
        num_key_value_heads=2,
    ),
    "t5_encoder_tiny": hf(
        "T5EncoderModel", "T5Config", tokens, vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
    ),
}  # fmt: skip
"""Nets that no table promises."""


@dataclass
class Result:
    """What became of one net; gaps are relative, the largest over its policies."""

    name: str
    layers: int = 0
    groups: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    dense_gap: float = float("nan")
    fp32_gap: float = float("nan")
    int8_gap: float = float("nan")
    int8_noise: float = float("nan")
    seconds: dict[str, float] = field(default_factory=dict)
    error: str = ""


def randomised(model: nn.Module, inputs: Any) -> nn.Module:
    """The model in evaluation mode, its norms with scales, shifts and statistics as after training."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)) and module.affine:
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            module.momentum = None
    model.train()
    with torch.no_grad():
        call(model, inputs)
    return model.eval()


def call(model: nn.Module, inputs: Any) -> list[np.ndarray]:
    """All floating-point tensors that a model returns."""
    with torch.no_grad():
        made = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    leaves = made.to_tuple() if hasattr(made, "to_tuple") else made
    return [t.numpy() for t in torch.utils._pytree.tree_leaves(leaves) if isinstance(t, Tensor) and t.is_floating_point()]


def gap(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray], *, rms: bool = False) -> float:
    """The largest difference against the largest value; with `rms` root mean squares of difference and of deviation."""
    if [a.shape for a in found] != [b.shape for b in wanted]:
        raise ValueError(f"outputs of shapes {[a.shape for a in found]} must have shapes {[b.shape for b in wanted]}")
    if not all(np.isfinite(a).all() for a in (*found, *wanted)):
        return float("inf")
    if rms:
        return max(float(np.sqrt(np.square(a - b).mean()) / max(b.std(), 1e-12)) for a, b in zip(found, wanted, strict=True))
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12)) for a, b in zip(found, wanted, strict=True))


def random_policy(space: Space, rng: np.random.Generator) -> Policy:
    """Widths and bits drawn from the space, one layer in four low-rank."""
    point = rng.random(space.dimension)
    whole = rng.random(space.dimension) > 0.25
    for index, variable in enumerate(space.variables):
        if variable.kind == "rank" and whole[index]:
            point[index] = 1.0
    return space.decode(point)


def in_floating_point(policy: Policy, space: Space) -> Policy:
    """The same widths and ranks at 32 bits."""
    choices = {name: replace(choice, weight_bits=32, act_bits=32) for name, choice in policy.choices}
    return Policy.make(space.network, dict(policy.widths), {n: c for n, c in choices.items() if c != Choice()})


def run_onnx(data: bytes, inputs: Any) -> list[np.ndarray]:
    """Floating-point outputs of ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    values = [v for v in (inputs.values() if isinstance(inputs, dict) else [inputs]) if isinstance(v, Tensor)]
    names = [i.name for i in session.get_inputs()]
    given = {name: value.numpy() for name, value in zip(names, values, strict=True)} if names else {}
    return [y for y in session.run(None, given) if y.dtype == np.float32]


def examine(name: str, build: Build, policies: int, form: str = "spatial") -> Result:
    """Take one net through everything."""
    result = Result(name)
    try:
        for stage, seconds in _stages(result, build, policies, form):
            result.seconds[stage] = result.seconds.get(stage, 0.0) + seconds
    except (TightropeError, RuntimeError, ValueError, KeyError, TypeError, AssertionError, IndexError, AttributeError) as error:
        lines = str(error).strip().splitlines() or [""]
        result.error = f"{type(error).__name__}: {lines[0][:300]}"
        logging.getLogger(__name__).debug("%s", name, exc_info=True)
    return result


def _stages(result: Result, build: Build, policies: int, form: str) -> Iterator[tuple[str, float]]:
    torch.manual_seed(0)
    model, inputs = build()
    model = randomised(model, inputs)
    wanted, start = call(model, inputs), time.perf_counter()
    tracing = traced(model, inputs)
    yield "trace", time.perf_counter() - start
    network = tracing.network
    result.layers, result.groups = len(network.layers), len(network.groups)
    result.left_out = {x.name: x.frozen for x in network.layers if x.frozen and "returns it" not in x.frozen}
    start = time.perf_counter()
    prepared = prepared_from(tracing, [inputs])
    yield "prepare", time.perf_counter() - start
    result.dense_gap = gap(call(compress(model, Policy.make(network), prepared), inputs), wanted)
    space = Space.build(network, lambda layer: [(32, 32), (8, 8)], form=form)
    exporter = Skeleton(tracing)
    batch = tracing.skeleton.meta["batch"] or next(len(v) for v in _tensors(inputs))
    rng = np.random.default_rng(0)
    worst: dict[str, float] = {}
    for _ in range(policies):
        mixed = random_policy(space, rng)
        outputs: dict[str, list[np.ndarray]] = {}
        for bits, policy in (("fp32", in_floating_point(mixed, space)), ("int8", mixed)):
            start = time.perf_counter()
            small = compress(None, policy, prepared)
            yield "compress", time.perf_counter() - start
            outputs[bits] = call(small, inputs)
            start = time.perf_counter()
            graph = exporter.at(policy.all_widths(network), batch)
            yield "skeleton", time.perf_counter() - start
            data = write(graph, network, assemble(prepared, policy)).SerializeToString()
            check(data, network, policy)
            found = run_onnx(data, inputs)
            worst[bits] = max(worst.get(bits, 0.0), gap(found, outputs[bits], rms=bits == "int8"))
        worst["noise"] = max(worst.get("noise", 0.0), gap(outputs["int8"], outputs["fp32"], rms=True))
        result.fp32_gap, result.int8_gap, result.int8_noise = worst["fp32"], worst["int8"], worst["noise"]


def _tensors(inputs: Any) -> list[Tensor]:
    return [v for v in (inputs.values() if isinstance(inputs, dict) else [inputs]) if isinstance(v, Tensor)]


def table(results: Sequence[Result]) -> str:
    """The results as text, and below it what is left out of pruning, and why."""
    lines = [f"{'net':24} layers groups  dense gap   fp32 gap   int8 gap  int8 noise  trace prepare compress skeleton s"]
    for r in results:
        times = " ".join(f"{r.seconds.get(stage, 0):7.1f}" for stage in ("trace", "prepare", "compress", "skeleton"))
        lines.append(
            f"{r.name:24} {r.layers:6} {r.groups:6} {r.dense_gap:10.1e} {r.fp32_gap:10.1e} {r.int8_gap:10.1e} {r.int8_noise:11.1e} "
            + times
            + (f"  {r.error}" if r.error else "")
        )
    lines.append("")
    for r in results:
        for layer, reason in r.left_out.items():
            lines.append(f"{r.name}: channels of {layer} are not pruned: {reason}")
    return "\n".join(lines)


def figures(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results as JSON rows."""
    rows: list[dict[str, Any]] = [
        {"name": "nets_passed", "value": sum(not r.error for r in results), "unit": "nets"},
        {"name": "nets_tried", "value": len(results), "unit": "nets"},
    ]
    for r in results:
        if r.error:
            continue
        rows += [
            {"name": f"nets_{r.name}_groups", "value": r.groups, "unit": "groups"},
            {"name": f"nets_{r.name}_left_out", "value": len(r.left_out), "unit": "layers"},
            {"name": f"nets_{r.name}_fp32_gap", "value": r.fp32_gap, "unit": "of the largest output"},
            {"name": f"nets_{r.name}_int8_gap", "value": r.int8_gap, "unit": "of the outputs' deviation"},
            {"name": f"nets_{r.name}_int8_noise", "value": r.int8_noise, "unit": "of the outputs' deviation"},
            {"name": f"nets_{r.name}_seconds", "value": round(sum(r.seconds.values()), 2), "unit": "s"},
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="one policy for each net instead of three")
    parser.add_argument("--more", action="store_true", help="also nets that no table promises")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these nets alone")
    parser.add_argument("--debug", action="store_true", help="print tracebacks")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger(__name__).setLevel(logging.DEBUG if options.debug else logging.WARNING)
    torch.set_num_threads(1)
    nets = {**NETS, **MORE} if options.more or options.only else NETS
    names = options.only or [*nets]
    results = []
    for name in names:
        results.append(examine(name, nets[name], 1 if options.quick else 3))
        print(table(results[-1:]).splitlines()[1], flush=True)
        gc.collect()
    print()
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(figures(results), indent=1) + "\n")
    raise SystemExit(any(r.error for r in results))


if __name__ == "__main__":
    main()
