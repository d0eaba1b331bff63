"""The examples: nets that keep their shapes, and YAML that names what is there."""

import importlib
import inspect
from pathlib import Path

import pytest
import torch
import yaml

import examples
from examples.depthwise_digits import DepthwiseNet, InvertedResidual
from examples.vit_digits import Attention, VisionTransformer
from tightrope.search import demo_task

FILES = sorted(Path(examples.__file__).parent.glob("*.yaml"))


def test_there_are_two() -> None:
    assert [path.stem for path in FILES] == ["depthwise_digits", "vit_digits"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_yaml_names_what_is_there(path: Path) -> None:
    keys = yaml.safe_load(path.read_text())
    for key, name in (("model", "build"), ("data", "splits")):
        module, attribute = keys[key].split(":")
        assert attribute == name
        called = getattr(importlib.import_module(module), attribute)
        assert all(p.default is not p.empty for p in inspect.signature(called).parameters.values())
    assert keys["budget"] == ["latency<=0.5x"]


@pytest.mark.parametrize("name", ["depthwise_digits", "vit_digits"])
def test_build_trains_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTROPE_CACHE", str(tmp_path))
    module = importlib.import_module(f"examples.{name}")
    monkeypatch.setattr(module, "SCHEDULE", demo_task.Schedule(epochs=1))
    few = tuple(x[:64] for x in demo_task.arrays("train"))
    asked: list[str] = []
    monkeypatch.setattr(demo_task, "arrays", lambda split: asked.append(split) or few)
    first, again = module.build().eval(), module.build()
    assert asked == ["train"]
    torch.testing.assert_close(first(few[0]), again(few[0]), atol=0, rtol=0)
    assert not again.training


@pytest.mark.parametrize(("side", "channels", "stride"), [(28, 1, 1), (40, 3, 2)])
def test_depthwise_shapes(side: int, channels: int, stride: int) -> None:
    model = DepthwiseNet(in_channels=channels, stem_stride=stride).eval()
    assert model(torch.zeros(2, channels, side, side)).shape == (2, 10)


def test_inverted_residual_adds_only_where_it_can() -> None:
    assert InvertedResidual(8, 8, stride=1, expand=2).residual
    assert not InvertedResidual(8, 8, stride=2, expand=2).residual
    assert not InvertedResidual(8, 16, stride=1, expand=2).residual


@pytest.mark.parametrize(("side", "patch", "channels"), [(28, 4, 1), (40, 5, 3)])
def test_transformer_shapes(side: int, patch: int, channels: int) -> None:
    model = VisionTransformer(side=side, patch=patch, in_channels=channels).eval()
    assert model(torch.zeros(2, channels, side, side)).shape == (2, 10)


def test_attention_is_torchs_own() -> None:
    own = Attention(16, 4)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([own.query.weight, own.key.weight, own.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([own.query.bias, own.key.bias, own.value.bias]))
        theirs.out_proj.load_state_dict(own.out.state_dict())
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(own(x), theirs(x, x, x, need_weights=False)[0], atol=1e-5, rtol=1e-5)
